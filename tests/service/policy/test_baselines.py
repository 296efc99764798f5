from __future__ import annotations

import pytest

from service.policy.baselines import Aimd, Cheapest, MaxAccuracy, MaxBatch, SlackFit, Static
from service.policy.wish import Wish
from service.profile import Segment
from tests.service.policy.play import MAX_BATCH, Come, Device, Played, make_offer, play


def latency_s(path, rows: int = 1) -> float:
    return make_offer().profile.latency_s(Segment(path, embed=True), rows)


REFERENCE = make_offer().reference
FRONT = make_offer().front


def test_static_answers_all_on_its_path_in_batches_as_large_as_they_come() -> None:
    offer = make_offer()
    device = Device(Static(offer, (4, 6)), offer).play(Come(0.0, Wish(deadline_s=1.0)) for _ in range(MAX_BATCH + 1))
    assert [len(batch.rows) for batch in device.batches] == [MAX_BATCH, 1]
    assert {row.answered for row in device.rows} == {(4, 6)}
    assert {row.stopped_by for row in device.rows} == {"load"}


def test_aimd_grows_by_one_and_shrinks_by_a_tenth() -> None:
    offer = make_offer(largest=16)
    policy = Aimd(offer, (4,))
    device = Device(policy, offer).play(Come(0.0, Wish(deadline_s=10.0)) for _ in range(15))
    assert [len(batch.rows) for batch in device.batches] == [1, 2, 3, 4, 5]
    assert policy.choose(1.0, 1)[1] == 6
    Device(policy, offer, now_s=device.now_s).play([Come(device.now_s, Wish(deadline_s=device.now_s + 1e-6))])
    assert policy.choose(1.0, 1)[1] == 5


def test_cheapest_is_the_shallowest_within_its_tolerance() -> None:
    offer = make_offer()
    assert Cheapest(offer).choose(1.0, 1)[0] == FRONT[-2]
    assert Cheapest(offer, tolerance=1.0).choose(1.0, 1)[0] == FRONT[0]
    assert Cheapest(offer, tolerance=0.0).choose(1.0, 1)[0] == REFERENCE


def test_max_accuracy_takes_the_best_path_first_and_max_batch_the_most_rows() -> None:
    slack_s = latency_s(REFERENCE)
    assert MaxAccuracy(make_offer()).choose(slack_s, MAX_BATCH) == (REFERENCE, 1)
    path, rows = MaxBatch(make_offer()).choose(slack_s, MAX_BATCH)
    assert rows == MAX_BATCH
    assert path == next(each for each in reversed(FRONT) if latency_s(each, MAX_BATCH) <= slack_s) != REFERENCE


@pytest.mark.parametrize("policy", [MaxAccuracy, MaxBatch, SlackFit])
def test_without_any_slack_it_is_one_row_on_the_shallowest_path(policy) -> None:
    assert policy(make_offer()).choose(-1.0, 9) == (FRONT[0], 1)


@pytest.mark.parametrize("policy", [MaxAccuracy, MaxBatch, SlackFit])
def test_with_all_the_time_it_is_the_reference_path(policy) -> None:
    assert policy(make_offer()).choose(1.0, 1)[0] == REFERENCE


@pytest.mark.parametrize("slack_s", [0.002, 0.003, 0.005, 0.01, 0.02])
def test_what_slackfit_chooses_fits(slack_s: float) -> None:
    path, rows = SlackFit(make_offer()).choose(slack_s, 100)
    assert latency_s(path, rows) <= slack_s
    width_s = (latency_s(REFERENCE, MAX_BATCH) - latency_s(FRONT[0], 1)) / 20
    best_s = max(latency_s(p, n) for p in FRONT for n in (1, 2, 4) if latency_s(p, n) <= slack_s)
    assert best_s - latency_s(path, rows) <= width_s


def test_clockwork_drops_heads_that_cannot_be_in_time_and_answers_the_others_in_time() -> None:
    budgets = [0.9, 1.1, 1.2, 3.0]
    device = play("clockwork", [Come(0.0, Wish(deadline_s=latency_s(REFERENCE) * budget)) for budget in budgets])
    assert [row.fate for row in device.rows] == ["refused", "done", "refused", "done"]
    assert all(row.in_time for row in device.rows if row.fate == "done")


def test_rows_with_a_confidence_climb_together() -> None:
    device = play("max-accuracy", [Come(0.0, Wish(exit_at=0.9), (0.5,))] * 3)
    assert [len(batch.rows) for batch in device.batches] == [3] * len(device.offer.climb)


def test_a_climbing_row_is_answered_when_its_time_is_up_while_others_run() -> None:
    """Bug found: it waited with its answer until the others had run, and then ran deeper, late."""
    offer = make_offer()
    policy = Static(offer, REFERENCE)
    device = Device(policy, offer)
    climbing = Played(Wish(exit_at=1.0, deadline_s=latency_s((4,)) * 2.2), 0.0, 0, come=Come(0.0, Wish()))
    policy.arrive(climbing, 0.0)
    device.run(policy.decide(0.0).batch)  # type: ignore[arg-type]
    policy.arrive(Played(Wish(deadline_s=latency_s((4,)) * 2.1), 0.0, 1, come=Come(0.0, Wish())), 0.0)
    decision = policy.decide(device.now_s)
    assert [row.order for row in decision.batch.rows] == [1]  # type: ignore[union-attr]
    assert decision.done == [(climbing, "budget")]


def test_a_strict_row_is_refused_rather_than_run_in_a_batch_that_is_late() -> None:
    offer = make_offer()
    device = Device(Static(offer, REFERENCE), offer).play([Come(0.0, Wish(deadline_s=latency_s((4,)), strict=True))])
    assert device.rows[0].fate == "refused"
    assert device.batches == []
