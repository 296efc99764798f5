"""`hbll reproduce`: the paper's tables and figures, at the scale of a test, of two cores, or of the paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.experiments.experiment import Experiment, Result, Scale, run_all
from training.experiments.families import table1
from training.experiments.recurrence import fig3, table6
from training.experiments.report import write_report

EXPERIMENTS: dict[str, Callable[[Scale], Experiment]] = {"table1": table1, "table6": table6, "fig3": fig3}

console = Console()


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*EXPERIMENTS, "all"]), required=True)
@click.option("--scale", type=click.Choice(get_args(Scale)), default="small", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/reproduce"), show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of each run.")
def reproduce(names: tuple[str, ...], scale: Scale, out: Path, jobs: int, threads: int) -> None:
    """Repeat experiments of the paper and set its figures beside ours.

    Every experiment gets the folder OUT/NAME-SCALE with NAME.md, NAME.csv, NAME.png and its runs. Stopped, the same command
    goes on where it was; finished runs are not run again.

    \b
    Scales:
      smoke  does everything work: a minute for all; the figures mean nothing
      small  what two cores do in 40 minutes, on embedded data, which are not the paper's
      paper  the published configuration
    """
    chosen = dict.fromkeys(EXPERIMENTS if "all" in names else names)
    try:
        experiments = [EXPERIMENTS[name](scale) for name in chosen]
        for experiment in experiments:
            folder = out / f"{experiment.name}-{scale}"
            results, diverged = _run_with_bar(experiment, folder, jobs, threads)
            command = f"hbll reproduce {experiment.name} --scale {scale}"
            click.echo(write_report(experiment, results, diverged, command, folder))
            click.echo(f"wrote {folder}/{experiment.name}.md, .csv and .png")
    except (ConfigError, CheckpointError) as exc:
        raise click.ClickException(str(exc)) from exc


def _run_with_bar(experiment: Experiment, out: Path, jobs: int, threads: int) -> tuple[list[Result], list[str]]:
    """All trials, in the order of the experiment, and the names of those that diverged."""
    found: dict[str, Result] = {}
    diverged: list[str] = []
    columns = TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=4) as bar:
        task = bar.add_task(experiment.name, total=len(experiment.trials))
        for trial, end in run_all(experiment.trials, out, jobs, threads):
            if isinstance(end, Result):
                found[trial.name] = end
                values = ", ".join(f"{cell.column} {cell.value:.{experiment.decimals}f}" for cell in end.cells)
                console.print(f"{trial.name}: {values}", markup=False, highlight=False)
            else:
                diverged.append(trial.name)
                console.print(f"{trial.name} left out: {end}", markup=False)
            bar.advance(task)
    return [found[trial.name] for trial in experiment.trials if trial.name in found], diverged
