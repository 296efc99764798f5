"""Audits through the engine. The fake's label is 1 where pixel + 0.1 per block exceeds 0.5: at one block 0.1 is a
confident no and at the reference path, seven blocks, a yes; 0.85 is a yes everywhere."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from service.answers import Answer
from service.audits import PATIENCE_S
from service.drift import DriftWatch
from service.errors import DeadlineExpired, InferenceFailed, NotReady
from service.metrics import Metrics
from service.policy.wish import Wish
from tests.fakes import fake_manifest, fake_model, rows
from tests.service.bench import Bench, bench, run

FULL = (1, 2, 3, 4, 5, 6, 7)
LEVELS = {0.05: 0.75, 0.2: 0.65}
CERTIFIED = {"exit_at": 0.75, "asked_as": "risk", "risk": 0.05}


async def audited(b: Bench, audits: int) -> tuple[int, int]:
    """Wait for so many audits, then for nothing more to be done. Returns audits and disagreements of the first level."""
    drift = b.engine.drift(b.model)
    assert drift is not None
    while drift.alarms[0.05].audits < audits or b.engine._audits or b.engine._dispatch.waiting():
        await asyncio.sleep(0)
    await b.ask(0.9, path=(4,))
    return drift.alarms[0.05].audits, drift.alarms[0.05].disagreements


def test_every_early_exit_is_compared_with_the_reference_once() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            answers = [await b.ask(pixel, **CERTIFIED) for pixel in (0.1, 0.85, 0.85)]
            assert [(answer.rows[0].path, answer.rows[0].stopped_by) for answer in answers] == [((4,), "risk")] * 3
            assert await audited(b, 3) == (3, 1)
            assert sum(count for nodes, count, _ in b.runner.runs if nodes == FULL) == 3
            assert b.metric("hbll_audits_total", epsilon="0.05", differs="true") == 1
            assert b.metric("hbll_audits_total", epsilon="0.05", differs="false") == 2
            assert b.metric("hbll_answers_total") == 4  # audits are no answers

    run(test)


def test_what_reached_the_reference_agrees_and_costs_nothing() -> None:
    async def test() -> None:
        async with bench(levels={0.05: 0.995}, audit_rate=1) as b:
            await b.ask(0.1, exit_at=0.995, asked_as="risk", risk=0.05)
            await b.ask(0.2, exit_at=0.995, asked_as="risk", risk=0.05)
            await b.ask(0.31, exit_at=0.999, asked_as="risk", risk=0.05)  # confident, but only there
            assert await audited(b, 3) == (3, 0)
            assert sum(nodes == FULL for nodes, _, _ in b.runner.runs) == 3

    run(test)


def test_what_its_deadline_cut_short_is_run_to_the_rules_end_and_then_compared() -> None:
    """Confidence is 0.55 at one block, 0.65 at two, where the deadline is, and 0.75, enough, at three."""

    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            answer = await b.ask(0.45, exit_at=0.75, asked_as="risk", risk=0.05, budget_s=0.0025)
            assert [(row.path, row.stopped_by) for row in answer.rows] == [((4, 6), "budget")]
            assert await audited(b, 1) == (1, 0)
            # the rule's own end, then the reference, block by block since there was a tight budget a moment ago
            assert [node for nodes, _, _ in b.runner.runs for node in nodes] == [4, 6, 4, 6, 7, *FULL, 4]

    run(test)


def test_under_load_one_row_of_every_certified_request_is_audited_exactly_once() -> None:
    """Requests of several rows, batches mixed with others, deadlines that cut short. All rows of a request once were
    audited: copies of one image, three in a row, raised the alarm."""

    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1, max_queue_rows=10_000) as b:
            rng = np.random.default_rng(5)
            tasks: list[asyncio.Task[Answer]] = []
            for number in range(100):
                pixels = rng.random(2)
                tasks.append(b.ask(*pixels, **CERTIFIED, budget_s=0.5 if number % 2 else None))
                tasks.append(b.ask(*pixels, exit_at=0.9, asked_as="confidence"))
                tasks.append(b.ask(*pixels))
                if number % 10 == 0:
                    await asyncio.sleep(0)
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            certified = [answer for answer in answers[::3] if isinstance(answer, Answer)]
            assert certified
            assert all(isinstance(a, (Answer, DeadlineExpired)) for a in answers)
            expected = len(certified)
            audits, _ = await audited(b, expected)
            assert audits == expected

    run(test)


def test_audits_wait_for_an_idle_moment() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            tasks: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                tasks.append(b.ask(0.1, **CERTIFIED, budget_s=0.003))
                tasks.extend(b.ask(0.02, 0.02, exit_at=0.99, asked_as="confidence") for _ in range(12))

            await b.held(start)
            await asyncio.gather(*tasks)
            assert await audited(b, 1) == (1, 1)
            *before, _ = [(node, count) for nodes, count, _ in b.runner.runs for node in nodes]
            assert before[-7:] == [(node, 1) for node in FULL]  # the audit, alone and after all else
            assert sum(count for _, count in before[:-7]) == 1 + 1 + 24 * (3 + 7)

    run(test)


def test_an_audit_that_waited_too_long_is_done_although_clients_wait() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            drift = b.engine.drift(b.model)
            assert drift is not None
            busy = True

            async def ask() -> None:
                while busy:
                    await b.ask(0.2, path=(4,))

            asking = [asyncio.create_task(ask()) for _ in range(20)]
            await b.ask(0.1, **CERTIFIED)
            for _ in range(50):
                await b.ask(0.2, path=(4,))
            assert drift.alarms[0.05].audits == 0
            b.clock.now_s += PATIENCE_S
            while drift.alarms[0.05].audits == 0:
                await asyncio.sleep(0)
            busy = False
            await asyncio.gather(*asking)

    run(test)


def test_waiting_audits_take_no_places_in_the_queue() -> None:
    """At a rate of 1 they once filled it, and clients got 429: here 20 wait, beside two clients with a row each."""

    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:

            async def fill() -> None:
                for _ in range(20):
                    await b.ask(0.85, **CERTIFIED)

            busy = True

            async def ask() -> None:
                while busy:
                    await b.ask(0.2, path=(4,))

            asking = [asyncio.create_task(ask()), asyncio.create_task(ask())]  # so that there is no idle moment
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(b.engine, "max_queue_rows", 6)
                await fill()
            busy = False
            await asyncio.gather(*asking)
            assert (await audited(b, 20)) == (20, 0)

    run(test)


def test_a_raised_alarm_turns_early_exits_off_for_its_level_until_it_is_reset() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            drift = b.engine.drift(b.model)
            assert drift is not None
            assert b.metric("hbll_drift_alarm", epsilon="0.05") == 0
            while not drift.raised:
                await b.ask(0.1, **CERTIFIED)
                await audited(b, 0)
            assert drift.raised == [0.05]
            assert b.metric("hbll_drift_alarm", epsilon="0.05") == 1
            audits = drift.alarms[0.05].audits
            answer = await b.ask(0.1, 0.85, **CERTIFIED)
            assert [(row.path, row.stopped_by) for row in answer.rows] == [(FULL, "complete")] * 2
            assert (await b.ask(0.1, **CERTIFIED, budget_s=0.0025)).rows[0].stopped_by == "budget"
            assert (await audited(b, 0))[0] == audits  # nothing to learn from those
            other = await b.ask(0.1, exit_at=0.65, asked_as="risk", risk=0.2)
            assert other.rows[0].stopped_by == "risk"
            drift.reset()
            assert (await b.ask(0.85, **CERTIFIED)).rows[0].path == (4,)
            assert b.metric("hbll_drift_alarm", epsilon="0.05") == 0
            assert (await audited(b, 1)) == (1, 0)

    run(test)


def test_requests_that_fail_are_not_audited_and_leave_nothing_behind() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            b.runner.error = RuntimeError("broken")
            with pytest.raises(InferenceFailed):
                await b.ask(0.1, **CERTIFIED)
            b.runner.error = None
            assert await audited(b, 0) == (0, 0)

    run(test)


def test_an_audit_whose_run_fails_is_given_up_and_the_engine_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            failed = threading.Event()

            def before(nodes: tuple[int, ...]) -> None:
                if nodes == FULL and not failed.is_set():
                    failed.set()
                    raise RuntimeError("broken")

            b.runner.before = before
            assert (await b.ask(0.1, **CERTIFIED)).rows
            await asyncio.to_thread(failed.wait, 30)
            assert (await b.ask(0.85, **CERTIFIED)).rows
            assert await audited(b, 1) == (1, 0)

    run(test)
    assert "RuntimeError: broken" in caplog.text


def test_audits_end_with_the_server() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            reached = asyncio.Event()
            loop = asyncio.get_running_loop()

            def before(nodes: tuple[int, ...]) -> None:
                if nodes == FULL:
                    loop.call_soon_threadsafe(reached.set)
                    assert b.runner.go.wait(30)

            b.runner.before = before
            answers = asyncio.gather(*(b.ask(0.1, **CERTIFIED) for _ in range(20)))
            await answers
            b.runner.go.clear()
            await reached.wait()
            stopping = asyncio.create_task(b.engine.stop())
            await asyncio.sleep(0)
            b.runner.go.set()
            await stopping
            with pytest.raises(NotReady):
                await b.ask(0.1, **CERTIFIED)

    run(test)


def test_audits_of_a_model_end_with_its_replacement() -> None:
    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            new = fake_model(runner=b.runner, version=2, levels=LEVELS, audit_rate=1)
            await asyncio.to_thread(new.warm_up, 8, b.clock, lambda: False)
            b.runner.runs.clear()

            async def start() -> None:
                await asyncio.sleep(0)
                b.engine.add(new)
                b.engine.retire(b.model)

            await b.ask(*[0.1] * 8, **CERTIFIED)
            await b.held(start)
            now = b.clock()
            while b.engine.drift(b.model) is not None:
                await b.engine.submit(new, rows(0.2), Wish(path=(4,)), now)
            assert not b.engine._audits
            drift = b.engine.drift(new)
            assert drift is not None
            await b.engine.submit(new, rows(0.1), Wish(**CERTIFIED), now)  # type: ignore[arg-type]
            while drift.alarms[0.05].audits == 0:
                await asyncio.sleep(0)

    run(test)


def test_only_certified_requests_are_audited_and_at_the_rate_that_is_set() -> None:
    watch = DriftWatch(("m", "1"), fake_manifest({(4,): 0.5, (4, 6): 0.6}, levels=LEVELS), 0.25, Metrics(), seed=1)
    certified = Wish(exit_at=0.75, asked_as="risk", risk=0.05)
    assert watch.admit(Wish(exit_at=0.75, asked_as="confidence")) == (Wish(exit_at=0.75, asked_as="confidence"), False)
    assert 200 < sum(watch.admit(certified)[1] for _ in range(1000)) < 300
    never = DriftWatch(("m", "1"), fake_manifest({(4,): 0.5, (4, 6): 0.6}, levels=LEVELS), 0.0, Metrics())
    assert not any(never.admit(certified)[1] for _ in range(1000))


def test_who_leaves_is_audited_all_the_same() -> None:
    """Clients leave where it takes long, which is where nothing exits early: without them the others' risk looked higher
    than it was."""

    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            b.runner.go.clear()
            b.runner.began.clear()
            leaving = b.ask(0.1, **CERTIFIED)
            await asyncio.to_thread(b.runner.began.wait, 30)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            b.runner.go.set()
            assert await audited(b, 1) == (1, 1)

    run(test)


def test_who_leaves_a_model_that_is_replaced_is_audited_no_more() -> None:
    """Bug found: the audit came to a policy that was gone, and the requests of all models failed with it."""

    async def test() -> None:
        async with bench(levels=LEVELS, audit_rate=1) as b:
            new = fake_model(runner=b.runner, version=2, levels=LEVELS, audit_rate=0)
            await asyncio.to_thread(new.warm_up, 8, b.clock, lambda: False)
            b.engine.add(new)
            b.runner.go.clear()
            b.runner.began.clear()
            leaving = b.ask(0.1, **CERTIFIED)
            await asyncio.to_thread(b.runner.began.wait, 30)
            b.engine.retire(b.model)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            assert not b.engine._audits
            b.runner.go.set()
            while b.engine.drift(b.model) is not None:
                await asyncio.sleep(0)
            assert (await b.engine.submit(new, rows(0.2), Wish(), b.clock())).rows

    run(test)
