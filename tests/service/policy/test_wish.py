from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from family.manifest import Certificate, RiskLevel
from family.tree import Tree, format_path
from service.errors import InvalidInput, NotOffered
from service.policy.wish import Wish, resolve_wish
from tests.fakes import fake_manifest, rising_accuracies

PATHS = list(Tree(3).paths())
manifests = st.dictionaries(st.sampled_from(PATHS), st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1).map(
    fake_manifest
)
RISING = fake_manifest(rising_accuracies(Tree(3)))


def certified():
    levels = (RiskLevel(epsilon=0.02, threshold=0.9), RiskLevel(epsilon=0.1, threshold=0.6))
    sequence = tuple(format_path(path) for path in RISING.climb)
    return RISING.model_copy(update={"certificate": Certificate(sequence=sequence, delta=0.05, rows=500, levels=levels)})


def test_no_words_are_no_wish() -> None:
    assert resolve_wish(RISING) == Wish()
    assert resolve_wish(RISING, deadline_s=3.0, strict=True, priority=2) == Wish(deadline_s=3.0, strict=True, priority=2)


@given(manifests, st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=50)
def test_depth_means_the_best_offered_path_of_that_depth(manifest, depth, min_depth) -> None:
    offered = [path for path in manifest.offered if len(path) >= min_depth]
    depths = sorted({len(path) for path in offered})
    if depth not in depths:
        with pytest.raises(NotOffered, match=f"depth {depth} is not offered") as refused:
            resolve_wish(manifest, depth=depth, min_depth=min_depth)
        assert refused.value.details == {"offered": depths}
        return
    wish = resolve_wish(manifest, depth=depth, min_depth=min_depth)
    assert wish == Wish(path=manifest.best_by_depth[depth], asked_as="depth")
    accuracies = manifest.accuracies
    assert accuracies[wish.path] == max(accuracies[path] for path in offered if len(path) == depth)


@given(manifests)
@settings(max_examples=30)
def test_best_is_the_reference_path(manifest) -> None:
    assert resolve_wish(manifest, depth="best").path == manifest.reference


def test_full_is_the_path_of_all_blocks_where_it_is_offered() -> None:
    assert resolve_wish(RISING, depth="full").path == (1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(NotOffered, match="the full path is not offered"):
        resolve_wish(fake_manifest({(4,): 0.5}), depth="full")


def test_best_with_a_least_depth_is_the_best_of_the_others() -> None:
    manifest = fake_manifest({(4,): 0.9, (4, 6): 0.7, (4, 6, 7): 0.8})
    assert resolve_wish(manifest, depth="best", min_depth=2).path == (4, 6, 7)


@given(st.sampled_from(PATHS))
def test_a_path_is_taken_by_its_nodes(path) -> None:
    assert resolve_wish(RISING, path=format_path(path)) == Wish(path=path, asked_as="path")


@pytest.mark.parametrize(("path", "error"), [("4-7", InvalidInput), ("x", InvalidInput), ("2-4", NotOffered)])
def test_a_wrong_path_is_refused(path: str, error: type[InvalidInput]) -> None:
    with pytest.raises(error):
        resolve_wish(fake_manifest({(4,): 0.5}), path=path)


def test_a_path_above_the_least_depth_is_refused() -> None:
    with pytest.raises(NotOffered, match="path 4 is not offered"):
        resolve_wish(RISING, path="4", min_depth=2)


def test_a_confidence_is_taken_as_it_is() -> None:
    assert resolve_wish(RISING, min_confidence=0.7) == Wish(exit_at=0.7, asked_as="confidence")


def test_a_certified_level_is_taken_exactly_and_others_are_refused() -> None:
    manifest = certified()
    assert resolve_wish(manifest, max_risk=0.1, deadline_s=3) == Wish(exit_at=0.6, asked_as="risk", deadline_s=3, risk=0.1)
    with pytest.raises(NotOffered, match=r"max_risk 0.05 is not certified: expected one of 0.02, 0.1"):
        resolve_wish(manifest, max_risk=0.05)
    with pytest.raises(NotOffered, match="this model certifies none"):
        resolve_wish(RISING, max_risk=0.1)


def test_a_certificate_does_not_hold_without_its_first_exit() -> None:
    with pytest.raises(NotOffered, match="certified for exits at 1 blocks, and this server answers with at least 2"):
        resolve_wish(certified(), max_risk=0.1, min_depth=2)
