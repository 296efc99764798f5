"""Items in order, small and quick: a sorted list, because a server's queue is thousands of rows and not millions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Key = tuple[Any, ...]


class SortedQueue(Generic[Item]):
    """Items by a key, least first. Keys are tuples of one form, each different from all others here.

    Attributes:
        keys, items: in the same order, to be read (which is done very often) and not to be changed.
    """

    __slots__ = ("items", "keys")

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.items: list[Item] = []

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: Key, item: Item) -> None:
        """Into its place."""
        keys = self.keys
        place = len(keys) if not keys or keys[-1] < key else bisect_left(keys, key)  # mostly: budgets are much alike
        keys.insert(place, key)
        self.items.insert(place, item)

    def below(self, key: Key) -> int:
        """How many items have a smaller key."""
        return bisect_left(self.keys, key)

    def remove(self, key: Key) -> Item:
        """Take the item with this key out.

        Raises:
            KeyError: there is none.
        """
        index = self.below(key)
        if index == len(self.keys) or self.keys[index] != key:
            raise KeyError(key)
        del self.keys[index]
        return self.items.pop(index)

    def take_places(self, places: Iterable[int]) -> list[Item]:
        """Take the items of these rising places out."""
        wanted = list(places)
        if wanted and wanted[-1] - wanted[0] == len(wanted) - 1:
            together = slice(wanted[0], wanted[-1] + 1)
            taken = self.items[together]
            del self.keys[together], self.items[together]
            return taken
        taken = [self.items[place] for place in wanted]
        for place in reversed(wanted):
            del self.keys[place], self.items[place]
        return taken
