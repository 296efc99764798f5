from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from family.tree import Cost, InvalidPath, Tree, extends, format_path

trees = st.integers(1, 4).map(Tree)
deep_trees = st.integers(1, 10).map(Tree)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Tree, tuple[int, ...]]:
    """A tree and a path walked hop by hop."""
    tree = draw(deep_trees)
    node, path = 0, []
    while (node := draw(st.sampled_from(tree.hops_from(node)))) != tree.n:
        path.append(node)
    return tree, tuple(path)


@pytest.mark.parametrize(("hierarchy_depth", "count"), [(1, 1), (2, 4), (3, 25), (4, 676), (5, 458_329)])
def test_number_of_paths_is_the_papers(hierarchy_depth: int, count: int) -> None:
    assert Tree(hierarchy_depth).count_paths() == count


@given(trees)
def test_listing_agrees_with_counting(tree: Tree) -> None:
    paths = list(tree.paths())
    assert len(paths) == len(set(paths)) == tree.count_paths()
    assert paths == sorted(paths)
    by_depth = tree.count_paths_by_depth()
    assert by_depth == {depth: sum(len(path) == depth for path in paths) for depth in by_depth}
    assert set(by_depth) == set(range(1, tree.n))


@given(trees)
def test_path_at_is_a_bijection(tree: Tree) -> None:
    found = [tree.path_at(depth, i) for depth, count in tree.count_paths_by_depth().items() for i in range(count)]
    assert sorted(found) == list(tree.paths())
    with pytest.raises(ValueError, match="there are 1 paths of depth 1"):
        tree.path_at(1, 1)


def test_count_by_depth_needs_no_listing() -> None:
    tree = Tree(10)
    assert sum(tree.count_paths_by_depth().values()) == tree.count_paths()


@given(chains())
def test_every_chain_of_hops_is_a_path_and_text_brings_it_back(chain: tuple[Tree, tuple[int, ...]]) -> None:
    tree, path = chain
    assert tree.validate(path) == path
    assert tree.parse(format_path(path)) == path
    assert tree.root in path
    assert list(path) == sorted(path)


@given(deep_trees, st.data())
def test_parents_lie_on_coarser_levels_and_give_the_hops(tree: Tree, data: st.DataObject) -> None:
    node = data.draw(st.sampled_from(tree.nodes))
    left, right = tree.parents(node)
    assert node in tree.level_nodes(tree.level(node))
    for parent in (left, right):
        assert parent in (0, tree.n) or tree.level(parent) > tree.level(node)
    assert tree.is_hop(left, node)
    assert tree.is_hop(node, right)


@given(deep_trees)
def test_hops_are_exactly_those_from_and_to_parents(tree: Tree) -> None:
    expected = {hop for node in tree.nodes for hop in ((tree.parents(node)[0], node), (node, tree.parents(node)[1]))}
    assert set(tree.hops) == expected
    assert len(tree.hops) == 2 * (tree.n - 1)


@given(deep_trees)
def test_ladder_climbs_one_block_a_rung(tree: Tree) -> None:
    assert [len(rung) for rung in tree.ladder] == list(range(1, tree.hierarchy_depth + 1))
    for shorter, longer in zip(tree.ladder, tree.ladder[1:], strict=False):
        assert extends(longer, shorter)
    for rung in tree.ladder:
        tree.validate(rung)


def test_the_ladder_of_three_levels_is_the_papers() -> None:
    assert Tree(3).ladder == ((4,), (4, 6), (4, 6, 7))
    assert Tree(3).full == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4-7", "4 -> 7 is no hop; from 4 one can go to 5, 6, 8"),
        ("2", "2 -> 8 is no hop"),
        ("4-9", "4 -> 9 is no hop"),
        ("8", "0 -> 8 is no hop"),
        ("6-4", "0 -> 6 is no hop"),
        ("", "numbers joined by '-'"),
        ("4-", "numbers joined by '-'"),
        ("four", "numbers joined by '-'"),
        ("4" * 500, "numbers joined by '-'"),
        ("٤", "numbers joined by '-'"),
    ],
)
def test_a_wrong_path_is_told_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(InvalidPath, match=message):
        Tree(3).parse(text)


@given(st.text(max_size=30))
def test_any_text_is_a_path_or_refused(text: str) -> None:
    try:
        path = Tree(4).parse(text)
    except InvalidPath:
        return
    assert path in set(Tree(4).paths())


@pytest.mark.parametrize("hierarchy_depth", [0, -1, 11])
def test_impossible_trees_are_refused(hierarchy_depth: int) -> None:
    with pytest.raises(ValueError, match=r"hierarchy depth must be in 1\.\.10"):
        Tree(hierarchy_depth)


@given(trees, st.data())
def test_cost_of_an_extension_is_that_of_its_further_blocks_and_another_head(tree: Tree, data: st.DataObject) -> None:
    cost = Cost(embed=3, blocks={node: 10 + node for node in tree.nodes}, heads={node: node for node in tree.exits})
    longer = data.draw(st.sampled_from(list(tree.paths())))
    for shorter in tree.paths():
        if extends(longer, shorter):
            further = sum(10 + node for node in longer[len(shorter) :])
            assert cost.of(longer) - cost.of(shorter) == further + longer[-1] - shorter[-1]
