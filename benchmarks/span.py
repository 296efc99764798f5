"""The span of a training step, counted while it runs: how many block evaluations must come one after the other.

Every batched call of blocks, and every call of the head, counts 1 forward and 1 backward. Which call waits for which
follows from the data: all that is computed carries the time at which it could be there. Knows nothing of how a step works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Unit = Literal["blocks", "head"]


class Span(TorchDispatchMode):
    """Follows the tensors of a step. Results, after it has run, in block evaluations:

    `in_order`: the time at which all is done if blocks run one batched call after the other, in the program's order, and
    the head runs beside them. `dependent`: the longest chain of evaluations each of which needs the one before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.in_order = self.dependent = 0
        self._free: dict[Unit, int] = {"blocks": 0, "head": 0}
        # By storage, which is kept alive so that its address stays its own: (in order, dependent) times of its content.
        self._times: dict[int, tuple[torch.UntypedStorage, int, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run an operation; what it makes is there when the latest of its inputs is."""
        kwargs = kwargs or {}
        read = [self._time(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._keep(made, *(max(of_kind) for of_kind in zip((0, 0), *read, strict=True)))
        return result

    def evaluated(self, output: Tensor, unit: Unit) -> Tensor:
        """Count one evaluation forward, and one backward when a gradient comes; returns `output`, marked."""
        marked: Tensor = _Mark.apply(output, self, unit)  # type: ignore[no-untyped-call]
        return marked

    def count(self, tensor: Tensor, unit: Unit) -> None:
        """The evaluation that made `tensor` takes a time of 1."""
        in_order, dependent = self._time(tensor)
        self._free[unit] = max(in_order, self._free[unit]) + 1
        self._keep(tensor, self._free[unit], dependent + 1)
        self.in_order, self.dependent = max(self.in_order, self._free[unit]), max(self.dependent, dependent + 1)

    def _time(self, tensor: Tensor) -> tuple[int, int]:
        _, *times = self._times.get(tensor.untyped_storage()._cdata, (None, 0, 0))
        return times[0], times[1]

    def _keep(self, tensor: Tensor, in_order: int, dependent: int) -> None:
        storage = tensor.untyped_storage()
        self._times[storage._cdata] = (storage, in_order, dependent)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, span: Span, unit: Unit) -> Tensor:
        ctx.span, ctx.unit = span, unit
        marked = output.clone()
        span.count(marked, unit)
        return marked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        marked = gradients[0].clone()
        ctx.span.count(marked, ctx.unit)
        return marked, None, None


@contextmanager
def counted(blocks: nn.Module, head: nn.Module) -> Iterator[Span]:
    """Count the span of the one step that runs inside, on the CPU; `blocks` has a `run(weights, states)`."""
    span, overridden = Span(), "run" in vars(blocks)
    run = blocks.run
    assert callable(run)
    vars(blocks)["run"] = lambda weights, states: span.evaluated(run(weights, states), "blocks")
    hook = head.register_forward_hook(lambda _module, _input, output: span.evaluated(output, "head"))
    try:
        with span:
            yield span
    finally:
        hook.remove()
        if overridden:
            vars(blocks)["run"] = run
        else:
            del vars(blocks)["run"]
