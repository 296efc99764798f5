from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from family.choice import best_by_depth, climb, pareto_front, reference_path
from family.tree import Tree

TREE = Tree(3)
PATHS = list(TREE.paths())
# few values, so that there are ties
accuracies = st.dictionaries(st.sampled_from(PATHS), st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1)


@given(accuracies)
def test_best_of_a_depth_is_most_accurate_and_ties_go_to_the_ladder(of: dict[tuple[int, ...], float]) -> None:
    for depth, best in best_by_depth(TREE, of).items():
        rivals = {path: a for path, a in of.items() if len(path) == depth}
        assert of[best] == max(rivals.values())
        tied = [path for path, a in rivals.items() if a == of[best]]
        rungs = [path for path in tied if path in TREE.ladder]
        assert best == (rungs[0] if rungs else min(tied))


@given(accuracies)
def test_front_holds_exactly_the_undominated_and_ends_at_the_reference(of: dict[tuple[int, ...], float]) -> None:
    front = pareto_front(TREE, of)
    assert front[-1] == reference_path(TREE, of)
    for path, accuracy in of.items():
        better = [other for other in front if len(other) <= len(path) and of[other] >= accuracy]
        assert better, f"{path} is dominated by nothing on the front"
    values = [of[path] for path in front]
    assert values == sorted(set(values))
    assert [len(path) for path in front] == sorted({len(path) for path in front})


def test_reference_is_the_shallowest_of_equally_good_paths() -> None:
    assert reference_path(TREE, {(4,): 0.9, (4, 6): 0.9, TREE.full: 0.9}) == (4,)


def test_a_climb_ends_at_the_reference_even_if_a_rung_is_as_good() -> None:
    """What is certified is agreement with the reference path: once a tie let the climb end at another one."""
    accuracies = {(4,): 0.80, (4, 6): 0.85, (4, 6, 7): 0.90, (2, 4): 0.90}
    assert reference_path(TREE, accuracies) == (2, 4)
    assert climb(TREE, accuracies) == ((4,), (2, 4))
    assert climb(TREE, {(4,): 0.9, TREE.full: 0.9}) == ((4,),)


def test_a_climb_never_goes_deeper_than_the_reference_to_come_back_to_it() -> None:
    """A family that falls with depth once climbed to two blocks and then started again for the better first one."""
    assert climb(TREE, {(4,): 0.45, (4, 6): 0.37, (4, 6, 7): 0.24}) == ((4,),)


@given(accuracies)
def test_a_climb_rises_to_the_reference(of: dict[tuple[int, ...], float]) -> None:
    sequence = climb(TREE, of)
    assert sequence[-1] == reference_path(TREE, of)
    values = [of[path] for path in sequence]
    assert values == sorted(set(values))
    assert [len(path) for path in sequence] == sorted({len(path) for path in sequence})
