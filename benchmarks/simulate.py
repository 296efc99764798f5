"""`hbll simulate`: policies compared in simulated time, on the measured latencies and recorded answers of a real bundle."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import traces
from benchmarks.bound import upper_bound, value_of_time
from benchmarks.cells import LIVE, LONG, MATRIX, Cell
from benchmarks.machine import Machine, kept_machine, measure_machine
from benchmarks.outcomes import digits_of, record
from benchmarks.plots import draw_loads
from benchmarks.records import write_csv
from benchmarks.simulation import Hardware, Outcomes, Report, simulate
from benchmarks.validation import compare_with
from family.manifest import BundleError, check_files, load_manifest
from family.tree import format_path
from service.policy import DEFAULT_POLICY, make_policy
from service.policy.state import Offer, Policy
from service.profile import LatencyProfile, Segment

console = Console()

DEFAULT_BUNDLE = Path("runs/bench-models/bench/1")
_RESERVE_S = 0.001
_ALIKE = 0.02  # shares in time


@dataclass(frozen=True, slots=True)
class World:
    """All that a simulation needs of a bundle and a machine; small enough to be sent to other processes."""

    offer: Offer
    machine: Machine
    outcomes: Outcomes
    hardware: Hardware
    value: tuple[traces.Arrivals, traces.Arrivals]  # of time: see `benchmarks.bound`

    def fresh(self, policy: str) -> tuple[Policy, Offer]:
        """A policy of one server, with a profile of its own that begins as the measured one."""
        profile = self.machine.profile(Segment(self.offer.front[0], embed=True))
        offer = Offer(self.offer.climb, self.offer.front, self.offer.accuracies, profile, self.offer.least_reserve_s)
        return make_policy(policy, offer), offer

    @property
    def shallowest_s(self) -> float:
        """Latency of the shallowest path at one client, end to end."""
        hardware, shallowest = self.hardware, Segment(self.offer.front[0], embed=True)
        inference_s = LatencyProfile(self.machine.parts).typical_s(shallowest, 1)
        around_s = hardware.wire_s + hardware.read_s + hardware.hop_s + hardware.decide_s + hardware.send_s
        return around_s + inference_s

    def play(self, arrivals_s: traces.Arrivals, budget_s: float, policy: str, *, servers: int, seed: int) -> Report:
        """One simulation."""
        return simulate(
            arrivals_s,
            budget_s,
            self.outcomes,
            lambda: self.fresh(policy),
            servers=servers,
            hardware=self.hardware,
            max_queue_rows=4096,
            seed=seed,
        )

    def capacity(self) -> float:
        """C of one server: the highest Poisson rate at which the shallowest path with AIMD batching answers 99 % within
        the longer deadline, to 2 %.

        Raises:
            ValueError: it does not at the lowest rate that is tried, where a server is busy an eighth of its time.
        """
        policy, budget_s = f"aimd({format_path(self.offer.front[0])})", LONG * self.shallowest_s
        low = high = 1 / self.shallowest_s / 8
        while self.play(traces.poisson(high, 20_000 / high, 7), budget_s, policy, servers=1, seed=7).attainment >= 0.99:
            low, high = high, 2 * high
        if low == high:
            raise ValueError(f"{policy} does not answer 99 % of {low:.0f} requests/s within {1000 * budget_s:.1f} ms")
        while high / low > 1.02:
            rate = (low * high) ** 0.5
            report = self.play(traces.poisson(rate, 20_000 / rate, 7), budget_s, policy, servers=1, seed=7)
            low, high = (rate, high) if report.attainment >= 0.99 else (low, rate)
        return low


def open_world(bundle: Path, hardware: Hardware, machine: Path | None = None) -> World:
    """A bundle on this machine, on one thread, or on the one that the file `machine` tells of (see `kept_machine`), and
    what it answers to the test digits.

    Raises:
        BundleError: it is damaged.
        ValueError: it was not trained on the digits; the file is of no use.
    """
    manifest = load_manifest(bundle)
    check_files(bundle, manifest)
    found = measure_machine(bundle, manifest) if machine is None else kept_machine(machine, bundle, manifest)
    profile = found.profile(Segment(manifest.front[0], embed=True))
    outcomes = record(bundle, manifest, digits_of(manifest))
    offer = Offer.of(manifest, profile, _RESERVE_S)
    return World(offer, found, outcomes, hardware, value_of_time(outcomes, profile))


@dataclass(frozen=True, slots=True)
class Job:
    """One policy in one cell with one seed."""

    cell: Cell
    policy: str
    seed: int
    servers: int
    requests: int
    capacity: float


@dataclass(frozen=True, slots=True)
class Played:
    """What came of it, as shares of all arrivals; `bound` (one server only) is the most that is possible."""

    job: Job
    requests: int
    goodput: float
    attainment: float
    accuracy: float
    depth: float
    bound: float


_world: World | None = None  # of a worker process


def _keep(world: World) -> None:
    global _world
    _world = world


def _play(job: Job) -> Played:
    assert _world is not None
    world, servers = _world, job.servers
    arrivals = job.cell.arrivals(job.capacity * servers, job.requests, job.seed)
    budget_s = job.cell.deadline * world.shallowest_s
    report = world.play(arrivals, budget_s, job.policy, servers=servers, seed=job.seed)
    lost = len(arrivals) - sum(report.counts.values())
    if lost:
        raise AssertionError(f"{lost} of {len(arrivals)} requests were lost: {job}")
    bound = math.nan
    if servers == 1 and job.policy == DEFAULT_POLICY:
        bound = upper_bound(arrivals, budget_s, *world.value)
    return Played(job, len(arrivals), report.goodput, report.attainment, report.accuracy, report.mean_depth, bound)


def play_all(world: World, jobs: Sequence[Job], workers: int) -> list[Played]:
    """All jobs, in order, with a progress bar."""
    with ProcessPoolExecutor(workers, initializer=_keep, initargs=(world,)) as pool:
        return list(track(pool.map(_play, jobs, chunksize=4), "simulating", total=len(jobs), console=console))


@click.command("simulate")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False), default=DEFAULT_BUNDLE)
@click.option("--policies", help="Comma-separated.  [default: all, static ones on the paths of the front]")
@click.option(
    "--profile",
    "machine",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of how fast the machine is; written if there is none.  [default: measure this machine]",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder --out of `hbll bench`: play its traces, and compare.",
)
@click.option("--live-cells", is_flag=True, help="Only the twelve cells that `hbll bench` measures.")
@click.option("--servers", type=click.IntRange(1, 1000), default=1, show_default=True, help="Behind two random choices.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--requests", type=click.IntRange(min=100), default=10_000, show_default=True, help="Of one trace.")
@click.option("--hop-us", default=100.0, show_default=True, help="To the inference thread and back.")
@click.option("--decide-us", default=400.0, show_default=True, help="For the event loop to hear of a run and decide.")
@click.option("--http-us", default=140.0, show_default=True, help="For it to read a request, and to send an answer.")
@click.option("--refuse-us", default=60.0, show_default=True, help="For it to refuse a request that waited too long.")
@click.option("--wire-us", default=750.0, show_default=True, help="To the server and back.")
@click.option("--contention", default=0.8, show_default=True, help="By what share all that takes longer beside a run.")
@click.option("--jitter", default=0.1, show_default=True, help="Standard deviation of the logarithm of a run's time.")
@click.option("--workers", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="Processes.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for simulation.csv and a plot.")
def main(
    bundle: Path,
    policies: str | None,
    machine: Path | None,
    against: Path | None,
    live_cells: bool,
    servers: int,
    seeds: int,
    requests: int,
    hop_us: float,
    decide_us: float,
    http_us: float,
    refuse_us: float,
    wire_us: float,
    contention: float,
    jitter: float,
    workers: int,
    out: Path | None,
) -> None:
    """Compare policies in simulated time, on measured latencies and recorded answers of BUNDLE.

    The policies are the server's own code. Arrivals, images and jitter depend on the seed alone, so all policies meet
    the same. Make the default bundle with `make bench-family`.

    \b
    Examples:
      hbll simulate --live-cells
      hbll simulate --policies ladder-edf,slackfit --servers 100 --seeds 1
      hbll simulate --against docs/bench
    """
    hardware = Hardware(
        jitter,
        hop_s=hop_us / 1e6,
        decide_s=decide_us / 1e6,
        read_s=http_us / 1e6,
        refuse_s=refuse_us / 1e6,
        send_s=http_us / 1e6,
        wire_s=wire_us / 1e6,
        contention=contention,
    )
    try:
        world = open_world(bundle, hardware, machine)
        if against is not None:
            _validate(world, against)
            return
        names = split_names(policies) if policies else default_policies(world.offer)
        for name in names:
            world.fresh(name)
        capacity = world.capacity()
    except (BundleError, OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    console.print(
        f"shallowest latency L = {1000 * world.shallowest_s:.2f} ms, capacity C = {capacity:.0f} requests/s a server"
    )
    cells = LIVE if live_cells else MATRIX
    jobs = [
        Job(cell, policy, seed, servers, requests, capacity) for cell in cells for policy in names for seed in range(seeds)
    ]
    start_s = time.perf_counter()
    played = play_all(world, jobs, workers)
    took_s = time.perf_counter() - start_s
    total = sum(each.requests for each in played)
    console.print(_table(played, names))
    console.print(f"{total:,} requests in {took_s:.1f} s: {total / took_s:,.0f} a second, none lost")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "simulation.csv", played)
        if not live_cells:
            draw_loads(out / "simulation.png", played)
        console.print(f"wrote {out}")


def _validate(world: World, against: Path) -> None:
    """Set the simulation beside what was measured on real servers, cell by cell."""
    table = Table(title="in time, % of all arrivals: measured / simulated")
    compared = list(track(compare_with(world.play, against), "simulating", console=console))
    names = list(dict.fromkeys(each.policy for each in compared))
    for column in ("cell", *names):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for cell in dict.fromkeys(each.cell for each in compared):
        row = []
        for name in names:
            here = [each for each in compared if (each.cell, each.policy) == (cell, name)]
            shares = (100 * float(np.mean([getattr(each, what) for each in here])) for what in ("measured", "simulated"))
            row.append(" / ".join(f"{share:.1f}" for share in shares))
        table.add_row(cell, *row)
    console.print(table)
    apart = 100 * np.array([each.simulated - each.measured for each in compared])
    console.print(
        f"{np.sum(abs(apart) > 100 * _ALIKE)} of {len(compared)} replays are more than {100 * _ALIKE:g} points apart, "
        f"{np.mean(abs(apart)):.1f} on average; simulated less measured: {np.mean(apart):+.1f} on average"
    )


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list, each once.

    Raises:
        ValueError: there are none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"expected names with commas between them, got {text!r}")
    return names


def default_policies(offer: Offer) -> list[str]:
    """Ours, the baselines, and static paths with AIMD batching: the shallowest, those of the climb."""
    static = [f"aimd({format_path(path)})" for path in offer.climb]
    return [DEFAULT_POLICY, "slackfit", "max-batch", "max-accuracy", "cheapest", "clockwork", *static]


def _table(played: Sequence[Played], names: Sequence[str]) -> Table:
    table = Table(title="answered correctly and in time / in time, % of all arrivals, means over the seeds")
    table.add_column("cell")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("bound", justify="right")
    for cell in dict.fromkeys(each.job.cell for each in played):
        row = []
        best = max(_mean(played, cell, name, "goodput") for name in names)
        for name in names:
            goodput = _mean(played, cell, name, "goodput")
            text = f"{100 * goodput:.1f} / {100 * _mean(played, cell, name, 'attainment'):.1f}"
            row.append(f"[bold]{text}[/]" if goodput == best else text)
        bound = _mean(played, cell, DEFAULT_POLICY, "bound") if DEFAULT_POLICY in names else math.nan
        table.add_row(cell.name, *row, "" if math.isnan(bound) else f"{100 * bound:.1f}")
    return table


def _mean(played: Sequence[Played], cell: Cell, policy: str, what: str) -> float:
    return float(np.mean([getattr(p, what) for p in played if p.job.cell == cell and p.job.policy == policy]))


def _write(file: Path, played: Sequence[Played]) -> None:
    header = ["cell", "policy", "seed", "servers", "requests", "goodput", "attainment", "accuracy", "depth", "bound"]
    rows = []
    for each in played:
        job, shares = each.job, (each.goodput, each.attainment, each.accuracy, each.depth, each.bound)
        rows.append([job.cell.name, job.policy, job.seed, job.servers, each.requests, *(f"{x:.5f}" for x in shares)])
    write_csv(file, header, rows)


if __name__ == "__main__":
    main()
