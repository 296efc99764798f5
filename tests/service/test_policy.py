from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from family.manifest import Certificate, RiskLevel
from family.tree import Tree, extends, format_path
from service.errors import InvalidInput, NotOffered
from service.policy import (
    Target,
    Wish,
    choose_target,
    reachable_segments,
    resolve_wish,
    segment_between,
)
from service.profile import Segment
from tests.fakes import fake_manifest, rising_accuracies

PATHS = list(Tree(3).paths())
manifests = st.dictionaries(st.sampled_from(PATHS), st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1).map(
    fake_manifest
)
RISING = fake_manifest(rising_accuracies(Tree(3)))


def latency(segment: Segment, rows: int) -> float:
    """A millisecond per block and row."""
    return 0.001 * rows * len(segment.nodes)


@given(manifests, st.one_of(st.none(), st.floats(-0.01, 0.02)), st.integers(1, 4))
def test_a_budget_gets_the_best_path_that_fits(manifest, slack_s, rows) -> None:
    target = choose_target(manifest, Wish(), slack_s, rows, latency)
    accuracies = manifest.accuracies
    fitting = [p for p in accuracies if slack_s is None or latency(Segment(p, True), rows) <= slack_s]
    if fitting:
        assert accuracies[target.path] == max(accuracies[path] for path in fitting)
        assert slack_s is None or latency(Segment(target.path, True), rows) <= slack_s
    else:
        assert len(target.path) == min(map(len, accuracies))
    assert target.stopped_by == ("complete" if target.path == manifest.reference else "budget")


@given(manifests, st.floats(-1, 1), st.data())
def test_an_explicit_path_is_obeyed_whatever_the_time(manifest, slack_s, data) -> None:
    path = data.draw(st.sampled_from(list(manifest.offered)))
    assert choose_target(manifest, Wish(path=path), slack_s, 1, latency) == Target(path, "path")


@given(manifests)
def test_a_climb_rises_and_ends_at_the_reference(manifest) -> None:
    climb = manifest.climb
    values = [manifest.accuracies[path] for path in climb]
    assert values == sorted(set(values))
    assert climb[-1] == manifest.reference
    assert set(climb) <= set(manifest.offered)


@given(manifests)
def test_every_step_of_a_climb_is_profiled(manifest) -> None:
    profiled = set(reachable_segments(manifest))
    before = None
    for target in manifest.climb:
        assert segment_between(before, target) in profiled
        before = target
    assert {Segment(path, embed=True) for path in manifest.offered} <= profiled


@given(st.sampled_from(PATHS), st.sampled_from(PATHS))
def test_a_segment_leads_to_its_target(before, target) -> None:
    segment = segment_between(before, target)
    assert segment.embed == (not extends(target, before))
    assert (() if segment.embed else before) + segment.nodes == target


def test_a_climb_without_ladder_uses_the_front() -> None:
    manifest = fake_manifest({(2, 4): 0.5, (1, 2, 4): 0.6})
    assert manifest.climb == ((2, 4), (1, 2, 4))


@given(manifests, st.integers(1, 9))
def test_depth_means_the_best_offered_path_of_that_depth(manifest, depth) -> None:
    offered = {len(path) for path in manifest.offered}
    if depth not in offered:
        with pytest.raises(NotOffered, match=f"depth {depth} is not offered") as refused:
            resolve_wish(manifest, depth=depth)
        assert refused.value.details == {"offered": sorted(offered)}
        return
    assert resolve_wish(manifest, depth=depth) == Wish(path=manifest.best_by_depth[depth], asked_as="depth")


def test_best_and_full_have_their_meaning() -> None:
    assert resolve_wish(RISING, depth="best").path == RISING.reference
    assert resolve_wish(RISING, depth="full").path == (1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(NotOffered, match="the full path is not offered"):
        resolve_wish(fake_manifest({(4,): 0.5}), depth="full")


@pytest.mark.parametrize(("path", "error"), [("4-7", InvalidInput), ("x", InvalidInput), ("2-4", NotOffered)])
def test_a_wrong_path_is_refused(path: str, error: type[InvalidInput]) -> None:
    with pytest.raises(error):
        resolve_wish(fake_manifest({(4,): 0.5}), path=path)


def test_a_certified_level_is_taken_exactly_and_others_are_refused() -> None:
    levels = (RiskLevel(epsilon=0.02, threshold=0.9), RiskLevel(epsilon=0.1, threshold=0.6))
    sequence = tuple(format_path(path) for path in RISING.climb)
    certificate = Certificate(sequence=sequence, delta=0.05, rows=500, levels=levels)
    manifest = RISING.model_copy(update={"certificate": certificate})
    assert resolve_wish(manifest, max_risk=0.1, deadline_s=3) == Wish(exit_at=0.6, asked_as="risk", deadline_s=3)
    with pytest.raises(NotOffered, match=r"max_risk 0.05 is not certified: expected one of 0.02, 0.1"):
        resolve_wish(manifest, max_risk=0.05)
    with pytest.raises(NotOffered, match="this model certifies none"):
        resolve_wish(RISING, max_risk=0.1)
