"""`hbll predict`: the client, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table

from hbll.asked import Asked, asking, only_model, read_files
from hbll.client import DEFAULT_URL, Answer, Client, HbllError, Prediction, PredictOptions, Rung
from hbll.table import TableError

console = Console(markup=False)  # labels and file names may have brackets

_ROWS_A_REQUEST = 64
_LIKELIEST = 3


@click.command()
@asking
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Of the server.")
@click.option("--budget-ms", type=float, help="Latency budget in milliseconds, of each request.")
@click.option("--probabilities", is_flag=True, help="Of every label; without --json those of the likeliest are shown.")
@click.option("--stream", is_flag=True, help="Show the answer of every rung as it comes.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each row, or with --stream each rung.")
@click.option("--timeout-s", type=float, default=10.0, show_default=True, help="How long to wait for the server.")
def predict(
    files: tuple[Path, ...],
    url: str,
    model: str | None,
    version: int | None,
    drop: tuple[str, ...],
    depth: int | Literal["best", "full"] | None,  # or other words, which the server refuses
    path: str | None,
    budget_ms: float | None,
    min_confidence: float | None,
    max_risk: float | None,
    probabilities: bool,
    stream: bool,
    as_json: bool,
    api_key: str | None,
    timeout_s: float,
) -> None:
    """Ask a running server about FILES: images (PNG, JPEG, WebP, BMP, GIF; light ink on dark for the digits), or tables
    (.csv with a header, .parquet) with the columns that the model was trained on, in any order.

    All images go in one request, the rows of tables in several, one after the other.

    \b
    Examples:
      hbll predict digit.png
      hbll predict a.png b.png --min-confidence 0.9 --stream
      hbll predict parts.csv --drop state --json | jq -r .label
    """
    options: PredictOptions = {
        "version": version,
        "depth": depth,
        "path": path,
        "latency_budget_ms": budget_ms,
        "min_confidence": min_confidence,
        "max_risk": max_risk,
        "probabilities": probabilities,
    }
    rows_answered: list[Asked] = []
    answers: list[Answer] = []
    try:
        with Client(url, api_key=api_key, timeout_s=timeout_s) as client:
            name = model or only_model(client)
            requests = _requests(*read_files(client, name, version, files, drop))  # before a budget begins
            for rows in requests:
                inputs = [row.content for row in rows]
                if stream:
                    answer = _follow(rows, client.stream(inputs, model=name, **options), as_json)
                else:
                    answer = client.predict(inputs, model=name, **options)
                    if as_json:
                        _print_rows(rows, answer)
                answers.append(answer)
                rows_answered += rows
    except (HbllError, TableError) as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        if answers and not as_json:  # those before an error, or an interrupt, too
            _show(rows_answered, answers)


def _requests(images: list[Asked], tables: Iterable[Sequence[Asked]]) -> list[Sequence[Asked]]:
    requests: list[Sequence[Asked]] = [images] if images else []
    for rows in tables:
        requests += [rows[first : first + _ROWS_A_REQUEST] for first in range(0, len(rows), _ROWS_A_REQUEST)]
    return requests


def _as_json(row: Asked, prediction: Prediction, **members: Any) -> str:
    number = {} if row.number is None else {"row": row.number}
    said = {name: value for name, value in asdict(prediction).items() if value is not None}
    return json.dumps({"file": str(row.file), **number, **said, **members})


def _follow(rows: Sequence[Asked], events: Iterable[Rung | Answer], as_json: bool) -> Answer:
    """Print rungs as they come, and return the answer at the end."""
    for event in events:
        if isinstance(event, Answer):
            return event
        row, found = rows[event.row], event.prediction
        if as_json:
            click.echo(_as_json(row, found, final=event.final, total_ms=event.total_ms))
        else:
            console.print(
                f"{row.name}: {found.label} with confidence {found.confidence:.3f} after {event.total_ms} ms, depth "
                f"{found.depth}, path {found.path}"
            )
    raise AssertionError("a stream ends with its answer, or an error")


def _print_rows(rows: Sequence[Asked], answer: Answer) -> None:
    about = {"model": answer.model, "version": answer.version, "deadline_met": answer.deadline_met}
    for row, found in zip(rows, answer.predictions, strict=True):
        click.echo(_as_json(row, found, **about))


def _show(rows: Sequence[Asked], answers: Sequence[Answer]) -> None:
    table = Table(title=f"{answers[0].model} version {answers[0].version}")
    for column in ("input", "label", "confidence", "depth", "path", "stopped by"):
        table.add_column(column, justify="left" if column in ("input", "path", "stopped by") else "right")
    predictions = [found for answer in answers for found in answer.predictions]
    if any(found.probabilities for found in predictions):
        table.add_column("likeliest")
    for row, found in zip(rows, predictions, strict=True):
        cells = [row.name, found.label, f"{found.confidence:.3f}", str(found.depth), found.path, found.stopped_by or ""]
        if found.probabilities:
            cells.append("\n".join(_likeliest(found.probabilities)))
        table.add_row(*cells)
    console.print(table)
    queue_ms, compute_ms, total_ms, here_ms = (
        round(sum(getattr(answer, name) for answer in answers), 3)
        for name in ("queue_ms", "compute_ms", "total_ms", "elapsed_ms")
    )
    several = f"{len(answers)} requests: " if len(answers) > 1 else ""
    console.print(
        f"{several}queue {queue_ms} ms, compute {compute_ms} ms, total {total_ms} ms, here {here_ms} ms; "
        f"deadline {_deadlines(answers)}"
    )


def _likeliest(probabilities: Mapping[str, float]) -> Iterator[str]:
    for label in sorted(probabilities, key=probabilities.__getitem__, reverse=True)[:_LIKELIEST]:
        yield f"{label} {probabilities[label]:.3f}"


def _deadlines(answers: Sequence[Answer]) -> str:
    met = [answer.deadline_met for answer in answers]
    if met[0] is None:
        return "none given"
    if all(met):
        return "met"
    return "missed" if len(met) == 1 else f"missed by {met.count(False)}"
