"""`hbll serve` and `hbll inspect`."""

from __future__ import annotations

import errno
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from uvicorn.config import STARTUP_FAILURE

from family.manifest import WEIGHTS_FILE, BundleError, Manifest, check_files, load_manifest
from family.tree import format_path
from service.app import create_app, drain_rpc, end_soon
from service.flags import others, settings_flags
from service.keyring import KeysError
from service.listener import BadCertificate, Server, server_config
from service.logs import configure_logs
from service.memory import PARAMETER_BYTES
from service.oip.rpc.port import GrpcError
from service.sources import WrongSettings, load_settings

console = Console()

_SWITCH_S = 0.0001
"""How long the event loop may go on while the inference thread waits for Python's lock, which it does before and after
every run. Python's own 5 ms are several runs long."""


@click.command(
    epilog=f"Every setting is also a variable, HBLL_ and its name in capitals, and a key of the file. Without a flag are "
    f"{others()}."
)
@click.argument("models", type=click.Path(path_type=Path), required=False)
@settings_flags
@click.option("--show-config", is_flag=True, help="Print all settings as a file of them, with where each is from, and end.")
def serve(show_config: bool, **flags: Any) -> None:
    """Serve the model repository MODELS, a folder of MODEL/VERSION/ bundles (default: models).

    Of each model the highest version is served (see HBLL_VERSIONS); versions that come or go later are followed without
    a gap. Settings are flags, HBLL_* variables and keys of a TOML file, in this order; docs/settings.md lists them.

    \b
    Examples:
      hbll serve models --port 8000
      HBLL_MIN_DEPTH=2 hbll serve --config hbll.toml --show-config
      curl localhost:8000/v1/models
    """
    try:
        sourced = load_settings({key: value for key, value in flags.items() if value is not None})
        settings = sourced.settings
        if show_config:
            click.echo(sourced.as_toml(), nl=False)
            return
        _require_free(settings.host, settings.port)
        configure_logs(settings.log_format)
        app = create_app(settings)
        server = Server(server_config(app, settings), partial(drain_rpc, app), partial(end_soon, app))
    except WrongSettings as exc:
        raise click.ClickException(f"wrong setting: {exc}") from exc
    except (BundleError, GrpcError, KeysError, BadCertificate) as exc:
        raise click.ClickException(str(exc)) from exc
    # uvicorn drains on SIGTERM and then raises it once more, for whoever handled it before: a normal end has status 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.setswitchinterval(_SWITCH_S)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _require_free(host: str, port: int) -> None:
    """Say that the port cannot be opened before models are loaded and warmed up. uvicorn tries after that."""
    with suppress(socket.gaierror):  # it says that itself
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = places[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(address)
            except OSError as exc:
                taken = ": stop what listens there, or choose another by --port" if exc.errno == errno.EADDRINUSE else ""
                raise click.ClickException(f"port {port} of {host} cannot be opened, {exc.strerror}{taken}") from exc


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
        "val., test: accuracy, %. agree: with the reference path (ref.) on validation data, %. ECE: expected calibration "
        "error on test data, %. front: on the Pareto front; best: of its depth."
    )
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
    """The offered paths of a bundle as a table that fits 80 columns at hierarchy depth 3; longer paths are folded."""
    table = Table(
        title=f"{title}: {manifest.name}, hierarchy depth {manifest.hierarchy_depth}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("path", overflow="fold", no_wrap=manifest.hierarchy_depth <= 3)
    for column in ("depth", "val.", "test", "agree", "ECE", "MFLOP", "parameters", "MB", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    front, best = set(manifest.front), set(manifest.best_by_depth.values())
    for path, entry in manifest.offered.items():
        notes = {"ref.": path == manifest.reference, "front": path in front, "best": path in best}
        table.add_row(
            format_path(path),
            str(len(path)),
            f"{100 * entry.validation.accuracy:.1f}",
            f"{100 * entry.test.accuracy:.1f}",
            f"{100 * entry.validation.agreement:.1f}",
            f"{100 * entry.test.calibration_error:.1f}",
            f"{entry.flops / 1e6:.3g}",
            f"{entry.parameters:,}",
            f"{PARAMETER_BYTES * entry.parameters / 1e6:.2f}",
            next((note for note, holds in notes.items() if holds), ""),
        )
    return table
