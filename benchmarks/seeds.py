"""Accuracy of several runs: `python -m benchmarks.seeds runs/seed0 runs/seed1 runs/seed2`.

For each run the path of each depth that is best on *validation* is scored on *test* data; means over the runs follow,
with the standard error of the mean, and the mean over all paths.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1, required=True)
def main(runs: tuple[Path, ...]) -> None:
    """Tabulate the test accuracy of RUNS by depth, from the metrics.json that `hbll train` writes."""
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    by_run = [{path["depth"]: path["test"]["accuracy"] for path in m.values() if path["best_of_depth"]} for m in metrics]
    depths = sorted(by_run[0])
    means = [statistics.mean(path["test"]["accuracy"] for path in m.values()) for m in metrics]
    table = Table(title="test accuracy of the validation-best path of each depth, %")
    for column in ("run", *(f"{depth} blocks" for depth in depths), "mean of all paths"):
        table.add_column(column, justify="left" if column == "run" else "right")
    columns = [[accuracies[depth] for accuracies in by_run] for depth in depths] + [means]
    for index, run in enumerate(runs):
        table.add_row(run.name, *(f"{100 * column[index]:.1f}" for column in columns))
    if len(runs) > 1:
        table.add_section()
        table.add_row("mean", *(f"{100 * statistics.mean(column):.2f}" for column in columns))
        errors = (statistics.stdev(column) / len(column) ** 0.5 for column in columns)
        table.add_row("standard error", *(f"{100 * error:.2f}" for error in errors))
    Console().print(table)


if __name__ == "__main__":
    main()
