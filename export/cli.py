"""`hbll export` and `hbll verify`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from export.bundle import Exported, export_bundle
from export.verify import TOLERANCE, verify_bundle
from family.manifest import BundleError, check_files, load_manifest
from family.names import MODEL_NAME, VERSION, is_model_name, is_version
from family.tree import InvalidPath, format_path
from training.checkpoint import CheckpointError, Weights, load_family, load_origin
from training.cli import factory_option, method_option, require_method_of, weights_option
from training.config import ConfigError, MethodName
from training.dataset import DataError
from training.model import Factory
from training.sources import load_data_of

console = Console()


def _bar() -> Progress:
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--paths",
    default="default",
    help="ladder | pareto | all | a list like 4,4-6-7.  [default: all up to 32 paths, else Pareto front and ladder]",
)
@click.option("--replace", is_flag=True, help="Replace BUNDLE if it is one; no server takes that up while it runs.")
@weights_option
@factory_option
@method_option
def export(
    run: Path,
    bundle: Path,
    paths: str,
    replace: bool,
    weights: Weights | None,
    factory: Factory | None,
    method: MethodName | None,
) -> None:
    """Write the family trained in RUN as the folder BUNDLE.

    BUNDLE gets one ONNX graph per path, the gated graph that serves all of them, one file of weights and a manifest.
    In a model repository it is MODEL/VERSION, for example models/digits/1: no server takes other names. The folder
    appears only when every graph has been checked and compared with torch.

    \b
    Examples:
      hbll export runs/digits models/digits/1
      hbll export runs/digits models/digits/2 --paths ladder
    """
    _warn_of_names(bundle)  # while nothing is lost yet
    try:
        require_method_of(run, method)
        config, family, progress = load_family(run, factory, weights)
        data = load_data_of(run, config.data)
        with _bar() as bar:
            task = bar.add_task("scoring the paths", total=None)

            def report(step: str, total: int) -> None:
                bar.update(task, advance=1, total=total, description=step)

            exported = export_bundle(
                config, family, progress, load_origin(run), data, bundle, paths=paths, replace=replace, report=report
            )
    except (BundleError, CheckpointError, ConfigError, DataError, InvalidPath, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    _summary(exported, bundle)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The run's folder.")
@weights_option
@factory_option
def verify(bundle: Path, checkpoint: Path | None, weights: Weights | None, factory: Factory | None) -> None:
    """Check that BUNDLE is whole and that all forms of every path give the same logits.

    Files are compared with the manifest's digests, graphs are checked by onnx, and each path's own graph is compared
    with the gated graph (whole, and stopped and continued) at batch 1, 3 and 16; with --checkpoint also with torch.
    Exits with status 1 if anything differs.
    """
    try:
        manifest = load_manifest(bundle)
        check_files(bundle, manifest)
        family = load_family(checkpoint, factory, weights)[1] if checkpoint else None
        with _bar() as bar:
            task = bar.add_task("verifying", total=len(manifest.paths))
            differences = verify_bundle(
                bundle, manifest, family, lambda path: bar.update(task, advance=1, description=format_path(path))
            )
    except (BundleError, CheckpointError, ConfigError) as exc:
        raise click.ClickException(str(exc)) from exc
    table = Table(title=f"{bundle}: greatest difference of logits, at most {TOLERANCE:g} accepted")
    for column in ("path", "gated graph", "continued run", "torch"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for row in differences:
        in_torch = "not compared" if row.torch is None else f"{row.torch:.1e}"
        table.add_row(format_path(row.path), f"{row.gated:.1e}", f"{row.continued:.1e}", in_torch)
    console.print(table)
    console.print(f"{bundle} is whole: {len(manifest.files)} files, {len(differences)} paths agree in all forms")


def _warn_of_names(bundle: Path) -> None:
    """Who wants the graphs alone may call the folder anything."""
    folder = Path(os.path.normpath(bundle.absolute()))
    wrong = [] if is_model_name(folder.parent.name) else [f"{folder.parent.name!r} is no model's name, {MODEL_NAME}"]
    wrong += [] if is_version(folder.name) else [f"{folder.name!r} is no version, {VERSION}"]
    if wrong:
        click.echo(
            f"warning: no server will serve {bundle}: expected MODEL/VERSION, such as models/digits/1; "
            + ", and ".join(wrong),
            err=True,
        )


def _summary(exported: Exported, bundle: Path) -> None:
    manifest = exported.manifest
    worst = max(max(row.gated, row.continued, row.torch or 0.0) for row in exported.differences)
    reference = format_path(manifest.reference)
    console.print(f"wrote {bundle}: {len(manifest.paths)} paths, reference path {reference}, all forms within {worst:.1e}")
