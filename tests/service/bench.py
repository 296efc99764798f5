"""The engine behind a fake runner and a fake clock. No sleeps: tests hold the runner back and let it go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from service.answers import Answer
from service.engine import Engine
from service.metrics import Metrics
from service.policy.wish import Wish
from service.repository import ServedModel
from tests.fakes import FakeClock, FakeRunner, fake_model, rows


class Bench:
    """An engine that runs, with everything a test looks at."""

    def __init__(
        self,
        accuracies: dict[tuple[int, ...], float] | None,
        block_s: float,
        *,
        levels: dict[float, float] | None = None,
        trace: bool = False,
        max_batch: int = 8,
        max_queue_rows: int = 32,
        hung_s: float = 30.0,
        **settings: Any,
    ) -> None:
        self.clock = FakeClock()
        self.runner = FakeRunner(self.clock, block_s)
        self.model: ServedModel = fake_model(accuracies, self.runner, levels=levels, **settings)
        self.metrics = Metrics()
        self.engine = Engine(
            self.metrics,
            max_batch=max_batch,
            max_queue_rows=max_queue_rows,
            reserve_s=0,
            hung_s=hung_s,
            trace=trace,
            clock=self.clock,
        )

    def ask(self, *confidences: float, budget_s: float | None = None, **wish: object) -> asyncio.Task[Answer]:
        now = self.clock()
        deadline_s = None if budget_s is None else now + budget_s
        request = Wish(deadline_s=deadline_s, **wish)  # type: ignore[arg-type]
        return asyncio.create_task(self.engine.submit(self.model, rows(*confidences), request, now))

    def metric(self, name: str, **labels: str) -> float:
        samples = (sample for metric in self.metrics.registry.collect() for sample in metric.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    async def held(self, start: Callable[[], Awaitable[object]]) -> None:
        """Hold the runner back with one row in it, so that what `start` asks waits in the queue."""
        self.runner.go.clear()
        self.runner.began.clear()
        first = self.ask(0.5, path=(4,))
        await asyncio.to_thread(self.runner.began.wait, 30)
        self.runner.runs.clear()
        await start()
        await asyncio.sleep(0)  # lets the new tasks enter the queue
        self.runner.go.set()
        await first


@asynccontextmanager
async def bench(
    accuracies: dict[tuple[int, ...], float] | None = None, block_s: float = 0.001, **settings: Any
) -> AsyncIterator[Bench]:
    b = Bench(accuracies, block_s, **settings)
    await b.engine.start([b.model])
    b.runner.runs.clear()
    try:
        yield b
    finally:
        b.runner.go.set()
        await b.engine.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout=60))  # type: ignore[arg-type]
