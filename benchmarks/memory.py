"""How much memory serving all paths of a family costs, against the weights once.

`python -m benchmarks.memory` makes bundles of random weights (kept in --folder), and for each, in a process of its
own, measures PSS from just before loading to after 1,000 requests over all paths in batches of 1 to 32, sent to the
real app. Two figures: in a process that has not used ONNX Runtime yet, and in one that serves a small model already,
where the runtime's own fixed cost is paid.
"""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from pathlib import Path
from typing import Literal

import click
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from family.manifest import WEIGHTS_FILE
from family.tree import format_path
from service.app import create_app
from service.repository import Repository, open_repository
from service.settings import Settings

FAMILIES = {
    "small": {"kind": "vit"},
    "mlp-118MB": {"kind": "mlp", "width": 2000},
    "vit-54MB": {"kind": "vit", "width": 400, "heads": 4, "hidden": 1600},
    "vit-106MB": {"kind": "vit", "width": 560, "heads": 8, "hidden": 2240},
}


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/memory"), show_default=True)
@click.option("--requests", type=int, default=1000, show_default=True)
@click.option("--one", help="Measure this family in this process and print its figures (for internal use).")
@click.option("--warm", is_flag=True, help="With --one: serve the small family first.")
def main(folder: Path, requests: int, one: str | None, warm: bool) -> None:
    """Measure the memory of bundles with random weights."""
    if one:
        print(asyncio.run(measure(folder, one, requests, warm)))  # noqa: T201  read by the process that started this one
        return
    table = Table(title=f"PSS growth over {requests} requests on all 25 paths, MB")
    for column in ("family", "weights", "cold process", "ratio", "serving already", "ratio"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for name in FAMILIES:
        make_bundle(folder, name)
    for name in list(FAMILIES)[1:]:
        weights = (folder / name / name / "1" / WEIGHTS_FILE).stat().st_size / 1e6
        cells = [name, f"{weights:.1f}"]
        for flags in ([], ["--warm"]):
            command = [sys.executable, "-m", "benchmarks.memory", "--folder", str(folder), "--requests", str(requests)]
            found = subprocess.run([*command, "--one", name, *flags], stdout=subprocess.PIPE, text=True, check=True)
            grown = float(found.stdout.split()[-1])
            cells += [f"{grown:.1f}", f"{grown / weights:.2f}"]
        table.add_row(*cells)
    Console().print(table)


def make_bundle(folder: Path, name: str) -> None:
    """Export a family of random weights to `folder/name/name/1`, unless it is there."""
    from export.bundle import export_bundle  # the process that measures must not hold torch
    from training.checkpoint import Origin, Progress
    from training.config import parse_config
    from training.digits import load_digits
    from training.model import build_family

    target = folder / name / name / "1"
    if target.exists():
        return
    Console().print(f"exporting {name}")
    config = parse_config({"name": name.lower(), "model": FAMILIES[name]}, name)
    export_bundle(config, build_family(config.model, 0), Progress(), Origin.here(), load_digits(4), target)


async def measure(folder: Path, name: str, requests: int, warm: bool) -> float:
    """PSS growth in MB of loading and serving one family."""
    idle = create_app(Settings(models=folder), Repository({}))  # the framework, without a model
    async with httpx.AsyncClient(transport=httpx.ASGITransport(idle), base_url="http://memory") as client:
        (await client.get("/openapi.json")).raise_for_status()
    if warm:
        await serve(folder / "small", "small", 25)
    before = pss_mb()
    kept = await serve(folder / name, name, requests)
    grown = pss_mb() - before
    del kept
    return grown


async def serve(models: Path, name: str, requests: int) -> object:
    """Load, warm up, and send requests through the app; returns what must stay alive."""
    settings = Settings(models=models, threads=1)
    app = create_app(settings, open_repository(settings))
    context = app.state.context
    paths = [format_path(path) for path in context.repository.get(name).manifest.offered]
    rng = np.random.default_rng(0)
    async with app.router.lifespan_context(app):
        while not context.ready:  # noqa: ASYNC110  asks as a probe would
            await asyncio.sleep(0.05)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://memory") as client:
            for index in range(requests):
                rows = [
                    {"tensor": base64.b64encode(row.tobytes()).decode(), "datatype": "FP32", "shape": [28, 28]}
                    for row in rng.random((1 + index % 32, 28, 28), dtype=np.float32)
                ]
                body = {"inputs": rows, "path": paths[index % len(paths)]}
                (await client.post(f"/v1/models/{name}/predict", json=body)).raise_for_status()
    return app


def pss_mb(pid: int | Literal["self"] = "self") -> float:
    """Proportional set size of a process, in units of 10**6 bytes, as the weights are counted."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("no Pss in smaps_rollup: this needs Linux 4.14 or newer")


if __name__ == "__main__":
    main()
