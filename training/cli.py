"""`hbll train` and `hbll evaluate`, and the options that they share with other commands."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path
from typing import NoReturn

import click
import torch

from training.assessment_report import MIN_CONFIDENCE, report
from training.checkpoint import CONFIG_FILE, CheckpointError, Weights, load_family, load_run_config
from training.config import ConfigError, MethodName, RunConfig, change_config, dump_config, load_config, parse_override
from training.custom import import_factory, import_method
from training.dataset import DataError, Dataset
from training.distributed import TeamError, join
from training.methods import METHODS, method_of, steps_of
from training.model import Factory, Family, build_family
from training.plots import plot_history
from training.progress import Interrupted, console, download_with_bar, interruptible, train_with_bar
from training.shapes import ShapeError
from training.sources import load_data, load_data_of
from training.splits import Splits
from training.trainer import LOG_FILE, History, TrainingDiverged

METHODS_HELP = "\b\nMethods:\n" + "\n".join(
    textwrap.fill(method.summary, 76, initial_indent=f"  {name:12} ", subsequent_indent=" " * 15)
    for name, method in METHODS.items()
)


def _overrides(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, object]:
    try:
        return dict(map(parse_override, values))
    except ConfigError as exc:
        raise click.BadParameter(str(exc)) from exc


def find_method(name: str) -> MethodName:
    """`name`, known as a method: the user's own is imported.

    Raises:
        BadParameter: there is none of this name.
    """
    try:
        if ":" in name:
            import_method(name)
    except ConfigError as exc:
        raise click.BadParameter(str(exc)) from exc
    if name not in METHODS:
        raise click.BadParameter(f"there is no method {name}; there are {', '.join(METHODS)}, and MODULE:NAME of yours")
    return name


def require_method_of(run: Path, given: MethodName | None) -> None:
    """See that `--method` names the method of the run that is read, if any.

    Raises:
        ConfigError: it names another.
        CheckpointError: the folder holds no run.
    """
    if given is not None and given != (own := load_run_config(run).train.method):
        raise ConfigError(f"{run} was trained by method {own}, not by {given}: give --method {own}, or another run")


def _method(_context: click.Context, _option: click.Parameter, name: str | None) -> MethodName | None:
    return None if name is None else find_method(name)


config_option = click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file; defaults: digits."
)
budget_option = click.option("--budget", type=float, help="Block evaluations per training image; overrides train.budget.")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    callback=_overrides,
    metavar="KEY=VALUE",
    help="Overrides any key of the configuration, like train.lr=1e-3. Can be repeated.",
)
threads_option = click.option(
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


method_option = click.option(
    "--method",
    callback=_method,
    metavar="MODULE:NAME",
    help="Runs this code of yours, for a run of a method of your own.",
)


weights_option = click.option(
    "--weights",
    type=click.Choice(["final", "best"]),
    help="Of the end of the run, or of its best validation.  [default: final; best with train.patience]",
)


@click.command(epilog=METHODS_HELP)
@config_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/digits"), show_default=True)
@click.option(
    "--method", callback=_method, metavar="NAME", help="Overrides train.method; MODULE:NAME runs a method of yours."
)
@click.option("--blocks", type=int, help="With bp or cffm: blocks of the one network that is trained.")
@click.option("--hbll-share", type=float, help="With hbll+chains: share of the budget that HBLL steps take, 0..1.")
@click.option("--seed", type=int, help="Overrides train.seed.")
@budget_option
@set_option
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
@threads_option
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
                require_method_of(out, method)
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
        stop(exc)
    except OSError as exc:
        cannot_write(exc, out, ". What was written before is intact: once that is fixed, continue with --resume")
    except (ConfigError, CheckpointError, DataError, ShapeError, TeamError, TrainingDiverged, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc


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
@method_option
def evaluate(
    run: Path,
    out: Path | None,
    min_confidence: float,
    weights: Weights | None,
    factory: Factory | None,
    method: MethodName | None,
) -> None:
    """Measure every path of the trained family in RUN on its validation and test data.

    Prints accuracy, loss, temperature, calibration error, agreement with the reference path and FLOPs, and of the
    reference path and the ladder balanced accuracy and the recall of each class (of the ten worst). Writes
    metrics.json, classes.csv (all classes), accuracy.png (over depth and FLOPs), reliability.png and tree.png (how many
    test inputs run each hop when they climb until --min-confidence). Temperatures, and what is best, are chosen on
    validation data.
    """
    target = out or run
    try:
        with interruptible(f"stopped: nothing of the run in {run} is lost, and the same command measures it again"):
            require_method_of(run, method)
            config, family, _ = load_family(run, factory, weights)
            method_of(config.train)  # it says which paths are trained
            data = load_data_of(run, config.data)
            target.mkdir(parents=True, exist_ok=True)
            report(config, family, data, target, min_confidence)
    except Interrupted as exc:
        stop(exc)
    except OSError as exc:
        cannot_write(exc, target)
    except (CheckpointError, ConfigError, DataError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc


def stop(exc: Interrupted) -> NoReturn:
    """End as shells expect it after Ctrl-C, with what goes on."""
    click.echo(str(exc), err=True)
    raise SystemExit(128 + signal.SIGINT)


def cannot_write(exc: OSError, folder: Path, kept: str = "") -> NoReturn:
    """End with what the system says of a file, or of `folder`, and with what is kept.

    Raises:
        ClickException: with that.
        BrokenPipeError: nobody reads what is printed any more, as after `| head`; click ends with that.
    """
    if isinstance(exc, BrokenPipeError):
        raise exc
    raise click.ClickException(f"cannot write {exc.filename or folder}: {exc.strerror or exc}{kept}") from exc


def _describe(run: RunConfig, family: Family, data: Dataset) -> None:
    """Print what `hbll train` would do: the configuration as TOML, the data, the model's size, the work."""
    rows = len(data.train)
    tree, method = family.tree, method_of(run.train)
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
