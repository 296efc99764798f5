"""The time of a training step on many devices, on paper: `python -m benchmarks.devices` prints the table.

A model of what `training.distributed` does, not a measurement; nobody has run it on 1,024 devices. Assumptions:

- A batched call of `k` blocks on `r` rows takes `call_s + k * r * row_s` forward, and twice the second term backward.
- BP: N-1 calls forward and N-1 backward, on the rows of one device. HBLL: 4 calls a level (its blocks and their right
  parents, forward and backward), on the nodes of one of the T ranks that share a tree; on levels of fewer than T nodes
  these divide the rows. A row cannot be divided, so data alone occupy at most as many devices as the batch has rows.
- A collective over R ranks takes a latency for each of log2(R) rounds (an all-reduce: twice), and moves the payload times
  (R-1)/R (an all-reduce: twice) at the bandwidth of one link. Nothing overlaps; embedding, head and optimizer are free.
- Every rank holds all weights, and all gradients are summed, as implemented. `owned` is what could be, and is not
  implemented: each of the T ranks trains a consecutive piece of the nodes alone. Only blocks that are right parents of
  others' nodes send gradients to their owner, and get new weights back: T-1 blocks, the busiest of which, node N/2, has
  such children on log2(T) ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import click

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Job:
    """A family and its batch. `hierarchy_depth`: D. `block_parameters`, `state_floats`: of a block, and of a row's state.

    `call_s`, `row_s`: seconds to start a batched call, and for one block forward on one row.
    """

    hierarchy_depth: int
    batch: int
    block_parameters: float
    state_floats: float
    call_s: float
    row_s: float

    @property
    def blocks(self) -> int:
        """N-1."""
        return (1 << self.hierarchy_depth) - 1


@dataclass(frozen=True, slots=True)
class Link:
    """`latency_s` of a message, `bytes_per_s` of one device's link."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, by what they are spent on; `gathered_bytes` and `summed_bytes` are a device's payloads."""

    compute_s: float
    gather_s: float
    sum_s: float
    gathered_bytes: float
    summed_bytes: float

    @property
    def total_s(self) -> float:
        """One after the other."""
        return self.compute_s + self.gather_s + self.sum_s


def bp_step(job: Job, link: Link, data_ranks: int) -> StepTime:
    """Backpropagation through all blocks, the batch divided among `data_ranks`."""
    rows = job.batch / data_ranks
    payload = _gradient_bytes(job)
    compute = job.blocks * (2 * job.call_s + 3 * rows * job.row_s)
    return StepTime(compute, 0, _all_reduce_s(payload, data_ranks, link), 0, payload)


def hbll_step(job: Job, link: Link, data_ranks: int, tree_ranks: int, *, owned: bool = False) -> StepTime:
    """An HBLL step, the batch divided among `data_ranks` trees of `tree_ranks` each."""
    rows = job.batch / data_ranks
    compute = gather = gathered = 0.0
    for level in range(job.hierarchy_depth):
        nodes = 2 ** (job.hierarchy_depth - 1 - level)
        work = max(1, nodes / tree_ranks) * math.ceil(rows / max(1, tree_ranks / nodes))  # blocks on rows, of one device
        compute += 4 * job.call_s + (3 * work + 3 * work * (nodes > 1)) * job.row_s  # the root's right parent is the head
        if level > 0 and tree_ranks > 1:  # nobody reads the states of leaves
            mine = work * job.state_floats * FLOAT_BYTES
            gathered += mine
            gather += math.log2(tree_ranks) * link.latency_s + (tree_ranks - 1) * mine / link.bytes_per_s
    if not owned or tree_ranks == 1:
        payload = _gradient_bytes(job)
        return StepTime(compute, gather, _all_reduce_s(payload, data_ranks * tree_ranks, link), gathered, payload)
    # A piece's gradients are summed over the trees; those for others' blocks go to their owners, and weights come back.
    of_block = job.block_parameters * FLOAT_BYTES
    piece = _gradient_bytes(job) / tree_ranks
    messages = 2 * math.log2(tree_ranks)
    exchange = messages * (link.latency_s + of_block / link.bytes_per_s)
    summed = piece + messages * of_block
    return StepTime(compute, gather, _all_reduce_s(piece, data_ranks, link) + exchange, gathered, summed)


def _gradient_bytes(job: Job) -> float:
    return job.blocks * job.block_parameters * FLOAT_BYTES


def _all_reduce_s(payload: float, ranks: int, link: Link) -> float:
    return 2 * math.log2(ranks) * link.latency_s + 2 * (ranks - 1) / ranks * payload / link.bytes_per_s


def table(job: Job, link: Link, most: int) -> str:
    """Markdown: for 1, 2, 4 .. `most` devices, a step's milliseconds; HBLL's are those of its best data x tree."""
    lines = [
        "| devices | BP | HBLL, data alone | HBLL | data x tree | compute + gather + sum | HBLL, owned | BP / HBLL "
        "| BP / owned |",
        "|--:|" + "--:|" * 8,
    ]
    for power in range(most.bit_length()):
        devices = 2**power
        rows = min(devices, job.batch)
        bp, data = bp_step(job, link, rows), hbll_step(job, link, rows, 1)
        splits = [
            (devices // tree, tree)
            for tree in (2**k for k in range(min(power + 1, job.hierarchy_depth)))
            if devices // tree <= job.batch
        ]
        if not splits:
            break
        split = min(splits, key=lambda ways: hbll_step(job, link, *ways).total_s)
        best = hbll_step(job, link, *split)
        owned = min(hbll_step(job, link, *ways, owned=True).total_s for ways in splits)
        parts = " + ".join(_ms(part) for part in (best.compute_s, best.gather_s, best.sum_s))
        lines.append(
            f"| {devices:,} | {_ms(bp.total_s)} | {_ms(data.total_s)} | {_ms(best.total_s)} | {split[0]} x {split[1]} "
            f"| {parts} | {_ms(owned)} | {bp.total_s / best.total_s:.2f} | {bp.total_s / owned:.2f} |"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


@click.command()
@click.option("--hierarchy-depth", default=10, show_default=True, help="D.")
@click.option("--batch", default=32, show_default=True, help="Rows of the whole batch.")
@click.option("--block-parameters", default=5e4, show_default=True, help="Of one block.")
@click.option("--state-floats", default=64 * 128.0, show_default=True, help="Of one row's state.")
@click.option("--call-us", default=100.0, show_default=True, help="Microseconds to start a batched call of a block.")
@click.option("--row-us", default=0.2, show_default=True, help="Microseconds of one block forward on one row.")
@click.option("--latency-us", default=10.0, show_default=True, help="Microseconds of one message.")
@click.option("--gigabytes-per-s", default=50.0, show_default=True, help="Of one device's link.")
@click.option("--most", default=1024, show_default=True, help="Devices.")
def main(
    hierarchy_depth: int,
    batch: int,
    block_parameters: float,
    state_floats: float,
    call_us: float,
    row_us: float,
    latency_us: float,
    gigabytes_per_s: float,
    most: int,
) -> None:
    """Print the time of a step on 1, 2, 4 .. devices, by the model that this module's docstring states."""
    job = Job(hierarchy_depth, batch, block_parameters, state_floats, call_us * 1e-6, row_us * 1e-6)
    click.echo(table(job, Link(latency_us * 1e-6, gigabytes_per_s * 1e9), most))


if __name__ == "__main__":
    main()
