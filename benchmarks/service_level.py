"""`hbll load`: a load of one's own on a server that runs already, to see at which rates its service level holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode, urlsplit

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.load import Outcome, Request, run_replay
from benchmarks.load import lateness as late_share
from benchmarks.priority import first_in_line
from benchmarks.traces import Arrivals, bursts
from hbll.asked import asking, only_model, read_files
from hbll.client import DEFAULT_URL, Client, HbllError, PredictOptions, Unavailable
from hbll.client.requests import Request as Ask
from hbll.client.requests import content_of, predict_request
from hbll.table import TableError

console = Console(markup=False)

_ALONE, _GAP_S = 50, 0.02
"""Requests that are sent one after another, before the load, to learn what the way there and back takes."""

_VOID = 0.01


def _rates(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        rates = [float(rate) for rate in value.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= 100_000 for rate in rates):
        raise click.BadParameter(f"expected numbers above 0 with commas between them, like 50,100,200, got {value!r}")
    return rates


def _plain(_: click.Context, __: click.Parameter, value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "http" or not parts.hostname:
        raise click.BadParameter(f"expected http://HOST:PORT, got {value!r}")
    return value


@click.command("load")
@asking
@click.option("--rates", required=True, callback=_rates, help="Requests a second, with commas between them.")
@click.option("--budget-ms", type=click.FloatRange(min=0, min_open=True), required=True, help="From sending to answer.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="Of each rate.")
@click.option(
    "--cv2",
    type=click.FloatRange(0.01, 100),
    default=1.0,
    show_default=True,
    help="Squared coefficient of variation of the gaps: 1 for requests that know nothing of each other, 8 for bursts.",
)
@click.option("--at-least", type=click.FloatRange(0, 100), help="Exit with 1 if fewer are in time at any rate, in %.")
@click.option("--url", default=DEFAULT_URL, callback=_plain, show_default=True, help="Of the server; plain HTTP.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of when requests come, and which.")
def main(
    files: tuple[Path, ...],
    rates: list[float],
    budget_ms: float,
    seconds: float,
    cv2: float,
    at_least: float | None,
    url: str,
    model: str | None,
    version: int | None,
    drop: tuple[str, ...],
    depth: int | Literal["best", "full"] | None,  # or other words, which the server refuses
    path: str | None,
    min_confidence: float | None,
    max_risk: float | None,
    api_key: str | None,
    seed: int,
) -> None:
    """Load a running server with requests about FILES, images or tables as for `hbll predict`: who is answered in time?

    Requests of one row each are sent at random times, whatever has become of those before them, as many clients would;
    their latency counts from these times. The server is asked for answers a little earlier than --budget-ms, by what the
    way there and back takes. Run it on another machine than the server, or it takes from the server what it uses itself.

    \b
    Examples:
      hbll load digit.png --rates 100,200,400 --budget-ms 20
      hbll load parts.csv --drop state --rates 300 --budget-ms 50 --at-least 99
    """
    options: PredictOptions = {
        "version": version,
        "depth": depth,
        "path": path,
        "min_confidence": min_confidence,
        "max_risk": max_risk,
    }
    try:
        with Client(url, api_key=api_key) as client:
            name = model or only_model(client)
            images, tables = read_files(client, name, version, files, drop)
        rows = [row.content for row in (*images, *(row for table in tables for row in table))]
        load = _Load(url, api_key, [predict_request(name, [row], options) for row in rows], seed)
        way_s = load.way_s()
        asked_ms = max(budget_ms - 1000 * way_s, 0.1)
        table, shares, lateness = _empty(name, budget_ms), [], 0.0
        for rate in track(rates, "loading", console=Console(stderr=True), transient=True):
            outcomes = load.play(bursts(rate, cv2, seconds, seed), asked_ms)
            if not outcomes:
                raise click.ClickException(f"no request came within {seconds:g} s at {rate:g}/s: choose more --seconds")
            table.add_row(f"{rate:g}", *_describe(outcomes, budget_ms / 1000))
            shares.append(in_time(outcomes, budget_ms / 1000))
            lateness = max(lateness, late_share(outcomes))
    except (HbllError, TableError) as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        raise click.ClickException(f"{url}: {exc}") from exc
    console.print(table)
    console.print(f"The way there and back takes {1000 * way_s:.2f} ms, so the server was asked for {asked_ms:.2f} ms.")
    if lateness > _VOID:
        console.print("Where over 1 % were sent late, the row says as much about this client.")
    if at_least is not None and min(shares) < at_least / 100:
        raise click.exceptions.Exit(1)


class _Load:
    """Requests to the server at `url`, each of which asks one of these."""

    def __init__(self, url: str, api_key: str | None, asks: Sequence[Ask], seed: int) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._prefix = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._asks = asks
        self._seed = seed

    def play(self, arrivals: Arrivals, budget_ms: float | None) -> list[Outcome]:
        """Send one at each of these times."""
        requests = [self._built(ask.within(budget_ms)) for ask in self._asks]
        chosen = np.random.default_rng(self._seed).integers(len(requests), size=len(arrivals)).tolist()
        sent = [replace(requests[place], at_s=at_s) for place, at_s in zip(chosen, arrivals.tolist(), strict=True)]
        with first_in_line():
            return run_replay(self._host, self._port, sent)

    def way_s(self) -> float:
        """What the way to the server and back takes: of requests one by one, the 0.9 quantile of what it does not see.

        Raises:
            HbllError: there is no answer.
        """
        ways_s = []
        for outcome in self.play(_GAP_S * np.arange(_ALONE, dtype=np.float64), None):
            if outcome.status is None or outcome.body is None:
                raise Unavailable(f"no answer from {self._host}:{self._port}: {outcome.error}")
            ways_s.append(outcome.latency_s - content_of(outcome.status, outcome.body)["total_ms"] / 1000)
        return float(np.quantile(ways_s, 0.9))

    def _built(self, ask: Ask) -> Request:
        query = f"?{urlencode(ask.query)}" if ask.query else ""
        headers = {**ask.headers, **self._headers}.items()
        encoded = tuple((name.encode(), value.encode()) for name, value in headers)
        return Request(0.0, ask.body or b"", f"{self._prefix}{ask.path}{query}".encode(), encoded)


def in_time(outcomes: Sequence[Outcome], budget_s: float) -> float:
    """Which share of all was answered within the budget."""
    return float(np.mean([outcome.ok and outcome.latency_s <= budget_s for outcome in outcomes]))


def _empty(model: str, budget_ms: float) -> Table:
    table = Table(title=f"{model}: answered within {budget_ms:g} ms, % of all requests")
    for column in ("requests/s", "in time", "late", "blocks", "p50 ms", "p99 ms", "sent late"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("not answered", overflow="fold")
    return table


def _describe(outcomes: Sequence[Outcome], budget_s: float) -> list[str]:
    """The cells of a rate, but for the rate; milliseconds and blocks are those of all that were answered."""
    answered = [outcome for outcome in outcomes if outcome.ok]
    latencies_ms = [1000 * outcome.latency_s for outcome in answered]
    depths = [json.loads(outcome.body or b"")["predictions"][0]["depth"] for outcome in answered]
    share = in_time(outcomes, budget_s)
    others = Counter(_why(outcome) for outcome in outcomes if not outcome.ok)
    return [
        f"{100 * share:.1f}",
        f"{100 * (len(answered) / len(outcomes) - share):.1f}",
        f"{np.mean(depths):.2f}" if depths else "-",
        *(f"{value:.1f}" if answered else "-" for value in np.percentile(latencies_ms or [0.0], (50, 99))),
        f"{100 * late_share(outcomes):.1f}",
        ", ".join(f"{why} {count}" for why, count in others.most_common()),
    ]


def _why(outcome: Outcome) -> str:
    """Why a request has no answer: the server's code for it, or what went wrong with the connection."""
    if outcome.status is None:
        return outcome.error or "no answer"
    try:
        return str(json.loads(outcome.body or b"")["code"])
    except (ValueError, TypeError, KeyError):
        return f"status {outcome.status}"


if __name__ == "__main__":
    main()
