"""`hbll train` and `hbll evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from family import tree as algebra
from family.choice import best_by_depth, pareto_front, reference_path
from training.checkpoint import CheckpointError, load_family, write_atomically
from training.config import ConfigError, RunConfig, load_config
from training.data import Digits, load_digits
from training.evaluate import PathScore, score_paths
from training.model import Family
from training.plots import plot_accuracy_over_depth, plot_history
from training.trainer import LOG_FILE, History, Report, TrainingDiverged, trained_paths
from training.trainer import train as run_training

console = Console()


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file; defaults: digits.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/digits"), show_default=True)
@click.option("--method", type=click.Choice(["hbll+chains", "hbll", "chains", "bp"]), help="Overrides train.method.")
@click.option("--blocks", type=int, help="With --method bp: blocks of the one network that is trained.")
@click.option("--hbll-share", type=float, help="With hbll+chains: share of the budget that HBLL steps take, 0..1.")
@click.option("--seed", type=int, help="Overrides train.seed.")
@click.option("--budget", type=float, help="Block evaluations per training image; overrides train.budget.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its last checkpoint.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of one operation.")
def train(
    config: Path | None,
    out: Path,
    method: str | None,
    blocks: int | None,
    hbll_share: float | None,
    seed: int | None,
    budget: float | None,
    resume: bool,
    threads: int,
) -> None:
    """Train a family of subnetworks that share one set of weights.

    \b
    Methods:
      hbll+chains  HBLL steps for a share of the budget, mixed with sampled chains for the rest (default)
      hbll         Hierarchical Block-Local Learning alone: no gradient leaves a block and its right parent
      chains       backpropagation through one sampled path a step, with every exit on the way
      bp           one ordinary network of --blocks blocks, the baseline

    The folder --out gets config.json, checkpoint.safetensors, log.csv, TensorBoard events and, at the end,
    metrics.json and plots. A killed run goes on with --resume.

    \b
    Examples:
      hbll train
      hbll train --method bp --blocks 3 --budget 90 --out runs/bp3
      hbll train --config training/configs/mlp.toml --out runs/mlp
    """
    overrides = {"method": method, "blocks": blocks, "hbll_share": hbll_share, "seed": seed, "budget": budget}
    given: dict[str, object] = {key: value for key, value in overrides.items() if value is not None}
    torch.set_num_threads(threads)
    try:
        run = load_config(config, {"train": given})
        data = load_digits(run.data.shift)
        family = _train_with_bar(run, out, data, resume)
    except (ConfigError, CheckpointError, TrainingDiverged, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    plot_history(History.read(out / LOG_FILE, up_to_step=2**62).rows, out / "accuracy_over_training.png")
    _report(run, family, data, out)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where files go.  [default: RUN]")
def evaluate(run: Path, out: Path | None) -> None:
    """Score every path of the trained family in RUN on its validation and test data.

    Prints a table and writes metrics.json and accuracy_over_depth.png.
    """
    try:
        config, family, _ = load_family(run)
    except (CheckpointError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    target = out or run
    target.mkdir(parents=True, exist_ok=True)
    _report(config, family, load_digits(config.data.shift), target)


def _train_with_bar(run: RunConfig, out: Path, data: Digits, resume: bool) -> Family:
    columns = (
        TextColumn("[bold]training"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]} | validation {task.fields[accuracy]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("training", total=1.0, loss="-", accuracy="-")

        def on_step(report: Report) -> None:
            bar.update(task, completed=report.share)
            if report.step % 20 == 0:
                bar.update(task, loss=f"{report.loss:.3f}")
            if report.scores:
                line = _accuracy_line(algebra.Tree(run.model.hierarchy_depth), report.scores)
                bar.update(task, accuracy=line)
                if not console.is_terminal:
                    console.print(f"step {report.step} ({report.share:.0%}): loss {report.loss:.3f}, validation {line}")

        return run_training(run, out, data, on_step, resume=resume)


def _accuracy_line(tree: algebra.Tree, scores: dict[algebra.Path, PathScore]) -> str:
    best = best_by_depth(tree, {path: result.accuracy for path, result in scores.items()})
    return "  ".join(f"{depth}:{100 * scores[path].accuracy:.1f}" for depth, path in best.items()) + " %"


def _report(run: RunConfig, family: Family, data: Digits, out: Path) -> None:
    """Score all trained paths, print the table, write metrics.json and the plot."""
    tree = family.tree
    paths = trained_paths(run, tree, tuple(tree.paths()))
    validation, test = (score_paths(family, split, paths) for split in (data.validation, data.test))
    accuracies = {path: result.accuracy for path, result in validation.items()}
    front, reference = set(pareto_front(tree, accuracies)), reference_path(tree, accuracies)
    best = set(best_by_depth(tree, accuracies).values())
    table = Table(title=f"{run.name}: {len(paths)} path(s), {run.train.method}, seed {run.train.seed}")
    for column in ("path", "depth", "validation %", "test %", ""):
        table.add_column(column, justify="left" if column in ("path", "") else "right")
    for path in sorted(paths, key=lambda path: (len(path), path)):
        note = (
            "reference" if path == reference else "Pareto" if path in front else "best of its depth" if path in best else ""
        )
        table.add_row(
            algebra.format_path(path),
            str(len(path)),
            f"{100 * validation[path].accuracy:.1f}",
            f"{100 * test[path].accuracy:.1f}",
            note,
        )
    console.print(table)
    metrics = {
        algebra.format_path(path): {
            "depth": len(path),
            "best_of_depth": path in best,
            "validation": {"accuracy": validation[path].accuracy, "loss": validation[path].loss},
            "test": {"accuracy": test[path].accuracy, "loss": test[path].loss},
        }
        for path in paths
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2).encode())
    test_accuracies = {path: result.accuracy for path, result in test.items()}
    plot_accuracy_over_depth(
        tree, test_accuracies, f"{run.name}: test accuracy of every path", out / "accuracy_over_depth.png"
    )
    console.print(f"wrote {out}/metrics.json and {out}/accuracy_over_depth.png")
