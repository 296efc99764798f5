"""`hbll serve`, `hbll predict` and `hbll inspect`."""

from __future__ import annotations

import base64
import logging
import signal
from pathlib import Path
from typing import Any

import click
import httpx
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

DEFAULT_URL = "http://127.0.0.1:8000"


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
@click.argument("images", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Of the server.")
@click.option("--model", help="Name of the model.  [default: the only one served]")
@click.option("--depth", help="Blocks to run: a number, best or full.")
@click.option("--path", help="Nodes of a path, like 4-6-7.")
@click.option("--budget-ms", type=float, help="Latency budget in milliseconds.")
@click.option("--min-confidence", type=float, help="Go deeper until the answer is this confident, 0..1.")
@click.option("--max-risk", type=float, help="Go deeper until the answer is certified to this level, such as 0.05.")
@click.option("--timeout-s", type=float, default=10.0, show_default=True, help="How long to wait for the server.")
def predict(
    images: tuple[Path, ...],
    url: str,
    model: str | None,
    depth: str | None,
    path: str | None,
    budget_ms: float | None,
    min_confidence: float | None,
    max_risk: float | None,
    timeout_s: float,
) -> None:
    """Ask a running server what is on IMAGES (PNG, JPEG, WebP, BMP, GIF; light ink on dark for the digits).

    \b
    Examples:
      hbll predict digit.png
      hbll predict digit.png --budget-ms 5
      hbll predict a.png b.png --min-confidence 0.9
    """
    body: dict[str, object] = {"inputs": [{"image": base64.b64encode(file.read_bytes()).decode()} for file in images]}
    number = int(depth) if depth is not None and depth.isdecimal() else depth
    wishes = {"depth": number, "path": path, "latency_budget_ms": budget_ms, "min_confidence": min_confidence}
    wishes["max_risk"] = max_risk
    body |= {key: value for key, value in wishes.items() if value is not None}
    try:
        with httpx.Client(base_url=url, timeout=timeout_s) as client:
            answer = _answer(client.post(f"/v1/models/{model or _only_model(client)}/predict", json=body))
    except ValueError as exc:  # NaN, which JSON cannot carry
        raise click.ClickException(str(exc)) from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise click.ClickException(
            f"no answer from {url}: {exc}. Is a server running there? Start one with `hbll serve`"
        ) from exc
    table = Table(title=f"{answer['model']} version {answer['version']}")
    for column in ("image", "label", "confidence", "depth", "path", "stopped by"):
        table.add_column(column, justify="left" if column in ("image", "path", "stopped by") else "right")
    for file, row in zip(images, answer["predictions"], strict=True):
        cells = (row["label"], f"{row['confidence']:.3f}", str(row["depth"]), row["path"], row["stopped_by"])
        table.add_row(file.name, *cells)
    console.print(table)
    met = {True: "met", False: "missed", None: "none given"}[answer["deadline_met"]]
    console.print(
        f"queue {answer['queue_ms']} ms, compute {answer['compute_ms']} ms, total {answer['total_ms']} ms; deadline {met}"
    )


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


def _only_model(client: httpx.Client) -> str:
    names = [model["name"] for model in _answer(client.get("/v1/models"))["models"]]
    if len(names) != 1:
        raise click.ClickException(f"several models are served: add --model, one of {', '.join(names)}")
    return str(names[0])


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise click.ClickException(f"{response.url} answered {response.status_code} without JSON: is it an HBLL server?")
    if response.is_error:
        raise click.ClickException(f"the server answered {response.status_code}: {content.get('error', content)}")
    return content
