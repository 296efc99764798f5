from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from service.policy.ladder_edf import LadderEdf
from service.policy.state import Batch
from service.policy.wish import Wish
from service.profile import Segment
from tests.service.policy.play import BLOCK_S, FAMILIES, LADDER, MAX_BATCH, Come, Device, Played, make_offer, play

FIRST = Segment((4,), embed=True)
FIRST_S = make_offer().profile.latency_s(FIRST, 1)
CAPACITY = MAX_BATCH / make_offer().profile.latency_s(FIRST, MAX_BATCH)
"""First answers per second, in full batches."""


def steady(rate: float, budget_s: float, count: int, confidences: Sequence[float] = (0.9,)) -> list[Come]:
    return [Come(i / rate, Wish(deadline_s=i / rate + budget_s), confidences) for i in range(count)]


def feasible(times: list[tuple[float, float]]) -> bool:
    """Whether one row after another, earliest deadline first and never waiting for the next, are in time; arrivals and
    deadlines."""
    now_s, waiting, coming = 0.0, [], sorted(times)
    while waiting or coming:
        if not waiting:
            now_s = max(now_s, coming[0][0])
        while coming and coming[0][0] <= now_s:
            waiting.append(coming.pop(0)[1])
        waiting.sort()
        now_s += FIRST_S
        if now_s > waiting.pop(0):
            return False
    return True


@given(st.lists(st.tuples(st.just(0.0), st.floats(0.0, 0.05)), min_size=1, max_size=20))
@settings(max_examples=60)
def test_what_can_be_in_time_one_by_one_is_in_time(times) -> None:
    """All come at once and the profile is exact."""
    assume(feasible(times))
    device = play("ladder-edf", [Come(at_s, Wish(deadline_s=due_s)) for at_s, due_s in times])
    assert all(row.in_time for row in device.rows)


@given(st.lists(st.floats(0.0, 0.01), min_size=1, max_size=30), st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=40)
def test_nobody_expires_whose_budget_is_longer_than_all_the_work(gaps, family) -> None:
    offer = make_offer(FAMILIES[family])
    work_s = sum(offer.profile.latency_s(Segment(path, embed=True), 1) for path in offer.climb) * (len(gaps) + 1)
    at_s, trace = 0.0, []
    for gap_s in gaps:
        at_s += gap_s
        trace.append(Come(at_s, Wish(deadline_s=at_s + work_s)))
    assert all(row.in_time for row in play("ladder-edf", trace, offer).rows)


SURE = {(4,): 0.9, (4, 6): 0.92, (4, 6, 7): 0.94}
"""One answer in ten is wrong, so one row in five is expected to be unsure."""


@pytest.mark.parametrize(
    ("rows", "waits_s", "budget_s", "path"),
    [
        (2, 0.0, 0.0084, (4, 6)),  # 3.2 ms; 1.95 and 1.6 in two runs
        (4, 0.0, 0.0106, (4,)),  # 4.2 ms; 2.45 and 1.6
        (4, 0.0005, 0.0106, (4, 6)),  # 4.7 ms; 2.95 and 2.1
    ],
)
def test_first_answers_are_deeper_where_one_run_takes_less_than_two(
    rows: int, waits_s: float, budget_s: float, path: tuple[int, ...]
) -> None:
    """The reference path takes longer than a run may, for those who come meanwhile."""
    offer = make_offer(SURE)
    offer.profile.observe(FIRST, 1, FIRST_S, waits_s)
    device = play("ladder-edf", [Come(0.0, Wish(deadline_s=budget_s), (0.9,)) for _ in range(rows)], offer)
    assert device.batches[0].segment == Segment(path, embed=True)
    assert len(device.batches[0].rows) == rows
    assert all(row.in_time for row in device.rows)


def test_an_event_loop_that_is_far_behind_makes_nobody_too_late_for_a_first_answer() -> None:
    """Rows once waited behind all others, and expired, because requests had lately waited longer than their budget before
    anybody saw them; with nothing run, nothing was learned, and so it stayed."""
    offer = make_offer(LADDER)
    for _ in range(50):
        offer.profile.observe(FIRST, 1, FIRST_S, 0.0)
    for _ in range(2):  # what runs are expected to wait is a lower quantile than that
        offer.profile.observe(FIRST, 1, FIRST_S, 1.0)
    assert offer.profile.lag_s == 1.0
    assert offer.profile.latency_s(FIRST, 1) == FIRST_S
    device = play("ladder-edf", steady(CAPACITY / 2, 0.02, 40, (0.5,)), offer)
    assert all(row.in_time for row in device.rows)
    assert {row.answered for row in device.rows} == {(4,)}  # and nothing else


@pytest.mark.parametrize("strict", [False, True])
def test_who_might_be_late_and_likely_is_not_is_not_given_up(strict: bool) -> None:
    """In a crowd one run in ten waits long. Rows that had no time for that were put behind all others and expired, which
    kept those who would have been in time from it."""
    offer = make_offer(LADDER)
    for number in range(50):
        offer.profile.observe(FIRST, 1, FIRST_S, 1.0 if number % 10 == 0 else 0.0)
        offer.profile.observe_send(1.0 if number % 10 == 0 else 0.0)
    assert offer.profile.latency_s(FIRST, 1) > 1
    assert offer.reserve_s == 1
    trace = [Come(i / CAPACITY, Wish(deadline_s=i / CAPACITY + 0.02, strict=strict), (0.5,)) for i in range(40)]
    device = play("ladder-edf", trace, offer)
    assert all(row.in_time for row in device.rows)
    assert len(device.batches) < len(device.rows)


def test_who_has_a_wish_of_confidence_is_answered_rung_by_rung_whatever_runs_cost() -> None:
    offer = make_offer(SURE)
    offer.profile.observe(FIRST, 1, FIRST_S, 0.01)
    wish = Wish(exit_at=0.8, asked_as="confidence", deadline_s=0.1)
    device = play("ladder-edf", [Come(0.0, wish, (0.9,)) for _ in range(2)], offer)
    assert [batch.segment for batch in device.batches] == [FIRST]


@pytest.mark.parametrize("load", [0.1, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("budget_s", [0.01, 0.03, 0.1])
def test_below_capacity_every_answer_is_in_time(load: float, budget_s: float) -> None:
    device = play("ladder-edf", steady(load * CAPACITY, budget_s, 400, (0.3, 0.9, 0.6)))
    assert all(row.in_time for row in device.rows)


def test_below_capacity_first_answers_are_in_time_among_paths_and_patient_rows() -> None:
    """Explicit paths wait for one run at most, and their own work is little: a quarter of the device's time."""
    trace = steady(0.3 * CAPACITY, 0.04, 300, (0.3, 0.9, 0.6))
    for place in range(0, 300, 20):
        at_s = trace[place].at_s
        trace.append(Come(at_s, Wish(path=(4, 5, 6), deadline_s=at_s + 0.04)))
        trace.append(Come(at_s, Wish(exit_at=0.8), (0.3, 0.5)))
    device = play("ladder-edf", trace)
    assert all(row.in_time for row in device.rows)


def test_a_longer_path_is_not_made_late_by_those_who_join_its_first_block() -> None:
    """Bug found: only the shared block was looked at, so a row with a longer path was stopped after it, for company, and
    had no time left for the rest."""
    offer = make_offer(LADDER)
    profile = offer.profile
    alone_s = profile.latency_s(Segment((4, 6), embed=True), 1)
    shared_s = profile.latency_s(FIRST, 2) + profile.latency_s(Segment((6,), embed=False), 1)
    tight = Come(0.0, Wish(path=(4, 6), deadline_s=(alone_s + shared_s) / 2))
    device = play("ladder-edf", [tight, Come(0.0, Wish(path=(4,), deadline_s=0.1))], offer)
    assert all(row.in_time for row in device.rows)
    roomy = Come(0.0, Wish(path=(4, 6), deadline_s=0.05))
    device = play("ladder-edf", [roomy, Come(0.0, Wish(path=(4,), deadline_s=0.1))], offer)
    assert len(device.batches[0].rows) == 2


def depth_alone(budget_s: float, family: str, confidence: float) -> Played:
    device = play("ladder-edf", [Come(0.0, Wish(deadline_s=budget_s), (confidence,))], make_offer(FAMILIES[family]))
    return device.rows[0]


@given(st.lists(st.floats(0.0, 0.1), min_size=2, max_size=8), st.sampled_from(sorted(FAMILIES)), st.floats(0, 1))
@example([0.0078125, 0.01171875], "all", 0.0)  # time for the last path in one run, and not in as many as it is cut into
@example([0.009765625, 0.01171875], "front", 0.0)  # time to go straight to a path from which the last one starts again
@settings(max_examples=60)
def test_alone_more_time_never_gives_a_worse_path(budgets, family, confidence) -> None:
    accuracies = FAMILIES[family]
    answers = [depth_alone(budget_s, family, confidence).answered for budget_s in sorted(budgets)]
    worth = [accuracies[path] if path else 0.0 for path in answers]
    assert worth == sorted(worth)


def test_alone_with_time_a_row_gets_the_reference_path_in_one_run() -> None:
    for wish in (Wish(deadline_s=1.0), Wish()):
        device = play("ladder-edf", [Come(0.0, wish)])
        (row,) = device.rows
        assert (row.answered, row.stopped_by) == (device.offer.reference, "complete")
        assert [batch.segment for batch in device.batches] == [Segment(device.offer.reference, embed=True)]


def test_alone_with_little_time_a_row_gets_what_fits() -> None:
    row = depth_alone(FIRST_S * 1.01, "ladder", 0.5)
    assert (row.answered, row.stopped_by) == ((4,), "budget")
    assert row.in_time


@pytest.mark.parametrize("load", [1.5, 2.0, 4.0])
def test_under_overload_most_of_the_capacity_is_still_in_time(load: float) -> None:
    trace = steady(load * CAPACITY, 0.02, 2000)
    answered = sum(row.in_time for row in play("ladder-edf", trace).rows)
    assert answered >= 0.7 * CAPACITY * trace[-1].at_s


def test_late_rows_wait_until_nobody_else_needs_the_device() -> None:
    hopeless = [Come(0.0, Wish(deadline_s=FIRST_S / 2)), Come(0.0005, Wish(deadline_s=0.0005 + FIRST_S * 0.99))]
    good = [Come(0.0, Wish(deadline_s=0.005))] * 3
    device = play("ladder-edf", [*hopeless, *good])
    assert [row.fate for row in device.rows] == ["expired"] + ["done"] * 3 + ["expired"]
    assert all(row.in_time for row in device.rows if row.fate == "done")


def test_a_late_row_alone_is_answered_late_rather_than_not() -> None:
    (row,) = play("ladder-edf", [Come(0.0, Wish(deadline_s=FIRST_S / 2))]).rows
    assert (row.fate, row.answered, row.in_time) == ("done", (4,), False)


def test_a_strict_row_that_cannot_be_in_time_is_refused_at_once() -> None:
    (row,) = play("ladder-edf", [Come(0.0, Wish(deadline_s=FIRST_S / 2, strict=True))]).rows
    assert (row.fate, row.at_s, row.runs) == ("refused", 0.0, [])


def test_paths_that_go_to_the_same_block_share_a_batch() -> None:
    wishes = [Wish(path=(4, 6, 7)), Wish(path=(4, 5, 6)), Wish(exit_at=0.9), Wish(path=(4,))]
    device = play("ladder-edf", [Come(0.0, wish) for wish in wishes])
    first = device.batches[0]
    assert first.segment == FIRST
    assert len(first.rows) == 4
    assert first.predict
    assert first.keep_state


def test_rows_deeper_on_the_ladder_are_joined_by_newcomers_to_the_same_block() -> None:
    """A row with a confidence has its first answer; another, on an explicit path, has been through the same block."""
    device = play("ladder-edf", [Come(0.0, Wish(exit_at=0.9)), Come(0.0, Wish(path=(4, 6)))])
    assert [(batch.segment.nodes, len(batch.rows)) for batch in device.batches[:2]] == [((4,), 2), ((6,), 2)]


def test_a_block_dearer_than_the_first_is_still_run_for_one_row() -> None:
    """Bug found: a run was to last at most a share of the tightest budget or one *first* block. After a tight budget, rows
    whose next block takes longer than that waited beside an idle device until it was too late."""
    offer = make_offer(LADDER, costs={6: 8.0})
    tight, roomy = Come(0.0, Wish(deadline_s=1.5 * FIRST_S)), Come(0.01, Wish(deadline_s=0.2), (0.1,))
    row = play("ladder-edf", [tight, roomy], offer).rows[1]
    assert row.answered == (4, 6, 7)
    assert row.at_s < 0.05


def test_when_to_wake_is_after_now_and_then_something_happens() -> None:
    """Bug found: asked at exactly the time it had named, the policy had nothing to do and named the same time again."""
    offer = make_offer()
    policy = LadderEdf(offer)
    device = Device(policy, offer)
    row = Played(Wish(deadline_s=0.25), 0.0, 0, come=Come(0.0, Wish()))
    policy.arrive(row, 0.0)
    policy._tightest_s = 0.0  # too short a quantum for the reference path in one run
    device.run(policy.decide(0.0).batch)  # type: ignore[arg-type]
    assert policy.decide(device.now_s, spare_s=0.0).batch is None  # another model needs the device
    wake_s = policy.wake_s()
    assert device.now_s < wake_s < math.inf
    assert policy.settle(wake_s, wake_s).done == [(row, "load")]
    assert policy.wake_s() == math.inf


def test_while_requests_wait_unread_nothing_that_starts_anew_for_a_deeper_answer_joins_a_first_one() -> None:
    offer = make_offer(FAMILIES["restart"])
    policy = LadderEdf(offer)
    device = Device(policy, offer)
    climber = Played(Wish(exit_at=1.0), 0.0, 0, come=Come(0.0, Wish()))
    policy.arrive(climber, 0.0)
    while climber.answered is None or not climber.rest.embed:
        device.run(policy.decide(device.now_s).batch)  # type: ignore[arg-type]
    newcomer = Played(Wish(path=climber.target), device.now_s, 1, come=Come(0.0, Wish()))
    policy.arrive(newcomer, device.now_s)
    assert newcomer.rest == climber.rest
    batch = policy.decide(device.now_s, crowded=True).batch
    assert batch is not None
    assert batch.rows == [newcomer]


def test_while_requests_wait_unread_first_answers_alone_are_run_each_to_the_shallowest_path() -> None:
    offer = make_offer()
    policy = LadderEdf(offer)
    device = Device(policy, offer)
    rows = [Played(Wish(deadline_s=1.0), 0.0, order, come=Come(0.0, Wish())) for order in range(2)]
    policy.arrive(rows[0], 0.0)
    device.run(policy.decide(0.0, crowded=True).batch)  # type: ignore[arg-type]
    assert rows[0].answered == offer.climb[0]  # though it was alone
    policy._price.per_second = 1.0
    decision = policy.decide(device.now_s, crowded=True)
    assert decision.batch is None
    assert decision.done == []  # there may be time for more yet
    device.now_s += 0.1
    policy.arrive(rows[1], device.now_s)
    device.run(policy.decide(device.now_s, crowded=True).batch)  # type: ignore[arg-type]
    assert rows[1].answered == offer.climb[0]
    assert policy._price.per_second == 1.0  # nobody idled
    policy._price.per_second = 0.0
    batch = policy.decide(device.now_s).batch
    assert batch is not None
    assert {row.order for row in batch.rows} == {0, 1}


def test_a_row_that_has_left_is_told_of_no_more() -> None:
    offer = make_offer({(4,): 0.6})
    policy = LadderEdf(offer)
    device = Device(policy, offer)
    row = Played(Wish(), 0.0, 0, come=Come(0.0, Wish()))
    policy.arrive(row, 0.0)
    device.run(policy.decide(0.0).batch)  # type: ignore[arg-type]
    policy.leave(row)
    assert policy.decide(device.now_s).done == []


def test_rows_that_are_gone_are_not_kept_until_their_deadline() -> None:
    """Bug found: what was noted of when to give a row up stayed, with the row and its input, until that time: an hour,
    if that was the budget."""
    offer = make_offer()
    policy = LadderEdf(offer)
    device = Device(policy, offer)
    for order in range(500):
        wish = Wish(exit_at=1.0, deadline_s=3600.0 if order else 10.0)
        row = Played(wish, device.now_s, order, come=Come(0.0, wish))
        policy.arrive(row, device.now_s)
        batch = policy.decide(device.now_s, spare_s=0.0).batch  # nothing deeper: another model needs the device
        assert batch is not None
        device.run(batch)
        if order:  # the first one waits on
            policy.leave(row)
    assert policy.waiting() == 1
    assert len(policy._deeper._until) < 100


def test_queues_of_paths_that_nobody_waits_for_are_forgotten() -> None:
    """Bug found: every segment ever wanted had a queue for good, and every decision looked at all of them."""
    offer = make_offer()
    policy = LadderEdf(offer)
    Device(policy, offer).play(Come(i * 0.01, Wish(path=path)) for i, path in enumerate(offer.accuracies))
    assert policy._first.waiting.queues == policy._deeper.waiting.queues == {}


def test_a_begun_path_that_is_late_is_finished_in_an_endless_crowd() -> None:
    """Bug found: past its deadline it was put behind those that were just in time, again and again."""
    gap_s = BLOCK_S * 0.2
    crowd = [Come(gap_s * i, Wish(deadline_s=gap_s * i + 0.02)) for i in range(1500)]
    path = Come(0.0, Wish(path=(2, 4, 6), deadline_s=0.007, patience_s=0.03))
    offer = make_offer()
    device = Device(LadderEdf(offer), offer, (1.0, 5.0, *(1.0,) * 10_000))  # its first run takes far too long
    device.play([path, *crowd])
    row = device.rows[0]
    assert row.fate == "done"
    assert 0.007 < row.at_s < 0.06


def test_a_plan_alone_with_time_is_the_reference_path_and_else_a_climb() -> None:
    policy = LadderEdf(make_offer())
    assert [step.path for step in policy.foresee(Wish(deadline_s=1.0), 1, 0.0)] == [policy._offer.reference]
    assert [step.path for step in policy.foresee(Wish(exit_at=0.9), 1, 0.0)] == list(policy._offer.climb)
    assert [step.path for step in policy.foresee(Wish(deadline_s=FIRST_S * 1.1), 1, 0.0)] == [(4,)]


def test_a_plan_sees_who_is_more_urgent() -> None:
    policy = LadderEdf(make_offer())
    alone = policy.foresee(Wish(exit_at=0.9, deadline_s=1.0), 1, 0.0)[0].by_s
    for order in range(10):
        policy.arrive(Played(Wish(deadline_s=0.5), 0.0, order, come=Come(0.0, Wish())), 0.0)
    crowded = policy.foresee(Wish(exit_at=0.9, deadline_s=1.0), 1, 0.0)[0].by_s
    urgent = policy.foresee(Wish(exit_at=0.9, deadline_s=0.1), 1, 0.0)[0].by_s
    assert alone == urgent < crowded


def test_a_state_is_kept_for_every_path_that_may_follow() -> None:
    """Bug found: only for the next of the climb, where there is no ladder, though another may be chosen. The batch that
    then went on from no state failed."""
    offer = make_offer({(1, 2, 3, 4): 0.5, (1, 2, 4, 6, 7): 0.6, (1, 2, 3, 4, 6, 7): 0.7})
    assert offer.climb == ((1, 2, 3, 4), (1, 2, 4, 6, 7), (1, 2, 3, 4, 6, 7))
    row = Played(Wish(), 0.0, 0, come=Come(0.0, Wish()))
    row.target = offer.climb[0]
    assert Batch.of([row], Segment((1, 2, 3, 4), embed=True), offer).keep_state


def test_not_more_rows_wait_for_a_better_answer_than_will_get_one() -> None:
    """With long budgets they once filled the queue, and others were refused any answer."""
    offer = make_offer()
    policy = LadderEdf(offer)
    device = Device(policy, offer)
    most = 8 * offer.profile.max_batch
    played = [Played(Wish(deadline_s=1e6), 0.0, order, come=Come(0.0, Wish())) for order in range(4 * most)]
    for row in played:
        policy.arrive(row, 0.0)
    done = 0
    while done < len(played):
        decision = policy.decide(device.now_s)
        done += len(decision.done)
        assert policy._deeper.waiting.rows <= most
        if decision.batch is not None:
            device.run(decision.batch)
