"""What the engine does with budgets: depths that fit, expiry, strict requests."""

from __future__ import annotations

import asyncio

import pytest

from service.answers import Answer
from service.errors import DeadlineExpired, DeadlineInfeasible
from service.policy.wish import Wish
from service.predict import _prediction
from service.profile import LatencyProfile, Segment
from tests.fakes import fake_parts
from tests.service.bench import bench, run


def test_a_climb_stops_where_the_next_rung_would_be_late() -> None:
    async def test() -> None:
        async with bench() as b:
            answer = await b.ask(0.1, exit_at=0.99, asked_as="confidence", budget_s=0.0025)
            assert answer.rows[0].path == (4, 6)
            assert answer.rows[0].stopped_by == "budget"

    run(test)


def test_a_budget_chooses_the_deepest_path_that_fits() -> None:
    async def test() -> None:
        async with bench() as b:
            for budget_s, depth, reason in ((0.0045, 3, "budget"), (0.0001, 1, "budget"), (1.0, 7, "complete")):
                answer = await b.ask(0.1, budget_s=budget_s)
                assert (len(answer.rows[0].path), answer.rows[0].stopped_by) == (depth, reason)

    run(test)


def test_time_in_the_queue_counts_against_the_budget() -> None:
    async def test() -> None:
        async with bench(block_s=0.001) as b:
            late: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                late.append(b.ask(0.1, budget_s=0.0078))
                await asyncio.sleep(0)
                b.clock.now_s += 0.004

            await b.held(start)
            answer = await late[0]
            assert len(answer.rows[0].path) == 2  # 7.8 ms - 4 waited - 1 of the run before
            assert answer.queue_s == pytest.approx(0.005)

    run(test)


def test_who_expires_in_the_queue_costs_no_compute() -> None:
    async def test() -> None:
        async with bench() as b:
            expired: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                expired.append(b.ask(0.1, budget_s=0.002))
                expired.append(b.ask(0.1, budget_s=0.002, path=(4, 6)))
                await asyncio.sleep(0)
                b.clock.now_s += 0.01

            await b.held(start)
            for task in expired:
                with pytest.raises(DeadlineExpired):
                    await task
            assert b.runner.runs == [((4,), 1, True)]

    run(test)


def test_a_strict_request_is_refused_at_once_with_the_smallest_budget_that_could_be_met() -> None:
    async def test() -> None:
        async with bench() as b:
            with pytest.raises(
                DeadlineInfeasible, match=r"a budget of 0\.5 ms cannot be met now: expected at least 1 ms"
            ) as refused:
                await b.ask(0.1, budget_s=0.0005, strict=True)
            assert refused.value.details == {"smallest_feasible_budget_ms": 1.0}
            with pytest.raises(DeadlineInfeasible, match="expected at least 7 ms"):
                await b.ask(0.1, budget_s=0.005, strict=True, path=(1, 2, 3, 4, 5, 6, 7))
            assert b.runner.runs == []
            assert len((await b.ask(0.1, budget_s=0.0015, strict=True)).rows) == 1
            assert (await b.ask(0.1, budget_s=0.0005)).rows[0].path == (4,)  # not strict: the shallowest, late

    run(test)


def test_a_strict_request_that_waited_too_long_is_refused_rather_than_late() -> None:
    async def test() -> None:
        async with bench() as b:
            tasks: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                tasks.append(b.ask(0.1, budget_s=0.004, strict=True))
                await asyncio.sleep(0)
                b.clock.now_s += 0.0025  # and the run before takes one more

            await b.held(start)
            with pytest.raises(DeadlineInfeasible):
                await tasks[0]
            assert b.runner.runs == [((4,), 1, True)]

    run(test)


def test_a_certified_climb_that_its_deadline_cuts_short_is_not_called_certified() -> None:
    async def test() -> None:
        async with bench() as b:
            answer = await b.ask(0.1, 0.85, exit_at=0.9, asked_as="risk", budget_s=0.0025)
            wish = Wish(exit_at=0.9, asked_as="risk")
            shown = [_prediction(row, ("no", "yes"), False, wish) for row in answer.rows]
            assert [(row["depth"], row["stopped_by"], row["certified"]) for row in shown] == [
                (2, "budget", False),
                (1, "risk", True),
            ]

    run(test)


def test_a_strict_request_is_measured_by_the_batch_that_it_would_run_in() -> None:
    async def test() -> None:
        async with bench() as b:
            b.model.profile = LatencyProfile(
                fake_parts().model_copy(update={"nodes": dict.fromkeys(range(1, 8), (0.001, 0.008))})
            )
            b.engine.add(b.model)
            with pytest.raises(DeadlineInfeasible, match="expected at least 8 ms"):
                await b.ask(*[0.1] * 8, budget_s=0.004, strict=True)

    run(test)


def test_a_row_that_expires_fails_its_whole_request_and_the_others_cost_nothing_more() -> None:
    """The first of the two rows has an answer when the second, which no batch had room for, expires."""

    async def test() -> None:
        async with bench(max_batch=1) as b:
            tasks: list[asyncio.Task[Answer]] = []

            def before(nodes: tuple[int, ...]) -> None:
                if b.runner.runs:
                    b.clock.now_s += 1

            async def start() -> None:
                tasks.append(b.ask(0.1, 0.2, exit_at=0.99, asked_as="confidence", budget_s=0.5))
                b.runner.before = before

            await b.held(start)
            with pytest.raises(DeadlineExpired):
                await tasks[0]
            b.runner.before = lambda _: None
            ran = len(b.runner.runs)
            assert ran <= 3  # the one before; the first row's first answer; what had begun when the second expired
            await b.ask(0.3, path=(4,))
            assert b.runner.runs[ran:] == [((4,), 1, True)]
            assert b.engine._tickets == set()

    run(test)


def test_an_idle_server_does_not_refuse_for_ever_because_of_how_slow_it_once_was() -> None:
    """Nothing ran, because too much was expected, so nothing was learned."""

    async def test() -> None:
        async with bench() as b:
            assert b.model.profile is not None
            for _ in range(50):
                b.model.profile.observe(Segment((4,), embed=True), 1, 1.0)
            refusals = 0
            while True:
                try:
                    await b.ask(0.1, budget_s=0.01, strict=True)
                except DeadlineInfeasible:
                    refusals += 1
                else:
                    break
            assert 0 < refusals < 60

    run(test)


def test_the_smallest_feasible_budget_is_feasible() -> None:
    """Rows that are due later than a budget that cannot be met may be due before the one that can."""

    async def test() -> None:
        async with bench() as b:
            refused: list[DeadlineInfeasible] = []
            tasks: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                tasks.extend(b.ask(0.1, budget_s=0.006, path=(4,)) for _ in range(8))
                await asyncio.sleep(0)
                with pytest.raises(DeadlineInfeasible, match="expected at least 9 ms") as error:
                    await b.ask(0.1, budget_s=0.005, strict=True, path=(1, 2, 3, 4, 5, 6, 7))
                refused.append(error.value)
                tasks.append(b.ask(0.1, budget_s=0.0091, strict=True, path=(1, 2, 3, 4, 5, 6, 7)))

            await b.held(start)
            await asyncio.gather(*tasks)
            assert refused[0].details == {"smallest_feasible_budget_ms": 9.0}

    run(test)
