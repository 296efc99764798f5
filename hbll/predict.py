"""`hbll predict`: the client, on the command line."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hbll.client import DEFAULT_URL, Answer, Client, HbllError, PredictOptions, Rung

console = Console(markup=False)  # labels and file names may have brackets


@click.command()
@click.argument("images", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Of the server.")
@click.option("--model", help="Name of the model.  [default: the only one served]")
@click.option("--version", type=click.IntRange(min=1), help="Of the model.  [default: the newest]")
@click.option("--depth", help="Blocks to run: a number, best or full.")
@click.option("--path", help="Nodes of a path, like 4-6-7.")
@click.option("--budget-ms", type=float, help="Latency budget in milliseconds.")
@click.option("--min-confidence", type=float, help="Go deeper until the answer is this confident, 0..1.")
@click.option("--max-risk", type=float, help="Go deeper until the answer is certified to this level, such as 0.05.")
@click.option("--stream", is_flag=True, help="Show the answer of every rung as it comes.")
@click.option(
    "--api-key",
    envvar="HBLL_CLIENT_API_KEY",
    show_envvar=True,
    help="Key for the server; other users of this machine can read a command line, and not the environment.",
)
@click.option("--timeout-s", type=float, default=10.0, show_default=True, help="How long to wait for the server.")
def predict(
    images: tuple[Path, ...],
    url: str,
    model: str | None,
    version: int | None,
    depth: str | None,
    path: str | None,
    budget_ms: float | None,
    min_confidence: float | None,
    max_risk: float | None,
    stream: bool,
    api_key: str | None,
    timeout_s: float,
) -> None:
    """Ask a running server what is on IMAGES (PNG, JPEG, WebP, BMP, GIF; light ink on dark for the digits).

    \b
    Examples:
      hbll predict digit.png
      hbll predict digit.png --budget-ms 5
      hbll predict a.png b.png --min-confidence 0.9 --stream
    """
    options: PredictOptions = {
        "version": version,
        "depth": int(depth) if depth is not None and depth.isdecimal() else depth,  # type: ignore[typeddict-item]
        "path": path,
        "latency_budget_ms": budget_ms,
        "min_confidence": min_confidence,
        "max_risk": max_risk,
    }
    files = [image.read_bytes() for image in images]  # before the budget begins, as all that only this command needs
    try:
        with Client(url, api_key=api_key, timeout_s=timeout_s) as client:
            name = model or _only_model(client)
            if not stream:
                _show(images, client.predict(files, model=name, **options))
                return
            for event in client.stream(files, model=name, **options):
                if isinstance(event, Rung):
                    _show_rung(images[event.row], event)
                else:
                    _show(images, event)
    except HbllError as exc:
        raise click.ClickException(str(exc)) from exc


def _only_model(client: Client) -> str:
    names = [model.name for model in client.models()]
    if not names:
        raise click.ClickException("no model is served there")
    if len(names) > 1:
        raise click.ClickException(f"several models are served: add --model, one of {', '.join(names)}")
    return names[0]


def _show_rung(image: Path, rung: Rung) -> None:
    row = rung.prediction
    console.print(
        f"{image.name}: {row.label} with confidence {row.confidence:.3f} after {rung.total_ms} ms, depth {row.depth}, "
        f"path {row.path}"
    )


def _show(images: tuple[Path, ...], answer: Answer) -> None:
    table = Table(title=f"{answer.model} version {answer.version}")
    for column in ("image", "label", "confidence", "depth", "path", "stopped by"):
        table.add_column(column, justify="left" if column in ("image", "path", "stopped by") else "right")
    for file, row in zip(images, answer.predictions, strict=True):
        table.add_row(file.name, row.label, f"{row.confidence:.3f}", str(row.depth), row.path, row.stopped_by)
    console.print(table)
    met = {True: "met", False: "missed", None: "none given"}[answer.deadline_met]
    console.print(
        f"queue {answer.queue_ms} ms, compute {answer.compute_ms} ms, total {answer.total_ms} ms, here {answer.elapsed_ms} "
        f"ms; deadline {met}"
    )
