"""Does the certified risk hold on real data? `python -m benchmarks.risk runs/digits models/digits/1`.

Over many random splits of the held-out rows (certification and test together) into a third for certification and the
rest: the levels are certified on the one and their risk, depth and accuracy measured on the other. The measured risk of
a level varies around the true one, so a share of splits above epsilon is to be expected and is no violation by itself.
"""

from __future__ import annotations

from pathlib import Path as FilePath

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from export.certify import DELTA, EPSILONS, certify, disagreements, exits
from family.manifest import load_manifest
from training import calibrate
from training.checkpoint import load_family
from training.evaluate import path_logits
from training.sources import load_data_of

_CERTIFIED_ROWS = 500


@click.command()
@click.argument("run", type=click.Path(path_type=FilePath, exists=True, file_okay=False))
@click.argument("bundle", type=click.Path(path_type=FilePath, exists=True, file_okay=False))
@click.option("--splits", type=int, default=100, show_default=True)
def main(run: FilePath, bundle: FilePath, splits: int) -> None:
    """Measure the risk of certified levels over random splits."""
    config, family, _ = load_family(run)
    manifest = load_manifest(bundle)
    data = load_data_of(run, config.data)
    images = torch.cat([data.certification.x, data.test.x])
    labels = torch.cat([data.certification.labels, data.test.labels]).numpy()
    of_path = {
        path: calibrate.answers(logits.numpy(), labels, manifest.offered[path].temperature)
        for path, logits in path_logits(family, images, manifest.climb)
    }
    confidences = np.stack([of_path[path].confidence for path in manifest.climb])
    answers = np.stack([of_path[path].answer for path in manifest.climb])
    depths = np.array([len(path) for path in manifest.climb])

    found: dict[float, list[tuple[float, float, float]]] = {epsilon: [] for epsilon in EPSILONS}
    rng = np.random.default_rng(0)
    for _ in range(splits):
        order = rng.permutation(len(labels))
        ours, rest = order[:_CERTIFIED_ROWS], order[_CERTIFIED_ROWS:]
        for level in certify(disagreements(confidences[:, ours], answers[:, ours]), _CERTIFIED_ROWS):
            where = exits(confidences[:, rest], level.threshold)
            given = answers[where, rest]
            risk = float((given != answers[-1, rest]).mean())
            found[level.epsilon].append((risk, float(depths[where].mean()), float((given == labels[rest]).mean())))

    rows = f"{_CERTIFIED_ROWS} rows certify, {len(labels) - _CERTIFIED_ROWS} test"
    table = Table(title=f"{splits} splits: {rows}; delta {DELTA:g} for all levels")
    for column in ("max_risk", "certified in", "mean risk", "splits above", "mean blocks", "accuracy"):
        table.add_column(column, justify="right")
    for epsilon, measured in found.items():
        if not measured:
            table.add_row(f"{epsilon:g}", "0 %", "-", "-", "-", "-")
            continue
        risks, blocks, accuracies = (np.array(column) for column in zip(*measured, strict=True))
        table.add_row(
            f"{epsilon:g}",
            f"{100 * len(measured) / splits:.0f} %",
            f"{risks.mean():.4f}",
            f"{100 * (risks > epsilon).mean():.0f} %",
            f"{blocks.mean():.2f}",
            f"{100 * accuracies.mean():.2f} %",
        )
    reference = float((answers[-1] == labels).mean())
    console = Console()
    console.print(table)
    console.print(f"the reference path alone: {depths[-1]} blocks, {100 * reference:.2f} %")


if __name__ == "__main__":
    main()
