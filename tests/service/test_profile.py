from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.profile import LatencyProfile, Parts, Segment, measure_parts, warm_up_profile
from tests.fakes import FakeClock, fake_parts

ONE, TWO = Segment((4,), embed=True), Segment((4, 6), embed=False)
PARTS = Parts(
    batches=(1, 2, 4),
    call=(1.0, 1.0, 2.0),
    embed=(0.5, 0.5, 0.5),
    head=(0.25, 0.25, 0.25),
    nodes={4: (1.0, 2.0, 4.0), 6: (2.0, 3.0, 5.0)},
)


def a_machine(clock: FakeClock) -> Callable[[Segment, int, bool], None]:
    """1 ms a call, 2 the embedding, 4 the head; block 4 takes a millisecond a row, block 6 three."""

    def run(segment: Segment, rows: int, predict: bool) -> None:
        blocks_ms = sum({4: 1, 6: 3}[node] for node in segment.nodes) * rows
        clock.now_s += 0.001 * (1 + 2 * segment.embed + 4 * predict + blocks_ms)

    return run


def test_a_run_takes_the_call_its_blocks_the_head_and_perhaps_the_embedding() -> None:
    profile = LatencyProfile(PARTS)
    assert profile.typical_s(ONE, 1) == 1.0 + 0.5 + 0.25 + 1.0
    assert profile.typical_s(TWO, 2) == 1.0 + 0.25 + 2.0 + 3.0
    assert profile.typical_s(Segment((), embed=False), 4) == 2.0 + 0.25


def test_between_batch_sizes_it_is_interpolated_and_beyond_the_largest_added_up() -> None:
    profile = LatencyProfile(PARTS)
    two, four = profile.typical_s(ONE, 2), profile.typical_s(ONE, 4)
    assert profile.typical_s(ONE, 3) == (two + four) / 2
    assert profile.typical_s(ONE, 0) == 0.0
    assert profile.typical_s(ONE, 8) == 2 * four
    assert profile.typical_s(ONE, 10) == 2 * four + two


def test_a_block_that_was_not_timed_is_an_error() -> None:
    with pytest.raises(KeyError):
        LatencyProfile(PARTS).typical_s(Segment((5,), embed=True), 1)
    with pytest.raises(KeyError):
        LatencyProfile(PARTS).latency_s(Segment((5,), embed=True), 9)


@given(st.integers(0, 20))
def test_before_any_run_the_typical_time_is_counted_on(rows) -> None:
    profile = LatencyProfile(PARTS)
    assert profile.latency_s(TWO, rows) == profile.typical_s(TWO, rows)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=120))
@settings(max_examples=50)
def test_what_is_counted_on_is_the_quantile_of_the_latest_fifty_runs(ratios) -> None:
    profile = LatencyProfile(PARTS)
    typical_s = profile.typical_s(ONE, 4)
    for ratio in ratios:
        profile.observe(ONE, 4, typical_s * ratio)
    latest = sorted(ratios[-50:])
    expected = latest[int(0.95 * (len(latest) - 1))]
    assert profile.ratio(4) == pytest.approx(expected)
    assert profile.latency_s(ONE, 4) == pytest.approx(expected * typical_s)
    assert profile.latency_s(TWO, 4) == pytest.approx(expected * profile.typical_s(TWO, 4)), "of whatever segment"
    assert profile.latency_s(ONE, 9) == pytest.approx(profile.typical_s(ONE, 9) * expected), "and of several batches"
    assert profile.latency_s(ONE, 1) == profile.typical_s(ONE, 1), "other batch sizes have their own"


def test_a_slow_spell_shows_after_a_few_runs_and_is_forgotten() -> None:
    profile = LatencyProfile(PARTS)
    typical_s = profile.typical_s(ONE, 1)
    for _ in range(50):
        profile.observe(ONE, 1, typical_s)
    for _ in range(6):
        profile.observe(ONE, 1, 3 * typical_s)
    assert profile.ratio(1) == 3.0
    for _ in range(50):
        profile.observe(ONE, 1, typical_s)
    assert profile.ratio(1) == 1.0


def test_a_size_that_is_not_run_any_more_learns_of_the_others() -> None:
    """Bug found: after a short slow spell large batches were thought to be slow, so that nobody ran one, for ever."""
    profile = LatencyProfile(PARTS)
    for _ in range(50):
        profile.observe(ONE, 4, 8 * profile.typical_s(ONE, 4))
    for _ in range(50):
        profile.observe(ONE, 1, profile.typical_s(ONE, 1))
    assert profile.ratio(4) == 8.0, "they say nothing of each other while both are run now and then"
    for _ in range(50):
        profile.observe(ONE, 1, profile.typical_s(ONE, 1))
    assert profile.ratio(4) == 1.0
    profile.observe(ONE, 4, 2 * profile.typical_s(ONE, 4))
    for _ in range(50):
        profile.observe(ONE, 1, 5 * profile.typical_s(ONE, 1))
    assert profile.ratio(4) == 1.0, "one run of its own, and it is as before"


def test_a_single_outlier_among_many_runs_is_not_counted_on() -> None:
    profile = LatencyProfile(PARTS)
    for number in range(40):
        profile.observe(ONE, 1, profile.typical_s(ONE, 1) * (100.0 if number == 20 else 1.0))
    assert profile.ratio(1) == 1.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=120))
@settings(max_examples=50)
def test_what_a_run_waits_for_is_added_whatever_its_size(waits) -> None:
    profile = LatencyProfile(PARTS)
    for waited_s in waits:
        profile.observe(ONE, 4, profile.typical_s(ONE, 4), waited_s)
    latest = sorted(waits[-50:])
    expected_s = latest[int(0.95 * (len(latest) - 1))]
    for segment, rows in ((ONE, 1), (ONE, 4), (TWO, 3)):
        assert profile.latency_s(segment, rows) == pytest.approx(profile.typical_s(segment, rows) + expected_s)
    assert profile.latency_s(ONE, 9) == pytest.approx(profile.typical_s(ONE, 9) + 3 * expected_s), (
        "three batches wait thrice"
    )
    for _ in range(50):
        profile.relax()
    assert profile.latency_s(ONE, 4) == profile.typical_s(ONE, 4)


def test_of_waits_and_of_sending_a_high_quantile_is_told() -> None:
    """One hiccup among many is not counted on, two are."""
    profile = LatencyProfile(fake_parts())
    assert (profile.lag_s, profile.send_s) == (0, 0)
    for waited_s in (*[0.001] * 40, 0.5):
        profile.observe(Segment((4,), embed=True), 1, 0.001, waited_s)
    for took_s in (*[0.002] * 150, 0.5):
        profile.observe_send(took_s)
    assert (profile.lag_s, profile.send_s) == (0.001, 0.002)
    profile.observe(Segment((4,), embed=True), 1, 0.001, 0.1)
    assert (profile.lag_s, profile.send_s) == (0.1, 0.002)


def test_runs_that_are_expected_to_take_no_time_teach_nothing() -> None:
    profile = LatencyProfile(fake_parts(block_s=0.0))
    profile.observe(ONE, 1, 1.0)
    assert profile.latency_s(ONE, 1) == 0.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"batches": (2, 4, 8)}, "rising batch sizes from 1"),
        ({"batches": (1, 4, 4)}, "rising batch sizes from 1"),
        ({"call": (1.0, 1.0)}, "for every batch size"),
        ({"nodes": {4: (1.0,)}}, "for every batch size"),
        ({"head": (1.0, -1.0, 1.0)}, "not negative"),
        ({"embed": (1.0, float("nan"), 1.0)}, "finite"),
        ({"batches": ()}, "at least 1"),
    ],
)
def test_parts_that_are_no_table_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Parts.model_validate(PARTS.model_dump() | change)


@pytest.mark.parametrize(("largest", "batches"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_parts_are_measured_at_powers_of_two_and_the_largest_batch(largest: int, batches: tuple[int, ...]) -> None:
    clock = FakeClock()
    parts = measure_parts(a_machine(clock), (4, 6), largest, clock)
    assert parts is not None
    assert parts.batches == batches
    assert parts.call == pytest.approx([0.001] * len(batches))
    assert parts.embed == pytest.approx([0.002] * len(batches))
    assert parts.head == pytest.approx([0.004] * len(batches))
    assert parts.nodes[4] == pytest.approx([0.001 * rows for rows in batches])
    assert parts.nodes[6] == pytest.approx([0.003 * rows for rows in batches])


def test_what_was_measured_predicts_whole_runs() -> None:
    clock = FakeClock()
    machine = a_machine(clock)
    parts = measure_parts(machine, (4, 6), 8, clock)
    assert parts is not None
    profile = LatencyProfile(parts)
    for rows in range(1, 9):
        start_s = clock()
        machine(Segment((4, 6), embed=True), rows, True)
        assert profile.typical_s(Segment((4, 6), embed=True), rows) == pytest.approx(clock() - start_s)


def test_the_first_run_of_a_kind_and_a_hiccup_do_not_count() -> None:
    clock = FakeClock()
    machine, seen, runs = a_machine(clock), set(), [0]

    def run(segment: Segment, rows: int, predict: bool) -> None:
        if (segment, rows, predict) not in seen:  # it compiles
            seen.add((segment, rows, predict))
            clock.now_s += 1.0
        runs[0] += 1
        if runs[0] % 7 == 0:
            clock.now_s += 0.5
        machine(segment, rows, predict)

    parts = measure_parts(run, (4,), 2, clock)
    assert parts is not None
    assert parts.nodes[4] == pytest.approx((0.001, 0.002))


def test_quick_runs_are_repeated_more_often() -> None:
    clock, counts = FakeClock(), []

    def run(segment: Segment, rows: int, predict: bool) -> None:
        counts.append(segment)
        clock.now_s += 0.0001 if segment.nodes else 0.1

    assert measure_parts(run, (4,), 1, clock) is not None
    quick, slow = counts.count(Segment((4,), embed=False)), counts.count(Segment((), embed=True))
    assert (quick, slow) == (31, 6)


def test_a_part_that_seems_to_take_less_than_nothing_takes_nothing() -> None:
    clock = FakeClock()

    def run(segment: Segment, rows: int, predict: bool) -> None:
        clock.now_s += 0.001 if segment.nodes else 0.002

    parts = measure_parts(run, (4,), 1, clock)
    assert parts is not None
    assert parts.nodes[4] == (0.0,)


@pytest.mark.parametrize("after", [0, 1, 50, 200])
def test_a_measurement_that_is_stopped_gives_nothing(after: int) -> None:
    clock, runs = FakeClock(), []

    def run(segment: Segment, rows: int, predict: bool) -> None:
        runs.append(segment)
        clock.now_s += 0.001

    assert measure_parts(run, (4, 6), 8, clock, lambda: len(runs) >= after) is None
    assert len(runs) <= after + 11  # the cell that had begun


def test_a_warm_profile_has_learnt_at_every_batch_size() -> None:
    clock = FakeClock()
    profile = LatencyProfile(PARTS)

    def run(segment: Segment, rows: int, predict: bool) -> None:
        assert predict
        clock.now_s += 2 * profile.typical_s(segment, rows)

    warm_up_profile(profile, run, [ONE, TWO], clock)
    assert [profile.ratio(rows) for rows in (1, 2, 4)] == pytest.approx([2.0] * 3)


def test_a_warm_up_ends_when_it_is_told() -> None:
    runs: list[int] = []
    warm_up_profile(LatencyProfile(PARTS), lambda s, rows, p: runs.append(rows), [ONE], FakeClock(), lambda: len(runs) == 7)
    assert runs == [1] * 5 + [2] * 2


def test_interpolation_is_that_of_the_measured_points() -> None:
    profile = LatencyProfile(fake_parts(batches=(1, 8), block_s=0.001))
    times = [profile.typical_s(ONE, rows) for rows in range(1, 9)]
    assert times == pytest.approx(np.full(8, 0.001))


@given(st.lists(st.tuples(st.floats(0.5, 3.0), st.floats(0.0, 1.0)), min_size=1, max_size=49))
@settings(max_examples=50)
def test_what_is_likely_is_the_median_of_the_latest_runs(runs) -> None:
    profile = LatencyProfile(PARTS)
    typical_s = profile.typical_s(ONE, 4)
    assert profile.likely_s(ONE, 4) == typical_s
    for ratio, waited_s in runs:
        profile.observe(ONE, 4, typical_s * ratio, waited_s)
        profile.observe_send(waited_s)
    ratio, waited_s = (sorted(values)[len(runs) // 2] for values in zip(*runs, strict=True))
    assert profile.likely_s(ONE, 4) == pytest.approx(typical_s * ratio + waited_s)
    assert profile.likely_send_s == waited_s
