"""The team: the processes (ranks) that train one family together, and how they divide a step among them.

A launcher starts them and tells each who it is: `torchrun --nproc-per-node 2 -m hbll train ...`. A process that nobody
launched is a team of one, which divides nothing and talks to nobody. Work is divided in two ways, alone or together:

- *data*: each rank takes its share of the rows of a batch.
- *tree*: each rank takes its share of the nodes of every level, and the new states of the level go to all. On coarse
  levels, which have fewer nodes than there are ranks, several ranks share a node and divide its rows.

All ranks hold all weights, and all take the same optimizer step on the sum of all gradients: what a run computes does not
depend on its number of ranks, but for the order of floating-point sums. Nothing here knows losses, files or the loop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: its defaults would keep the group of its first import alive
import torch.nn.functional as F
from torch import Tensor, nn

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others before it takes them for lost; validation is done by one of them alone."""


CPU = torch.device("cpu")


class TeamError(RuntimeError):
    """A team that cannot be formed, or that lost a rank; the message says what to do."""


@dataclass(slots=True)
class Traffic:
    """What this rank handed to collectives so far, in bytes: gradients to be summed, states that all shall get."""

    summed: int = 0
    gathered: int = 0


@dataclass(frozen=True, slots=True)
class Team:
    """One rank's view of its team. Neighbouring ranks share a tree: rank = data share x `tree_ranks` + tree share."""

    rank: int = 0
    size: int = 1
    tree_ranks: int = 1
    device: torch.device = CPU
    tree: list[dist.ProcessGroup] = field(default_factory=list)  # the group of the ranks that share this one's tree
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """How many shares a batch is divided into."""
        return self.size // self.tree_ranks

    def rows(self, batch: int) -> slice:
        """This rank's share of a batch of so many rows, a multiple of `data_ranks`."""
        share = batch // self.data_ranks
        first = self.rank // self.tree_ranks * share
        return slice(first, first + share)

    def share(self, nodes: range, rows: int) -> tuple[range, slice]:
        """This rank's nodes of a level, and its rows of them (maybe none), out of the `rows` that its tree works on."""
        index = self.rank % self.tree_ranks
        count = max(1, len(nodes) // self.tree_ranks)
        sharers = self._sharers(len(nodes))
        node, part = divmod(index, sharers)
        most = math.ceil(rows / sharers)
        return nodes[node * count : (node + 1) * count], slice(min(part * most, rows), min((part + 1) * most, rows))

    def gather(self, states: Tensor, nodes: int, rows: int) -> Tensor:
        """All states of a level, `(nodes, rows, ...)`, from every rank's share of them, `(its nodes, its rows, ...)`."""
        if not self.tree:
            return states
        sharers = self._sharers(nodes)
        ours = F.pad(states, (0, 0) * (states.ndim - 2) + (0, math.ceil(rows / sharers) - states.shape[1])).contiguous()
        self.traffic.gathered += ours.nbytes
        whole = ours.new_empty((self.tree_ranks * len(ours), *ours.shape[1:]))
        with self._talking():
            dist.all_gather(list(whole.chunk(self.tree_ranks)), ours, group=self.tree[0])
        return whole.view(nodes, sharers * ours.shape[1], *ours.shape[2:])[:, :rows]

    def _sharers(self, nodes: int) -> int:
        """How many ranks divide the rows of one node of a level of so many nodes; both are powers of two."""
        return max(1, self.tree_ranks // nodes)

    def sum(self, gradients: Tensor, loss: Tensor) -> Tensor:
        """Turn `gradients` of all ranks' shares, in place, into those of the whole batch; return the loss of that, too.

        `gradients` is the buffer of `gradient_buffer`; `loss` is a mean over the rows of this rank's share of the data.
        """
        if self.size == 1:
            return loss
        gradients[-1] = loss
        gradients /= self.data_ranks
        self.traffic.summed += gradients.nbytes
        with self._talking():
            dist.all_reduce(gradients)
        return gradients[-1].clone()

    def require_agreement(self, number: int, what: str) -> None:
        """Make sure that all ranks have the same `number`.

        Raises:
            TeamError: they have not; or one is lost.
        """
        if self.size == 1:
            return
        numbers = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        with self._talking():
            dist.all_reduce(numbers)
        if len(set(numbers.tolist())) > 1:
            raise TeamError(f"all ranks must have the same {what}, got {numbers.tolist()} in the order of ranks")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as exc:  # of gloo and of NCCL alike
            raise TeamError(
                f"another rank ended or did not answer within {PATIENCE.seconds} s ({str(exc).splitlines()[0]}). The "
                "last checkpoint is intact: start again with --resume, with as many ranks as there are"
            ) from exc


ALONE = Team()


@contextmanager
def join(device: str, tree_ranks: int) -> Iterator[Team]:
    """Form the team that the launcher's environment describes (none: a team of one) and leave it in the end.

    With `device` "cpu" ranks talk by gloo, with "cuda" by NCCL, each on the GPU of its rank on this host.

    Raises:
        TeamError: the environment describes no team, `tree_ranks` does not divide it, or it did not come together.
    """
    environment = os.environ
    try:
        rank, size, local = (int(environment.get(name, of_one)) for name, of_one in _LAUNCHED)
    except ValueError as exc:
        raise TeamError(f"the launcher's {', '.join(name for name, _ in _LAUNCHED)} must be numbers: {exc}") from exc
    if tree_ranks < 1 or tree_ranks & (tree_ranks - 1) or size % tree_ranks:
        raise TeamError(
            f"ranks that share a tree must be a power of two that divides the number of ranks, {size} here; got "
            f"{tree_ranks}. Start ranks like this: torchrun --nproc-per-node {max(2, tree_ranks)} -m hbll train ..."
        )
    if device == "cuda" and local >= torch.cuda.device_count():
        raise TeamError(f"rank {local} of this host needs a GPU of its own, and there are {torch.cuda.device_count()}")
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if size == 1:
        yield Team(device=place)
        return
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE, rank=rank, world_size=size)
        trees = [range(first, first + tree_ranks) for first in range(0, size, tree_ranks) if tree_ranks > 1]
        groups = [dist.new_group(list(ranks)) for ranks in trees]  # every rank must take part in making each
    except (RuntimeError, ValueError) as exc:
        raise TeamError(f"the {size} ranks did not come together: {exc}") from exc
    tree = [group for ranks, group in zip(trees, groups, strict=True) if rank in ranks]
    groups.clear()
    try:
        yield Team(rank, size, tree_ranks, place, tree)
    finally:
        # The threads of a group end with the last reference to it. One that outlives the interpreter aborts the process.
        tree.clear()
        dist.destroy_process_group()


_LAUNCHED = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def gradient_buffer(family: nn.Module) -> Tensor:
    """One zeroed tensor of which all gradients of `family` become views, so that one call sums them all.

    `(parameters + 1,) float32`: the last place is for the loss. A parameter that lies in memory in another order, such as a
    transposed one, gets that of its gradient: AdamW's fused kernel goes through both alike, and does not look.
    """
    parameters = [parameter for parameter in family.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    buffer = torch.zeros(sum(p.numel() for p in parameters) + 1, device=parameters[0].device)
    pieces = buffer[:-1].split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    return buffer
