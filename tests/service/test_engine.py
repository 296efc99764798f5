"""What the engine does with requests: see `tests.service.bench`."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest

from service.answers import Answer
from service.errors import NotReady, QueueFull
from service.policy.wish import Wish
from service.profile import LatencyProfile
from service.tickets import TicketRow
from tests.fakes import fake_manifest, rows
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


def test_rows_of_a_request_may_end_at_different_times_for_different_reasons() -> None:
    async def test() -> None:
        async with bench(levels={0.05: 0.945}, audit_rate=0) as b:
            answer = await b.ask(0.85, 0.1, 0.75, exit_at=0.945, asked_as="risk", risk=0.05, budget_s=0.0045)
            assert [(len(row.path), row.stopped_by) for row in answer.rows] == [(1, "risk"), (3, "budget"), (2, "risk")]

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


def test_an_idle_engine_holds_on_to_no_input() -> None:
    """Bug found: rows stayed among the reminders of their deadlines until these had passed, and somebody came."""

    async def test() -> None:
        async with bench() as b:
            await asyncio.gather(*(b.ask(0.1, budget_s=60.0) for _ in range(20)))
            while [each for each in gc.get_objects() if type(each) is TicketRow and each.model is b.model]:
                await asyncio.sleep(0)

    run(test)
