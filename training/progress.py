"""The progress bar of a training run: time left, loss, and validation accuracy by depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from family import tree as algebra
from family.choice import best_by_depth
from training.checkpoint import CHECKPOINT_FILE
from training.config import ConfigError, RunConfig
from training.data_config import DataConfig, PublishedConfig
from training.dataset import Dataset
from training.distributed import ALONE, Team
from training.evaluate import PathScore
from training.model import Family
from training.publications import IMAGES, Publication, download
from training.trainer import Report, train

console = Console()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a run trains; the message says how far it was and what goes on with it."""


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let Ctrl-C within say what there is then and how to go on.

    Raises:
        Interrupted: with `message`.
    """
    try:
        yield
    except KeyboardInterrupt as exc:
        raise Interrupted(message) from exc


def progress_columns(what: str) -> tuple[ProgressColumn, ...]:
    """`what`, the bar, per cent, the time taken and the time left: what has to be seen at 80 columns."""
    return (
        TextColumn(f"[bold]{what}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def train_with_bar(
    run: RunConfig,
    out: Path,
    data: Dataset,
    *,
    family: Family | None = None,
    resume: bool = False,
    team: Team = ALONE,
) -> Family:
    """As `training.trainer.train`, with a bar on a terminal and a line for each validation elsewhere; the first rank of a
    team shows them.

    Raises:
        Interrupted: as a `KeyboardInterrupt`, with how far the run was.
    """
    last = ""
    columns = (*progress_columns("training"), TextColumn("loss {task.fields[loss]} {task.fields[accuracy]}"))
    with Progress(*columns, console=console, refresh_per_second=4, disable=not team.leads) as bar:
        task = bar.add_task("training", total=1.0, loss="-", accuracy="")

        def on_step(report: Report) -> None:
            nonlocal last
            last = f" at step {report.step} ({report.share:.0%})"
            bar.update(task, completed=report.share)
            if report.scores or report.step % 20 == 0:
                bar.update(task, loss=f"{report.loss:.3g}")
            if report.scores:
                by_depth = _accuracies(algebra.Tree(run.model.hierarchy_depth), report.scores)
                bar.update(task, accuracy=f"val. {_range(by_depth)}")
                if not console.is_terminal:
                    line = f"{'  '.join(by_depth)} %"
                    console.print(f"step {report.step} ({report.share:.0%}): loss {report.loss:.3f}, validation {line}")

        try:
            return train(run, out, data, on_step, family=family, resume=resume, team=team)
        except KeyboardInterrupt as exc:
            if not team.leads:
                raise
            if (out / CHECKPOINT_FILE).exists():
                raise Interrupted(
                    f"stopped{last}: continue from the last checkpoint with the same command plus --resume"
                ) from exc
            raise Interrupted(f"stopped{last}, before the first checkpoint: the same command starts anew") from exc


def download_with_bar(data: DataConfig) -> None:
    """Fetch what a published data set lacks, with a bar.

    Raises:
        ConfigError: the data set is not one that is published.
        DataError: it cannot be fetched.
    """
    if not isinstance(data, PublishedConfig):
        raise ConfigError(f"--download goes with data.kind mnist, cifar10 and cifar100, not with {data.kind}")
    fetch_with_bar(IMAGES[data.kind], data.folder)


def fetch_with_bar(publication: Publication, folder: Path) -> None:
    """Fetch what `folder` lacks of a publication, with a bar.

    Raises:
        DataError: it cannot be fetched.
    """
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        download(publication, folder, report)


def _accuracies(tree: algebra.Tree, scores: dict[algebra.Path, PathScore]) -> list[str]:
    """Of the best path of each depth, `2:93.1`."""
    best = best_by_depth(tree, {path: result.accuracy for path, result in scores.items()})
    return [f"{depth}:{100 * scores[path].accuracy:.1f}" for depth, path in best.items()]


def _range(by_depth: list[str]) -> str:
    """The shallowest and the deepest: more does not fit beside the bar."""
    return f"{' '.join(dict.fromkeys([by_depth[0], by_depth[-1]]))} %"
