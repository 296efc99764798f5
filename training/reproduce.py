"""`hbll reproduce`: the paper's tables and figures, at the scale of a test, of two cores, or of the paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.dataset import DataError
from training.experiments.experiment import Experiment, Result, Scale, run_all
from training.experiments.families import table1
from training.experiments.language import table9
from training.experiments.local_rules import local_rules
from training.experiments.recurrence import fig3, table6
from training.experiments.report import write_report
from training.experiments.source import PUBLISHED, publication_of
from training.experiments.vision import table3, table7, table8
from training.progress import fetch_with_bar
from training.trainer import TrainingDiverged

EXPERIMENTS: dict[str, Callable[[Scale, Path | None], Experiment]] = {
    "table1": table1,
    "table3": table3,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "table9": table9,
    "fig3": lambda scale, _: fig3(scale),
}
"""The paper's."""

RESEARCH: dict[str, Callable[[Scale, Path | None], Experiment]] = {"local-rules": lambda scale, _: local_rules(scale)}
"""Ours, which `all` leaves out."""

console = Console()


@click.command()
@click.argument(
    "names", metavar="EXPERIMENT...", nargs=-1, type=click.Choice([*EXPERIMENTS, "all", *RESEARCH]), required=True
)
@click.option("--scale", type=click.Choice(get_args(Scale)), default="small", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/reproduce"), show_default=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the published files that scale paper reads; at other scales, of text files for table9.",
)
@click.option("--download", is_flag=True, help="Scale paper: fetch the published files that --data lacks.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of each run.")
def reproduce(
    names: tuple[str, ...], scale: Scale, out: Path, data: Path | None, download: bool, jobs: int, threads: int
) -> None:
    """Repeat experiments of the paper and set its figures beside ours.

    Every experiment gets the folder OUT/NAME-SCALE with NAME.md, NAME.csv, NAME.png and its runs. Interrupted, it reports
    what has ended; the same command goes on where it was, and finished runs are not run again.

    \b
    Experiments:
      table1, table3, table6, table7, table8, table9, fig3
                   the paper's
      all          all of these
      local-rules  research of ours: rules with local gradients whose family
                   might rise with depth (an hour of one core)

    \b
    Scales:
      smoke  does everything work; the figures mean nothing
      small  57 core-minutes for all (--jobs 2 takes two cores), on embedded
             data, which are not the paper's
      paper  the published settings, on the published files in --data: MNIST
             for table1 and table6, CIFAR-10 for table3 and table7, CIFAR-100
             for table8, WikiText-103 (or other text files) for table9

    Nothing is downloaded without --download. Every file is compared with its published MD5.
    """
    known = EXPERIMENTS | RESEARCH
    chosen = dict.fromkeys(chain.from_iterable(EXPERIMENTS if name == "all" else (name,) for name in names))
    if download and (scale != "paper" or data is None):
        raise click.UsageError("--download fetches what --scale paper reads into the folder --data: it goes with both")
    try:
        if download and data is not None:
            for name in chosen:
                if name in PUBLISHED:
                    fetch_with_bar(publication_of(name), data)
        experiments = [known[name](scale, data) for name in chosen]
        for experiment in experiments:
            folder = out / f"{experiment.name}-{scale}"
            ended = _run_with_bar(experiment, folder, jobs, threads)
            results = [end for end in ended.values() if isinstance(end, Result)]
            diverged = [name for name, end in ended.items() if not isinstance(end, Result)]
            if not results:
                raise click.ClickException(f"{experiment.name}: no run ended with a result, so there is nothing to report")
            command = f"hbll reproduce {experiment.name} --scale {scale}" + (f" --data {data}" if data else "")
            click.echo(write_report(experiment, results, diverged, command, folder))
            click.echo(f"wrote {folder}/{experiment.name}.md, .csv and .png")
            if len(ended) < len(experiment.trials):
                raise click.Abort
    except (ConfigError, CheckpointError, DataError) as exc:
        raise click.ClickException(str(exc)) from exc


def _run_with_bar(experiment: Experiment, out: Path, jobs: int, threads: int) -> dict[str, Result | TrainingDiverged]:
    """How the trials ended, by name, in the order of the experiment; after an interrupt, those that had ended."""
    ended: dict[str, Result | TrainingDiverged] = {}
    columns = TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}")
    with (
        suppress(KeyboardInterrupt),
        closing(run_all(experiment.trials, out, jobs, threads)) as ends,
        Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=4) as bar,
    ):
        task = bar.add_task(experiment.name, total=len(experiment.trials))
        for trial, end in ends:
            ended[trial.name] = end
            cells = end.cells if isinstance(end, Result) else ()
            values = ", ".join(f"{cell.column} {cell.value:.{experiment.decimals}f}" for cell in cells)
            console.print(f"{trial.name}: {values or f'left out: {end}'}", markup=False, highlight=False)
            bar.advance(task)
    return {trial.name: ended[trial.name] for trial in experiment.trials if trial.name in ended}
