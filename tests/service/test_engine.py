"""What the engine does with requests: see `tests.service.bench`."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from service.answers import Answer
from service.errors import DeadlineExpired, DeadlineInfeasible, NotReady, QueueFull
from service.policy.wish import Wish
from service.predict import _prediction
from service.profile import LatencyProfile, Segment
from tests.fakes import FakeRunner, fake_manifest, fake_model, fake_parts, rows
from tests.service.bench import Bench, bench, run


def test_without_a_wish_the_reference_path_runs() -> None:
    async def test() -> None:
        async with bench() as b:
            answer = await b.ask(0.1, 0.2)
            assert [row.path for row in answer.rows] == [(1, 2, 3, 4, 5, 6, 7)] * 2
            assert {row.stopped_by for row in answer.rows} == {"complete"}
            assert [row.confidence for row in answer.rows] == pytest.approx([0.8, 0.9], abs=1e-5)
            assert answer.compute_s == pytest.approx(0.007)

    run(test)


def test_a_row_climbs_until_it_is_confident_and_each_row_by_itself() -> None:
    """Confidence is the pixel + 0.1 per block: 0.85 needs one block, 0.75 two, 0.65 three, 0.1 the last."""

    async def test() -> None:
        async with bench() as b:
            answer = await b.ask(0.85, 0.1, 0.65, 0.75, exit_at=0.945, asked_as="confidence")
            assert [row.path for row in answer.rows] == [(4,), (1, 2, 3, 4, 5, 6, 7), (4, 6, 7), (4, 6)]
            assert [row.stopped_by for row in answer.rows] == ["confidence", "complete", "confidence", "confidence"]
            assert b.runner.runs == [((4,), 4, True), ((6,), 3, False), ((7,), 2, False), ((1, 2, 3, 4, 5, 6, 7), 1, True)]

    run(test)


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


def test_who_has_gone_costs_no_compute() -> None:
    async def test() -> None:
        async with bench() as b:
            gone: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                gone.append(b.ask(0.1))
                await asyncio.sleep(0)
                gone[0].cancel()
                await asyncio.sleep(0)

            await b.held(start)
            await b.ask(0.3, path=(4, 6))
            assert b.runner.runs == [((4,), 1, True), ((4, 6), 1, True)]

    run(test)


def test_who_leaves_during_a_climb_goes_no_further_than_the_running_rung() -> None:
    async def test() -> None:
        async with bench() as b:
            b.runner.go.clear()
            b.runner.began.clear()
            climbing = b.ask(0.1, exit_at=0.99, asked_as="confidence")
            await asyncio.to_thread(b.runner.began.wait, 30)
            climbing.cancel()
            await asyncio.sleep(0)
            b.runner.go.set()
            await b.ask(0.3, path=(4, 6))
            assert b.runner.runs == [((4,), 1, True), ((4, 6), 1, True)]

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


def test_a_cancelled_request_frees_its_place_in_the_queue_at_once() -> None:
    async def test() -> None:
        async with bench(max_queue_rows=5) as b:

            async def start() -> None:
                gone = b.ask(0.1, 0.2, 0.3, 0.4, 0.5)
                await asyncio.sleep(0)
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
                b.engine.require_room(5)

            await b.held(start)

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


def test_answers_on_the_way_are_told_as_soon_as_they_are_known() -> None:
    async def test() -> None:
        async with bench() as b:
            told: list[tuple[int, int, str | None]] = []
            wish = Wish(exit_at=0.945, asked_as="confidence")
            answer = await b.engine.submit(
                b.model, rows(0.65, 0.85), wish, b.clock(), lambda row, a: told.append((row, len(a.path), a.stopped_by))
            )
            assert [each for each in told if each[0] == 0] == [(0, 1, None), (0, 2, None), (0, 3, "confidence")]
            assert [each for each in told if each[0] == 1] == [(1, 1, "confidence")]
            assert [len(row.path) for row in answer.rows] == [3, 1]

    run(test)


def test_waiting_rows_that_go_to_the_same_block_share_a_batch_whatever_they_were_asked_by() -> None:
    async def test() -> None:
        async with bench() as b:
            tasks: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                tasks.extend([b.ask(0.1, path=(4, 6)), b.ask(0.2, 0.3), b.ask(0.4, path=(4, 6), asked_as="depth")])

            await b.held(start)
            answers = [await task for task in tasks]
            assert [answer.rows[0].stopped_by for answer in answers] == ["path", "complete", "depth"]
            assert b.runner.runs[:2] == [((4,), 1, True), ((4,), 4, True)]  # all of them, on three different paths
            assert [count >= 2 for nodes, count, _ in b.runner.runs if nodes == (6,)] == [True]
            assert answers[2].rows[0].confidence == pytest.approx(0.6, abs=1e-5)  # its own row's answer

    run(test)


def test_a_request_larger_than_a_batch_is_answered_whole_and_in_order() -> None:
    async def test() -> None:
        async with bench(max_batch=4) as b:
            wanted = np.linspace(0.3, 0.85, 10)
            answer = await b.ask(*wanted, path=(4,))
            assert [row.confidence + (row.label == 0) * (1 - 2 * row.confidence) for row in answer.rows] == pytest.approx(
                wanted + 0.1, abs=1e-5
            )
            assert [count for _, count, _ in b.runner.runs] == [4, 4, 2]

    run(test)


def test_a_full_queue_refuses_at_once_and_keeps_who_waits() -> None:
    async def test() -> None:
        async with bench(max_queue_rows=3) as b:
            tasks: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                tasks.append(b.ask(0.1, 0.2, path=(4,)))
                await asyncio.sleep(0)
                with pytest.raises(QueueFull, match="2 rows wait already and at most 3 may, got 2 more"):
                    await b.ask(0.3, 0.4)

            await b.held(start)
            assert len((await tasks[0]).rows) == 2

    run(test)


def test_a_row_that_stops_does_not_wait_for_those_that_climb_on() -> None:
    """A row with a budget was once delivered only when its whole batch had ended its climb, late."""

    async def test() -> None:
        async with bench() as b:
            delivered = threading.Event()
            tasks: list[asyncio.Task[Answer]] = []

            def before(nodes: tuple[int, ...]) -> None:
                if len(nodes) == 7:  # the last of the climb: by now the hurried row must have its answer
                    assert delivered.wait(timeout=10)

            async def start() -> None:
                tasks.append(b.ask(0.1, exit_at=0.99, asked_as="confidence", budget_s=0.0045))
                tasks.append(b.ask(0.1, exit_at=0.99, asked_as="confidence"))
                tasks[0].add_done_callback(lambda _: delivered.set())
                b.runner.before = before

            await b.held(start)
            hurried, patient = [await task for task in tasks]
            assert hurried.rows[0].stopped_by == "budget"
            assert hurried.rows[0].path == (4, 6, 7)  # 1 ms of the run before, then three rungs
            assert hurried.compute_s == pytest.approx(0.003)
            assert patient.rows[0].stopped_by == "complete"
            assert patient.compute_s == pytest.approx(0.010)

    run(test)


def test_newcomers_join_between_rungs() -> None:
    async def test() -> None:
        async with bench() as b:
            b.runner.go.clear()
            b.runner.began.clear()
            first = b.ask(0.1, exit_at=0.99, asked_as="confidence")
            await asyncio.to_thread(b.runner.began.wait, 30)
            second = b.ask(0.85, path=(4,))
            await asyncio.sleep(0)
            b.runner.go.set()
            await asyncio.gather(first, second)
            assert [nodes for nodes, _, _ in b.runner.runs][:4] == [(4,), (4,), (6,), (7,)]
            assert sum(count for _, count, _ in b.runner.runs) == 5

    run(test)


def test_nothing_is_taken_before_the_warm_up() -> None:
    async def test() -> None:
        b = Bench(None, 0.001)
        with pytest.raises(NotReady):
            await b.ask(0.1)
        assert not b.engine.ready
        await b.engine.start([b.model])
        assert b.engine.ready
        assert isinstance(b.model.profile, LatencyProfile)
        await b.engine.stop()
        assert not b.engine.ready

    run(test)


def test_every_row_is_counted_once() -> None:
    async def test() -> None:
        async with bench() as b:
            await asyncio.gather(*(b.ask(0.1 * n, 0.5, exit_at=0.7, asked_as="confidence") for n in range(1, 9)))
            assert b.metric("hbll_answers_total") == 16

    run(test)


def test_offered_paths_without_a_ladder_can_be_climbed() -> None:
    async def test() -> None:
        manifest = fake_manifest({(2, 4): 0.5, (1, 2, 4): 0.6})
        async with bench(manifest.accuracies) as b:
            answer = await b.ask(0.1, exit_at=0.99, asked_as="confidence")
            assert answer.rows[0].path == (1, 2, 4)

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


def test_rows_of_a_request_may_end_at_different_times_for_different_reasons() -> None:
    async def test() -> None:
        async with bench(levels={0.05: 0.945}, audit_rate=0) as b:
            answer = await b.ask(0.85, 0.1, 0.75, exit_at=0.945, asked_as="risk", risk=0.05, budget_s=0.0045)
            assert [(len(row.path), row.stopped_by) for row in answer.rows] == [(1, "risk"), (3, "budget"), (2, "risk")]

    run(test)


def test_a_replaced_model_answers_who_waits_and_is_then_forgotten() -> None:
    async def test() -> None:
        async with bench() as b:
            tasks: list[asyncio.Task[Answer]] = []
            new = fake_model(runner=b.runner, version=2)
            await asyncio.to_thread(new.warm_up, 8, b.clock, lambda: False)

            async def start() -> None:
                tasks.append(b.ask(0.1, exit_at=0.99, asked_as="confidence"))
                await asyncio.sleep(0)
                b.engine.add(new)
                b.engine.retire(b.model)

            await b.held(start)
            assert (await tasks[0]).rows[0].stopped_by == "complete"
            assert (await b.engine.submit(new, rows(0.1), Wish(), b.clock())).rows
            assert b.engine.drift(b.model) is None
            # a request that was being read meanwhile
            assert (await b.ask(0.1)).rows
            assert b.engine.foresee(b.model, Wish(), 1)[-1].path == (1, 2, 3, 4, 5, 6, 7)
            assert (await b.engine.submit(new, rows(0.1), Wish(), b.clock())).rows
            assert b.engine.drift(b.model) is None

    run(test)


def test_a_replaced_model_is_forgotten_even_if_the_server_never_idles() -> None:
    async def test() -> None:
        async with bench() as b:
            new = fake_model(runner=b.runner, version=2)
            await asyncio.to_thread(new.warm_up, 8, b.clock, lambda: False)
            b.engine.add(new)
            busy = True

            async def ask() -> None:
                while busy:
                    await b.engine.submit(new, rows(0.1), Wish(path=(4,)), b.clock())

            asking = [asyncio.create_task(ask()) for _ in range(3)]
            b.engine.retire(b.model)
            while b.engine.drift(b.model) is not None:
                await asyncio.sleep(0)
            busy = False
            await asyncio.gather(*asking)

    run(test)


def test_a_traced_request_has_a_queue_and_its_segments_as_parts() -> None:
    async def test() -> None:
        async with bench(trace=True) as b:
            answer = await b.ask(0.1, 0.65, exit_at=0.945, asked_as="confidence")
            assert [span.name for span in answer.spans] == ["queue", *["segment"] * 4]
            assert [span.attributes for span in answer.spans[1:]] == [
                {"hbll.nodes": "4", "hbll.rows": 2},
                {"hbll.nodes": "6", "hbll.rows": 2},
                {"hbll.nodes": "7", "hbll.rows": 2},
                {"hbll.nodes": "1-2-3-4-5-6-7", "hbll.rows": 1},
            ]
            assert sum(span.end_s - span.start_s for span in answer.spans[1:]) == pytest.approx(answer.compute_s)
        async with bench() as b:
            assert (await b.ask(0.1)).spans == ()

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


def test_versions_of_a_model_are_counted_apart() -> None:
    async def test() -> None:
        async with bench() as b:
            second = fake_model(runner=FakeRunner(b.clock, 0.001), version=2)
            second.warm_up(8, b.clock, lambda: False)
            b.engine.add(second)
            for model, depth in ((b.model, 1), (second, 2), (second, 2)):
                path = (4, 6)[:depth]
                await b.engine.submit(model, rows(0.1), Wish(path), b.clock())
            assert [b.metric("hbll_requests_total", version=version) for version in ("1", "2")] == [1, 2]
            assert [b.metric("hbll_block_rows_total", version=version) for version in ("1", "2")] == [1, 4]
            assert [b.metric("hbll_answers_total", version="2", depth=depth) for depth in ("1", "2")] == [0, 2]

    run(test)
