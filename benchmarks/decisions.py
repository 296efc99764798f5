"""How long a policy takes to decide, with a thousand rows waiting.

    python -m benchmarks.decisions [bundle] [--waiting 1000] [--profile docs/bench/machine.json]

The policy is driven as the engine drives it, in simulated time: as many rows as leave arrive, with budgets of up to two
seconds. The same decisions are taken several times, and the shortest time of each counts: what others on the machine add is
not the policy's.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import TypeVar

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.simulate import DEFAULT_BUNDLE, open_world
from benchmarks.simulation import Hardware, Outcomes
from service.policy import DEFAULT_POLICY
from service.policy.state import Offer, Policy, Row
from service.policy.wish import Wish

Choice = TypeVar("Choice")
Make = Callable[[np.random.Generator, Offer, float], Wish]

MIXES: dict[str, Make] = {
    "no wish": lambda _, __, due_s: Wish(deadline_s=due_s),
    "min_confidence": lambda rng, _, due_s: Wish(exit_at=rng.random(), asked_as="confidence", deadline_s=due_s),
    "min_confidence, no budget": lambda rng, _, __: Wish(exit_at=rng.random(), asked_as="confidence"),
    "any path": lambda rng, offer, due_s: Wish(path=_any(rng, list(offer.accuracies)), deadline_s=due_s),
}


@click.command()
@click.argument("bundle", type=click.Path(path_type=FilePath, exists=True, file_okay=False), default=DEFAULT_BUNDLE)
@click.option("--policy", default=DEFAULT_POLICY, show_default=True)
@click.option("--waiting", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--decisions", type=click.IntRange(min=100), default=5000, show_default=True, help="Of each mix of wishes.")
@click.option("--replays", type=click.IntRange(min=1), default=3, show_default=True, help="How often each is taken.")
@click.option("--profile", type=click.Path(path_type=FilePath, dir_okay=False), help="As of `hbll simulate`.")
def main(bundle: FilePath, policy: str, waiting: int, decisions: int, replays: int, profile: FilePath | None) -> None:
    """Time the decisions about rows of BUNDLE."""
    world = open_world(bundle, Hardware(), profile)
    table = Table(title=f"{policy}, {waiting:,} rows waiting: microseconds")
    for column in ("wishes", "decide p50", "p99", "finished p50", "p99", "rows of a batch"):
        table.add_column(column, justify="left" if column == "wishes" else "right")
    for name, make in (*MIXES.items(), ("all of these", _any_of_these)):
        played = [measure(*world.fresh(policy), world.outcomes, make, waiting, decisions) for _ in range(replays)]
        took, (_, sizes) = np.min([times for times, _ in played], axis=0), played[0]
        cells = [f"{value:.0f}" for column in took.T for value in np.percentile(1e6 * column, (50, 99))]
        table.add_row(name, *cells, f"{sizes.mean():.1f}")
    Console().print(table)


def measure(
    policy: Policy, offer: Offer, outcomes: Outcomes, make: Make, waiting: int, decisions: int, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Seconds of each `decide` and of the `finished` before it, `(decisions, 2)`, and rows of each batch `(decisions,)`."""
    rng = np.random.default_rng(seed)
    images: dict[int, int] = {}
    orders = itertools.count()
    now_s = 0.0
    took, sizes = np.zeros((decisions, 2)), np.zeros(decisions, np.int64)
    gc.collect()
    gc.disable()
    try:
        for index in range(decisions):
            while policy.waiting() < waiting:
                order = next(orders)
                images[order] = int(rng.integers(len(outcomes)))
                policy.arrive(Row(make(rng, offer, now_s + 2 * rng.random()), now_s, order), now_s)
            before_s = time.perf_counter()
            decision = policy.decide(now_s)
            took[index, 0] = time.perf_counter() - before_s
            batch = decision.batch
            if batch is None:
                continue
            sizes[index] = len(batch.rows)
            now_s += batch.expected_s
            # Of a path that is not on the climb none is recorded, and none is needed.
            recorded = [outcomes.confidence.get(row.target, outcomes.confidence[offer.reference]) for row in batch.rows]
            confidences = [of_path[images[row.order]] for of_path, row in zip(recorded, batch.rows, strict=True)]
            before_s = time.perf_counter()
            policy.finished(batch, confidences, now_s)
            took[index, 1] = time.perf_counter() - before_s
    finally:
        gc.enable()
    return took, sizes


def _any_of_these(rng: np.random.Generator, offer: Offer, due_s: float) -> Wish:
    return _any(rng, list(MIXES.values()))(rng, offer, due_s)


def _any(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]


if __name__ == "__main__":
    main()
