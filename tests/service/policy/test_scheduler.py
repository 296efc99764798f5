from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.policy.scheduler import Scheduler
from service.policy.wish import Wish
from tests.service.policy.play import BLOCK_S, NAMES, Come, Device, make, make_offer, plays


def devices(*policies: str) -> tuple[Scheduler[str], dict[str, Device]]:
    """Models a, b, ..., with these policies, and the books of each."""
    scheduler: Scheduler[str] = Scheduler()
    books = {}
    for key, name in zip("abc", policies, strict=False):
        offer = make_offer()
        books[key] = Device(make(name, offer), offer)
        scheduler.policies[key] = books[key].policy
    return scheduler, books


def share(scheduler: Scheduler[str], books: dict[str, Device], traces: dict[str, list[Come]]) -> list[str]:
    """Play the models' traces on one device until all is done; whose batches ran, in order."""
    for key, device in books.items():
        device.events = sorted((come.at_s, place, come) for place, come in enumerate(traces.get(key, [])))
    now_s, order = 0.0, []
    for _ in range(10_000):
        for device in books.values():
            device.now_s = now_s
            device.happens(now_s)
        decisions, key, batch = scheduler.decide(now_s)
        for decision in decisions:
            owners = {id(row): device for device in books.values() for row in device.rows}
            for rows in ([row for row, _ in decision.done], decision.expired, decision.refused):
                assert len({id(owners[id(row)]) for row in rows}) <= 1
            some = [*(row for row, _ in decision.done), *decision.expired, *decision.refused]
            if some:
                owners[id(some[0])].note(decision)
        if batch is not None:
            assert key is not None
            order.append(key)
            books[key].run(batch)
            now_s = books[key].now_s
            continue
        wake_s = scheduler.wake_s()
        assert wake_s > now_s
        now_s = min(wake_s, *(device.events[0][0] if device.events else math.inf for device in books.values()))
        if now_s == math.inf:
            assert scheduler.waiting() == 0
            return order
    raise AssertionError("the policies come to no end")


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.data())
@settings(max_examples=60)
def test_no_row_of_any_model_is_lost(names, data) -> None:
    scheduler, books = devices(*names)
    traces = {key: data.draw(plays())[1] for key in books}
    known = set(books["a"].offer.accuracies)
    traces = {k: [c for c in trace if c.wish.path is None or c.wish.path in known] for k, trace in traces.items()}
    share(scheduler, books, traces)
    for device in books.values():
        assert device.policy.waiting() == 0
        assert all(row.fate for row in device.rows)


@pytest.mark.parametrize("name", ["ladder-edf", "max-batch"])
def test_the_model_with_the_most_urgent_row_goes_first(name: str) -> None:
    scheduler, books = devices(name, name)
    traces = {"a": [Come(0.0, Wish(deadline_s=0.5))], "b": [Come(0.0, Wish(deadline_s=0.1))]}
    assert share(scheduler, books, traces)[0] == "b"


def test_deeper_work_of_one_model_leaves_the_other_in_time() -> None:
    """Both climb in between, and every first answer is in time: the device is shared by what each can spare."""
    scheduler, books = devices("ladder-edf", "ladder-edf")
    gap_s = 6 * BLOCK_S
    traces = {
        key: [Come(gap_s * (i + shift), Wish(deadline_s=gap_s * (i + shift) + 0.02)) for i in range(100)]
        for key, shift in (("a", 0.0), ("b", 0.5))
    }
    share(scheduler, books, traces)
    for device in books.values():
        assert all(row.in_time for row in device.rows)
        assert sum(len(row.answers[-1]) for row in device.rows) > 1.5 * len(device.rows)


@pytest.mark.parametrize("name", ["ladder-edf", "max-batch"])
def test_neither_starves_when_both_ask_too_much(name: str) -> None:
    scheduler, books = devices(name, name)
    gap_s = BLOCK_S / 4
    crowd = [Come(gap_s * i, Wish(deadline_s=gap_s * i + 0.03), (0.9,)) for i in range(600)]
    share(scheduler, books, {"a": crowd, "b": crowd})
    answered = [sum(row.in_time for row in device.rows) for device in books.values()]
    assert min(answered) > 0.5 * max(answered) > 0


def test_a_row_with_a_confidence_and_no_budget_gets_its_turn_beside_a_model_that_asks_too_much() -> None:
    scheduler, books = devices("ladder-edf", "ladder-edf")
    gap_s = BLOCK_S / 4
    crowd = [Come(gap_s * i, Wish(deadline_s=gap_s * i + 0.03), (0.9,)) for i in range(1500)]
    patient = [Come(0.0, Wish(exit_at=1.0, patience_s=0.05))]
    share(scheduler, books, {"a": crowd, "b": patient})
    (row,) = books["b"].rows
    assert row.stopped_by == "complete"
    assert row.at_s < 0.2


def test_without_models_there_is_nothing_to_do() -> None:
    scheduler: Scheduler[str] = Scheduler()
    assert scheduler.decide(0.0) == ([], None, None)
    assert scheduler.wake_s() == math.inf
    assert scheduler.waiting() == 0
