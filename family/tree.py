"""The tree of nodes, its hops and its fast paths (HBLL, arXiv 2606.21497, sec. 3.1 and Theorem 1).

Pure algebra over integers, standard library only. A tree of hierarchy depth `D` has the nodes `0..N` with
`N = 2**D`: node 0 is the embedded input, node N the prediction head, and every internal node `1..N-1` owns one
block. A *path* is a chain of valid hops from 0 to N and is fully given by the internal nodes it visits, so it is
written and passed around as that tuple: `(4, 6, 7)`, on the wire `4-6-7`. Its *depth* is its number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

Path: TypeAlias = tuple[int, ...]
Hop: TypeAlias = tuple[int, int]

MAX_HIERARCHY_DEPTH = 10
"""Larger trees (2,047 blocks and more) are refused: nothing here is meant for them."""


class InvalidPath(ValueError):
    """A path that the tree does not have; the message says which hop is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree of hierarchy depth `D`.

    Raises:
        ValueError: `hierarchy_depth` is not in 1..10.
    """

    hierarchy_depth: int

    def __post_init__(self) -> None:
        if not 1 <= self.hierarchy_depth <= MAX_HIERARCHY_DEPTH:
            raise ValueError(f"hierarchy depth must be in 1..{MAX_HIERARCHY_DEPTH}, got {self.hierarchy_depth}")

    @property
    def n(self) -> int:
        """N, the node that the prediction head owns."""
        return 1 << self.hierarchy_depth

    @property
    def nodes(self) -> range:
        """The internal nodes `1..N-1`, each the owner of one block."""
        return range(1, self.n)

    @property
    def root(self) -> int:
        """`N/2`, which every path visits."""
        return self.n // 2

    @property
    def full(self) -> Path:
        """The deepest path, through all `N-1` blocks."""
        return tuple(self.nodes)

    @property
    def ladder(self) -> tuple[Path, ...]:
        """The right spine: D paths of depth 1..D, each extending the one before by one block."""
        spine = tuple(self.n - (1 << level) for level in reversed(range(self.hierarchy_depth)))
        return tuple(spine[: rung + 1] for rung in range(self.hierarchy_depth))

    @property
    def exits(self) -> tuple[int, ...]:
        """The D nodes from which N is one hop away, `N/2, 3N/4, .. N-1`: where paths end. The ladder has all."""
        return self.ladder[-1]

    def level(self, node: int) -> int:
        """`log2` of the lowest set bit: leaves are level 0, the root is level D-1."""
        self._require_internal(node)
        return (node & -node).bit_length() - 1

    def parents(self, node: int) -> tuple[int, int]:
        """The left and the right parent, `(node - s, node + s)` for `s = 2**level`; both lie on coarser levels."""
        span = 1 << self.level(node)
        return node - span, node + span

    def level_nodes(self, level: int) -> range:
        """All nodes of a level, left to right: an arithmetic progression of step `2**(level+1)`."""
        if not 0 <= level < self.hierarchy_depth:
            raise ValueError(f"level must be in 0..{self.hierarchy_depth - 1}, got {level}")
        return range(1 << level, self.n, 2 << level)

    def is_hop(self, start: int, end: int) -> bool:
        """Whether `[start, end]` is a dyadic interval `[m*2**k, (m+1)*2**k]` strictly smaller than `[0, N]`."""
        span = end - start
        return 0 <= start < end <= self.n and 0 < span < self.n and span & (span - 1) == 0 and start % span == 0

    def hops_from(self, node: int) -> tuple[int, ...]:
        """The ends of all valid hops that start at `node` (0..N-1), nearest first."""
        spans = (1 << k for k in range(self.hierarchy_depth))
        return tuple(node + span for span in spans if self.is_hop(node, node + span))

    @property
    def hops(self) -> tuple[tuple[int, int], ...]:
        """All `2(N-1)` hops: every internal node contributes one from its left and one to its right parent."""
        return tuple((start, end) for start in range(self.n) for end in self.hops_from(start))

    def validate(self, path: Path) -> Path:
        """Return `path` unchanged.

        Raises:
            InvalidPath: it is not a chain of valid hops from 0 to N.
        """
        if not path:
            raise InvalidPath(f"a path visits at least node {self.root}, got no node")
        chain = (0, *path, self.n)
        for start, end in pairwise(chain):
            if not 0 <= start < self.n:
                raise InvalidPath(f"path {format_path(path)}: nodes must be in 1..{self.n - 1}, got {start}")
            if not self.is_hop(start, end):
                ends = ", ".join(map(str, self.hops_from(start)))
                raise InvalidPath(
                    f"path {format_path(path)}: {start} -> {end} is no hop; from {start} one can go to {ends}"
                )
        return path

    def parse(self, text: str) -> Path:
        """Read `4-6-7` as a path of this tree.

        Raises:
            InvalidPath: the text is not numbers joined by `-`, or the tree has no such path.
        """
        parts = text.split("-")
        if len(parts) > self.n or not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
            raise InvalidPath(
                f"a path is node numbers joined by '-', like {format_path(self.ladder[-1])}; got {text[:80]!r}"
            )
        return self.validate(tuple(int(part) for part in parts))

    def paths(self) -> Iterator[Path]:
        """All paths, in lexicographic order of their nodes. There are `count_paths()` of them."""

        def extend(prefix: Path, node: int) -> Iterator[Path]:
            *inner, last = self.hops_from(node)
            if last == self.n:
                yield prefix
            else:
                inner.append(last)
            for end in inner:
                yield from extend((*prefix, end), end)

        yield from extend((), 0)

    def count_paths(self) -> int:
        """`c(D-1)**2` with `c(0) = 1`, `c(d) = 1 + c(d-1)**2` (Theorem 1), without listing them."""
        return _count_chains(self.hierarchy_depth - 1) ** 2

    def count_paths_by_depth(self) -> dict[int, int]:
        """The number of paths of each depth 1..N-1, without listing them."""
        half = self._chains_by_blocks[(self.hierarchy_depth - 1)]
        whole = _convolve(half, half)
        return {blocks + 1: count for blocks, count in enumerate(whole) if count}

    def path_at(self, depth: int, index: int) -> Path:
        """The `index`-th path of `depth` blocks: a bijection from `0..count-1`, for uniform sampling at any size.

        Raises:
            ValueError: there is no path of that depth or no such index.
        """
        count = self.count_paths_by_depth().get(depth, 0)
        if not 0 <= index < count:
            raise ValueError(f"there are {count} paths of depth {depth}, got index {index}")
        left, right = self._split(self.hierarchy_depth - 1, self.hierarchy_depth - 1, depth - 1, index)
        half = self.root
        first = self._chain_at(self.hierarchy_depth - 1, 0, *left)
        second = self._chain_at(self.hierarchy_depth - 1, half, *right)
        return (*first, half, *second)

    @property
    def _chains_by_blocks(self) -> list[list[int]]:
        return _chains_by_blocks(self.hierarchy_depth)

    def _split(self, left_level: int, right_level: int, blocks: int, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Divide `blocks` inner nodes between two adjacent intervals: ((blocks, index) left, (blocks, index) right)."""
        left_counts, right_counts = self._chains_by_blocks[left_level], self._chains_by_blocks[right_level]
        for left_blocks, left_count in enumerate(left_counts):
            right_blocks = blocks - left_blocks
            right_count = right_counts[right_blocks] if 0 <= right_blocks < len(right_counts) else 0
            if index < left_count * right_count:
                return (left_blocks, index // right_count), (right_blocks, index % right_count)
            index -= left_count * right_count
        raise AssertionError("index beyond the number of chains")

    def _chain_at(self, level: int, start: int, blocks: int, index: int) -> Path:
        """The `index`-th chain of `blocks` inner nodes across the dyadic interval `[start, start + 2**level]`."""
        if blocks == 0:
            return ()  # the single hop across the interval
        middle = start + (1 << (level - 1))
        left, right = self._split(level - 1, level - 1, blocks - 1, index)
        return (*self._chain_at(level - 1, start, *left), middle, *self._chain_at(level - 1, middle, *right))

    def _require_internal(self, node: int) -> None:
        if not 1 <= node < self.n:
            raise ValueError(f"internal nodes are 1..{self.n - 1}, got {node}")


def _count_chains(level: int) -> int:
    """c(level): chains of hops across a dyadic interval of size `2**level`, the single hop included."""
    count = 1
    for _ in range(level):
        count = 1 + count * count
    return count


@lru_cache(maxsize=MAX_HIERARCHY_DEPTH)
def _chains_by_blocks(levels: int) -> list[list[int]]:
    """For each level, the number of chains across an interval of size `2**level` by their number of inner nodes."""
    table = [[1]]
    for _ in range(1, levels):
        below = table[-1]
        table.append([1, *_convolve(below, below)])
    return table


def _convolve(left: list[int], right: list[int]) -> list[int]:
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return product


def format_path(path: Path) -> str:
    """Write a path by its internal nodes, `4-6-7`."""
    return "-".join(map(str, path))


def extends(longer: Path, shorter: Path) -> bool:
    """Whether `longer` can go on from the state where `shorter` ends: its nodes begin with those of `shorter`."""
    return longer[: len(shorter)] == shorter


@dataclass(frozen=True, slots=True)
class Cost:
    """What one row costs in each part of a family, in one unit of the caller's choice (FLOPs, parameters).

    `blocks` maps every internal node to its block's cost, `heads` every exit to that of the head there.
    """

    embed: int
    blocks: Mapping[int, int]
    heads: Mapping[int, int]

    def of(self, path: Path) -> int:
        """The cost of the whole path: embedding, its blocks, head."""
        return self.embed + sum(self.blocks[node] for node in path) + self.heads[path[-1]]
