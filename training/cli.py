"""`hbll train`, `hbll compare` and `hbll evaluate`."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path
from typing import NoReturn

import click
import torch
from rich.progress import Progress

from family import tree as algebra
from training import compare as comparison
from training.assessment_report import MIN_CONFIDENCE, report
from training.checkpoint import CONFIG_FILE, CheckpointError, Weights, load_family, load_run_config
from training.config import ConfigError, MethodName, RunConfig, change_config, dump_config, load_config, parse_override
from training.custom import import_factory
from training.dataset import DataError, Dataset
from training.distributed import TeamError, join
from training.methods import METHODS, steps_of
from training.model import Factory, Family, build_family
from training.plots import plot_history
from training.progress import Interrupted, console, download_with_bar, interruptible, progress_columns, train_with_bar
from training.report import Record, write_report
from training.shapes import ShapeError
from training.sources import load_data, load_data_of
from training.splits import Splits
from training.trainer import LOG_FILE, History, Report, TrainingDiverged

_METHODS = "\b\nMethods:\n" + "\n".join(
    textwrap.fill(method.summary, 76, initial_indent=f"  {name:12} ", subsequent_indent=" " * 15)
    for name, method in METHODS.items()
)


def _overrides(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, object]:
    try:
        return dict(map(parse_override, values))
    except ConfigError as exc:
        raise click.BadParameter(str(exc)) from exc


def _method_names(_context: click.Context, _option: click.Parameter, text: str) -> tuple[MethodName, ...]:
    known: dict[str, MethodName] = {name: name for name in METHODS}
    names = dict.fromkeys(part.strip() for part in text.split(","))
    if unknown := names.keys() - known.keys():
        raise click.BadParameter(f"there is no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    return tuple(known[name] for name in names)


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as exc:
        raise click.BadParameter(f"expected numbers with commas between them, got {text!r}") from exc


def _rates(_context: click.Context, _option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as exc:
        raise click.BadParameter(f"expected learning rates with commas between them, got {text!r}") from exc


_config = click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file; defaults: digits."
)
_budget = click.option("--budget", type=float, help="Block evaluations per training image; overrides train.budget.")
_set = click.option(
    "--set",
    "settings",
    multiple=True,
    callback=_overrides,
    metavar="KEY=VALUE",
    help="Overrides any key of the configuration, like train.lr=1e-3. Can be repeated.",
)
_threads = click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of one operation."
)


def _import_factory(_context: click.Context, _option: click.Parameter, name: str | None) -> Factory | None:
    try:
        return None if name is None else import_factory(name)
    except ConfigError as exc:
        raise click.BadParameter(str(exc)) from exc


factory_option = click.option(
    "--factory",
    callback=_import_factory,
    metavar="MODULE:FUNCTION",
    help="Runs this code of yours to build a model of kind custom.",
)


weights_option = click.option(
    "--weights",
    type=click.Choice(["final", "best"]),
    help="Of the end of the run, or of its best validation.  [default: final; best with train.patience]",
)


@click.command(epilog=_METHODS)
@_config
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/digits"), show_default=True)
@click.option("--method", type=click.Choice(list(METHODS)), help="Overrides train.method.")
@click.option("--blocks", type=int, help="With bp or cffm: blocks of the one network that is trained.")
@click.option("--hbll-share", type=float, help="With hbll+chains: share of the budget that HBLL steps take, 0..1.")
@click.option("--seed", type=int, help="Overrides train.seed.")
@_budget
@_set
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out, by its config.json; starts one where there is none."
)
@click.option("--download", is_flag=True, help="Fetch the files of mnist, cifar10 or cifar100 that are not there.")
@click.option("--dry-run", is_flag=True, help="Print the configuration, the model's size and the work, and exit.")
@factory_option
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where steps run.")
@click.option(
    "--tree-ranks", type=int, default=1, show_default=True, help="Ranks that divide the nodes of a level among them."
)
@_threads
def train(
    config: Path | None,
    out: Path,
    method: str | None,
    blocks: int | None,
    hbll_share: float | None,
    seed: int | None,
    budget: float | None,
    settings: dict[str, object],
    resume: bool,
    download: bool,
    dry_run: bool,
    factory: Factory | None,
    device: str,
    tree_ranks: int,
    threads: int,
) -> None:
    """Train a family of subnetworks that share one set of weights.

    The folder --out gets config.json, checkpoint.safetensors, log.csv, TensorBoard events and, at the end,
    metrics.json, classes.csv and plots. A killed run goes on with --resume, as its config.json says: --out is all it has
    to be told.

    Started by torchrun, all its ranks train one family: they divide the batch among them, or with --tree-ranks (methods
    hbll and hbll-paper) the nodes of every level, or both. The result does not depend on their number, and a run can go
    on with another one. docs/parallel.md tells what to expect.

    \b
    Examples:
      hbll train
      hbll train --method bp --blocks 3 --budget 90 --out runs/bp3
      hbll train --config training/configs/mlp.toml --out runs/mlp
      hbll train --resume --out runs/mlp
      torchrun --nproc-per-node 2 -m hbll train --method hbll --tree-ranks 2
      hbll train --set model.width=96 --set train.lr=2e-3 --dry-run
    """
    flags = {"method": method, "blocks": blocks, "hbll_share": hbll_share, "seed": seed, "budget": budget}
    given: dict[str, object] = {f"train.{key}": value for key, value in flags.items() if value is not None}
    torch.set_num_threads(threads)
    try:
        goes_on = resume and (out / CONFIG_FILE).exists()
        with interruptible(f"stopped before the first step: {out} is as it was, and the same command begins again"):
            if goes_on and config is None:
                run = change_config(load_run_config(out), given | settings, str(out / CONFIG_FILE))
            else:
                run = load_config(config, given | settings)
            if download:
                download_with_bar(run.data)
            data = load_data(run.data)
            family = build_family(run.model, run.train.seed, data.spec, factory)
        if dry_run:
            _describe(run, family, data)
            return
        with join(device, tree_ranks) as team:
            if resume and not goes_on and team.leads:
                console.print(f"{out} holds no run: starting one")
            if data.left_out and team.leads:
                console.print(f"{data.spec.description}: left out are {data.left_out}", markup=False, highlight=False)
            family = train_with_bar(run, out, data, family=family, resume=resume, team=team)
        if team.leads:
            with interruptible(
                f"stopped in the report: the run in {out} has ended, and the same command plus --resume reports on it"
            ):
                plot_history(History.read(out / LOG_FILE, up_to_step=2**62).rows, out / "accuracy_over_training.png")
                report(run, family, data, out)
    except Interrupted as exc:
        _stop(exc)
    except OSError as exc:
        raise click.ClickException(
            f"cannot write {exc.filename or out}: {exc.strerror or exc}. What was written before is intact: once that "
            "is fixed, continue with --resume"
        ) from exc
    except (ConfigError, CheckpointError, DataError, ShapeError, TeamError, TrainingDiverged, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc


@click.command(epilog=_METHODS)
@_config
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/compare"), show_default=True)
@click.option(
    "--methods", default=",".join(METHODS), callback=_method_names, help="With commas between them.  [default: all]"
)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers, help="With commas between them.")
@click.option(
    "--rates", default="", callback=_rates, help="Learning rates to choose from for every method, with commas between them."
)
@click.option(
    "--tuning-seeds", default="100", show_default=True, callback=_numbers, help="Of the runs that decide about --rates."
)
@_budget
@_set
@_threads
def compare(
    config: Path | None,
    out: Path,
    methods: tuple[MethodName, ...],
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    tuning_seeds: tuple[int, ...],
    budget: float | None,
    settings: dict[str, object],
    threads: int,
) -> None:
    """Train several methods over several seeds, at equal work and at equal epochs, and report accuracy over blocks.

    Every method but bp trains one family: for all of --budget, and for as many epochs as separate networks of 1..D and of
    all blocks get when they share --budget. These networks are what bp means here; they are also trained for as many
    steps as the first of the other methods. With --rates, every method and every separate network first gets the rate
    that is best on validation data at the seeds --tuning-seeds, which the comparison itself should not use.

    The folder --out gets comparison.md, comparison.csv, comparison.png, and the runs. A run that is finished is not
    repeated and one that was killed goes on: give the same command again. Processes with different --seeds can share
    an --out; a last call with all seeds then reports them together.

    \b
    Examples:
      hbll compare --config training/configs/digits.toml
      hbll compare --config training/configs/resmlp.toml --rates 2e-3,4e-3,8e-3
      hbll compare --methods exits,bp --seeds 0 --budget 13 --out runs/smoke
    """
    torch.set_num_threads(threads)
    given: dict[str, object] = {} if budget is None else {"train.budget": budget}
    try:
        base = load_config(config, given | settings)
        data = load_data(base.data)
        tuning = comparison.plan_tuning(base, methods, tuning_seeds, rates)
        planned = comparison.plan(base, methods, seeds, len(data.train))  # what cannot be is told before hours of tuning
        comparison.require_unclaimed(tuning, out)
        comparison.require_unclaimed(planned, out, rates_known=not tuning)
        tuned = _run_with_bar("tuning", tuning, out, data) if tuning else []
        jobs = comparison.plan(base, methods, seeds, len(data.train), comparison.choose_rates(base, tuned))
        comparison.require_unclaimed(jobs, out)
        found = tuned + _run_with_bar("comparing", jobs, out, data)
        records = [record for _, of_run in found for record in of_run]
        sizes = comparison.separate_blocks(algebra.Tree(base.model.hierarchy_depth))
        text = write_report(base, sizes, seeds, records, out)
    except Interrupted as exc:
        _stop(exc)
    except (ConfigError, CheckpointError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(text)
    console.print(f"wrote comparison.md, comparison.csv and comparison.png in {out}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where files go.  [default: RUN]")
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    default=MIN_CONFIDENCE,
    show_default=True,
    help="Of the climb that tree.png shows.",
)
@weights_option
@factory_option
def evaluate(run: Path, out: Path | None, min_confidence: float, weights: Weights | None, factory: Factory | None) -> None:
    """Measure every path of the trained family in RUN on its validation and test data.

    Prints accuracy, loss, temperature, calibration error, agreement with the reference path and FLOPs, and of the
    reference path and the ladder balanced accuracy and the recall of each class (of the ten worst). Writes
    metrics.json, classes.csv (all classes), accuracy.png (over depth and FLOPs), reliability.png and tree.png (how many
    test inputs run each hop when they climb until --min-confidence). Temperatures, and what is best, are chosen on
    validation data.
    """
    try:
        config, family, _ = load_family(run, factory, weights)
        data = load_data_of(run, config.data)
    except (CheckpointError, ConfigError, DataError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    target = out or run
    target.mkdir(parents=True, exist_ok=True)
    report(config, family, data, target, min_confidence)


def _run_with_bar(
    what: str, jobs: list[comparison.Job], out: Path, data: Dataset
) -> list[tuple[comparison.Job, list[Record]]]:
    """All runs and what they found; one that diverges is named and left out."""
    work = sum(job.config.train.budget for job in jobs) * len(data.train)
    console.print(f"{what}: {len(jobs)} runs, {work / 1e6:.1f} million block evaluations")
    finished: list[tuple[comparison.Job, list[Record]]] = []
    with Progress(*progress_columns("{task.description}"), console=console, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=work)
        done = 0.0
        for index, job in enumerate(jobs):
            of_run = job.config.train.budget * len(data.train)
            bar.update(task, description=f"{index + 1}/{len(jobs)} {job.name}")

            at = ""

            def on_step(report: Report, done: float = done, of_run: float = of_run) -> None:
                nonlocal at
                at = f", at step {report.step} ({report.share:.0%})"
                bar.update(task, completed=done + of_run * report.share)

            try:
                found = comparison.run(job, out, data, on_step)
                finished.append((job, found))
                reference = max(found, key=lambda record: record.validation_accuracy)
                console.print(f"{job.name}: {100 * reference.test_accuracy:.1f} % on path {reference.path}")
            except TrainingDiverged as exc:
                console.print(f"{job.name}: [red]left out:[/red] {exc}")
            except KeyboardInterrupt as exc:
                raise Interrupted(
                    f"stopped in run {index + 1} of {len(jobs)}, {job.name}{at}: the same command goes on from the last "
                    "checkpoint"
                ) from exc
            done += of_run
            bar.update(task, completed=done)
    return finished


def _stop(exc: Interrupted) -> NoReturn:
    """End as shells expect it after Ctrl-C, with what goes on."""
    click.echo(str(exc), err=True)
    raise SystemExit(128 + signal.SIGINT)


def _describe(run: RunConfig, family: Family, data: Dataset) -> None:
    """Print what `hbll train` would do: the configuration as TOML, the data, the model's size, the work."""
    rows = len(data.train)
    tree, method = family.tree, METHODS[run.train.method]
    embed, blocks, head = (sum(p.numel() for p in part.parameters()) for part in (family.embed, family.blocks, family.head))
    heads = "the head" if family.shares_head else "the heads"
    steps = steps_of(run, tree, rows)
    of_a_row = method.evaluations(run.train, tree)
    paths = method.paths(run.train, tree) if method.paths else None
    click.echo(dump_config(run))
    sizes = ", ".join(f"{len(getattr(data, name)):,} {name}" for name in Splits._fields)
    click.echo(
        f"# data: {data.spec.description}; {sizes}; rows of {list(data.spec.input_shape)}, {len(data.spec.labels)} classes"
    )
    if data.left_out:
        click.echo(f"# left out: {data.left_out}")
    click.echo(f"# method: {method.summary}")
    click.echo(f"# paths trained: {len(paths) if paths else tree.count_paths()} of {tree.count_paths()}")
    click.echo(
        f"# parameters: {embed + blocks + head:,}, which is {embed:,} of the embedding, {len(tree.nodes)} x "
        f"{blocks // len(tree.nodes):,} of the blocks, {head:,} of {heads}"
    )
    click.echo(
        f"# work: {run.train.budget * rows:,.0f} block evaluations, {of_a_row:.4g} a row on average; "
        f"about {steps:,} steps, {steps * run.train.batch / rows:.1f} epochs"
    )
