"""`hbll serve` and `hbll inspect`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import click
import uvicorn
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table

from family.manifest import WEIGHTS_FILE, BundleError, Manifest, check_files, load_manifest
from family.tree import format_path
from service.app import create_app
from service.memory import PARAMETER_BYTES
from service.settings import Settings

console = Console()

_DRAIN_S = 10
"""How long a server that is told to end waits for its clients."""


@click.command()
@click.argument("models", type=click.Path(path_type=Path), required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of one inference.  [default: all cores but one]")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), help="Where models run.  [default: auto]")
def serve(models: Path | None, host: str, port: int, threads: int | None, device: str | None) -> None:
    """Serve the model repository MODELS, a folder of MODEL/VERSION/ bundles (default: models).

    Of each model the highest version is served (see HBLL_VERSIONS); versions that come or go later are followed without
    a gap. Every other setting comes from the environment:

    \b
      HBLL_POLICY, HBLL_MIN_DEPTH, HBLL_DEFAULT_LATENCY_BUDGET_MS, HBLL_AUDIT_RATE, HBLL_VERSIONS
          for all models; HBLL_PER_MODEL='{"digits": {"min_depth": 2}}' for single ones
      HBLL_MAX_BATCH, HBLL_MAX_QUEUE_ROWS, HBLL_MAX_REQUEST_ROWS
      HBLL_MAX_BODY_BYTES, HBLL_MAX_IMAGE_PIXELS
      HBLL_RESERVE_MS   kept back from every budget to send the answer
      HBLL_POLL_S       how often versions that have come or gone are looked for; 0: never
      HBLL_CACHE_DIR    where measured latencies are kept

    \b
    Examples:
      hbll serve models --port 8000
      curl localhost:8000/v1/models
    """
    given: dict[str, Any] = {"models": models, "threads": threads, "device": device}
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = Settings(**{key: value for key, value in given.items() if value is not None})
        app = create_app(settings)
    except ValidationError as exc:
        problems = "; ".join(
            ": ".join([*filter(None, [".".join(map(str, error["loc"]))]), error["msg"].removeprefix("Value error, ")])
            for error in exc.errors()
        )
        raise click.ClickException(f"wrong setting: {problems}") from exc
    except SettingsError as exc:  # no JSON where it should be
        raise click.ClickException(f"wrong setting: {exc}: {exc.__cause__}") from exc
    except BundleError as exc:
        raise click.ClickException(str(exc)) from exc
    # uvicorn drains on SIGTERM and then raises it once more, for whoever handled it before: a normal end has status 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=_DRAIN_S)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
def inspect(bundle: Path) -> None:
    """Show what is in the folder BUNDLE: its paths, their accuracy and cost, and where it comes from.

    Every file is compared with the manifest's digest first.
    """
    try:
        manifest = load_manifest(bundle)
        check_files(bundle, manifest)
    except BundleError as exc:
        raise click.ClickException(str(exc)) from exc
    console.print(path_table(manifest, str(bundle)))
    origin = manifest.provenance
    size = sum((bundle / name).stat().st_size for name in manifest.files)
    weights = (bundle / WEIGHTS_FILE).stat().st_size
    separate = PARAMETER_BYTES * sum(entry.parameters for entry in manifest.offered.values())
    console.print(
        f"MB: weights of each path by itself, {separate / 1e6:.2f} MB in sum; "
        f"all {len(manifest.offered)} paths share {weights / 1e6:.2f} MB"
    )
    if manifest.certificate is not None:
        levels = ", ".join(f"{level.epsilon:g} (exit at {level.threshold:g})" for level in manifest.certificate.levels)
        sequence = " > ".join(manifest.certificate.sequence)
        console.print(f"certified risk levels along {sequence}: {levels or 'none'}")
    console.print(
        f"{len(manifest.files)} files, {size / 1e6:.1f} MB, all as the manifest says; format {manifest.format_version}\n"
        f"trained on {origin.dataset} by {origin.method}, seed {origin.seed}: {origin.steps} steps, "
        f"{origin.block_evaluations} block evaluations; revision {origin.git_revision or 'unknown'}"
    )


def path_table(manifest: Manifest, title: str) -> Table:
    """The offered paths of a bundle as a table."""
    table = Table(title=f"{title}: {manifest.name}, hierarchy depth {manifest.hierarchy_depth}")
    shares = ("validation %", "test %", "agreement %", "ECE %")
    for column in ("path", "depth", *shares, "MFLOP", "parameters", "MB", ""):
        table.add_column(column, justify="left" if column in ("path", "") else "right")
    front, best = set(manifest.front), set(manifest.best_by_depth.values())
    for path, entry in manifest.offered.items():
        note = "Pareto" if path in front else "best of its depth" if path in best else ""
        table.add_row(
            format_path(path),
            str(len(path)),
            f"{100 * entry.validation.accuracy:.1f}",
            f"{100 * entry.test.accuracy:.1f}",
            f"{100 * entry.validation.agreement:.1f}",
            f"{100 * entry.test.calibration_error:.1f}",
            f"{entry.flops / 1e6:.2f}",
            f"{entry.parameters:,}",
            f"{PARAMETER_BYTES * entry.parameters / 1e6:.2f}",
            "reference" if path == manifest.reference else note,
        )
    return table
