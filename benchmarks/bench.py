"""`hbll bench`: policies compared on real servers, in twelve named cells, under an open-loop load."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cells import LIVE, LONG, Cell
from benchmarks.live import (
    DEFAULT_MODELS,
    Load,
    Measured,
    Server,
    capacity_of,
    only_bundle,
    serve_all,
    shallowest_latency_s,
)
from benchmarks.outcomes import digits_of
from benchmarks.plots import draw_burst
from benchmarks.records import write_csv
from benchmarks.simulate import split_names
from family.manifest import BundleError, Manifest
from family.tree import format_path
from service.policy import DEFAULT_POLICY, check_policy_name
from training.checkpoint import write_atomically

console = Console()


@click.command("bench")
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False), default=DEFAULT_MODELS)
@click.option("--policies", help="Comma-separated, ours first.  [default: ladder-edf, slackfit, max-batch, two static]")
@click.option("--cells", type=click.IntRange(1, len(LIVE)), multiple=True, help="Only these of the twelve, by number.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--requests", type=click.IntRange(min=100), default=10_000, show_default=True, help="Of one replay.")
@click.option("--tries", type=click.IntRange(min=1), default=3, show_default=True, help="Of a replay that is void.")
@click.option("--capacity", type=click.FloatRange(min=1), help="C, in requests/s.  [default: what this machine can do]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for bench.csv, bench.json, a plot.")
def main(
    models: Path,
    policies: str | None,
    cells: tuple[int, ...],
    seeds: int,
    requests: int,
    tries: int,
    capacity: float | None,
    out: Path | None,
) -> None:
    """Compare policies on real servers of the one model in the folder MODELS, over HTTP.

    One server process per policy, each replay on one of them, the policies in turn. A replay in which the client sent
    over 1 % of its requests more than 1 ms late is void and repeated. Make the default model with `make bench-family`.
    Wants a quiet machine: nothing else should run beside it. What was measured is kept if it is stopped.
    """
    try:
        _, manifest = only_bundle(models)
        names = split_names(policies) if policies else _default_policies(manifest)
        for name in names:
            check_policy_name(name)
        load = Load(digits_of(manifest))
    except (BundleError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    shallowest = f"aimd({format_path(manifest.front[0])})"
    chosen = [LIVE[number - 1] for number in cells] or list(LIVE)
    with serve_all(models, list(dict.fromkeys((*names, shallowest)))) as servers:
        latency_s = shallowest_latency_s(load, servers[shallowest], format_path(manifest.front[0]))
        console.print(
            f"shallowest latency L = {1000 * latency_s:.2f} ms, the way there and back {1000 * load.transport_s:.2f}"
        )
        capacity = capacity or capacity_of(load, servers[shallowest], LONG * latency_s)
        console.print(f"capacity C = {capacity:.0f} requests/s")
        runs = [(cell, seed, name) for cell in chosen for seed in range(seeds) for name in _rotated(names, seed)]
        about = {
            "capacity": capacity,
            "requests": requests,
            "shallowest_latency_ms": 1000 * latency_s,
            "transport_ms": 1000 * load.transport_s,
            "cpus": os.cpu_count(),
            "client_first_in_line": load.first_in_line,
        }
        measured: list[Measured] = []
        pauses: dict[str, str] = {}
        try:
            for cell, seed, name in track(runs, "replaying", console=console):
                played = _play(load, servers[name], cell, seed, (requests, tries), capacity, latency_s)
                pauses[name] = _gc_pause_s(servers[name])
                measured.append(played)
                if out is not None:
                    _write(out, measured, about | {"gc_pauses": pauses})
        except KeyboardInterrupt:  # which ends the servers, too
            console.print(f"stopped after {len(measured)} of {len(runs)} replays")
    if measured:
        console.print(_table(measured, names))
    void = [each for each in measured if each.void]
    console.print(f"{sum(len(each.depth) for each in measured):,} requests, {len(void)} of {len(measured)} replays void")
    statuses = Counter(status for each in measured for status in each.status)
    console.print(f"outcomes: {dict(statuses)}; longest garbage-collection pauses: {pauses}")
    if out is not None and measured:
        _write(out, measured, about | {"gc_pauses": pauses})
        bursty = [each for each in measured if each.policy == DEFAULT_POLICY and "CV² 8" in each.cell]
        if bursty:
            draw_burst(out / "burst.png", bursty[-1], bursty[-1].scheduled_s[-1] / 120)
        console.print(f"wrote {out}")
    if len(measured) < len(runs):
        raise SystemExit(130)


def _default_policies(manifest: Manifest) -> list[str]:
    return [DEFAULT_POLICY, "slackfit", "max-batch", *(f"aimd({format_path(path)})" for path in manifest.climb[:2])]


def _rotated(names: Sequence[str], by: int) -> list[str]:
    """So that no policy is always the first after a pause."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def _play(
    load: Load, server: Server, cell: Cell, seed: int, size: tuple[int, int], capacity: float, latency_s: float
) -> Measured:
    requests, tries = size
    arrivals = cell.arrivals(capacity, requests, seed)
    for _ in range(tries):
        measured = load.play(server, arrivals, cell.deadline * latency_s, cell.name, seed)
        if not measured.void:
            break
    return measured


def _table(measured: Sequence[Measured], names: Sequence[str]) -> Table:
    table = Table(title="correct and in time / in time, % of all arrivals; in brackets where every replay was void")
    table.add_column("cell")
    for name in names:
        table.add_column(name, justify="right")
    for cell in dict.fromkeys(each.cell for each in measured):
        row = []
        for name in names:
            played = [each for each in measured if each.cell == cell and each.policy == name]
            if not played:  # stopped before
                row.append("")
                continue
            here = [each for each in played if not each.void]
            goodput, attainment = (
                np.mean([getattr(e, what) for e in here or played]) for what in ("goodput", "attainment")
            )
            text = f"{100 * goodput:.1f} / {100 * attainment:.1f}"
            row.append(text if here else f"({text})")
        table.add_row(cell, *row)
    return table


def _gc_pause_s(server: Server) -> str:
    """The bucket of the longest pause by garbage collection since the server was ready."""
    text = httpx.get(f"http://{server.host}:{server.port}/metrics").text
    buckets = [line for line in text.splitlines() if line.startswith("hbll_gc_pause_seconds_bucket")]
    counts = [(line.split('le="')[1].split('"')[0], float(line.rsplit(" ", 1)[1])) for line in buckets]
    total = counts[-1][1]
    return "none" if total == 0 else f"<= {next(edge for edge, count in counts if count == total)} s"


def _write(out: Path, measured: Sequence[Measured], about: dict[str, object]) -> None:
    """What is there so far: after each replay, as a bench that is stopped should not lose those before."""
    out.mkdir(parents=True, exist_ok=True)
    header = ["cell", "policy", "seed", "requests", "void", "goodput", "attainment", "depth", "p50_ms", "p95_ms", "p99_ms"]
    rows = []
    for each in measured:
        answered = each.latency_s[each.depth > 0]
        latencies = np.percentile(1000 * answered, (50, 95, 99)) if len(answered) else (np.nan,) * 3
        shares = (each.goodput, each.attainment, each.mean_depth, *latencies)
        rows.append([each.cell, each.policy, each.seed, len(each.depth), each.void, *(f"{share:.5f}" for share in shares)])
    write_csv(out / "bench.csv", header, rows)
    write_atomically(out / "bench.json", (json.dumps(about, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
