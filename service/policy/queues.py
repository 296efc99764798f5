"""Items in order, small and quick: a sorted list, because a server's queue is thousands of rows and not millions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Key = tuple[Any, ...]


class SortedQueue(Generic[Item]):
    """Items by a key, least first. Keys are tuples of one form, each different from all others here."""

    __slots__ = ("_items", "_keys")

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._items: list[Item] = []  # in the same order

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]

    def key(self, index: int) -> Key:
        """The key of the item at `index`."""
        return self._keys[index]

    def keys(self, start: int, step: int) -> list[Key]:
        """The keys of every `step`th item from `start` on."""
        return self._keys[start::step]

    def before(self, key: Key) -> list[Item]:
        """The items with a smaller key."""
        return self._items[: self.below(key)]

    def add(self, key: Key, item: Item) -> None:
        """Into its place."""
        keys = self._keys
        place = len(keys) if not keys or keys[-1] < key else bisect_left(keys, key)  # mostly: budgets are much alike
        keys.insert(place, key)
        self._items.insert(place, item)

    def below(self, key: Key) -> int:
        """How many items have a smaller key."""
        return bisect_left(self._keys, key)

    def remove(self, key: Key) -> Item:
        """Take the item with this key out.

        Raises:
            KeyError: there is none.
        """
        index = self.below(key)
        if index == len(self._keys) or self._keys[index] != key:
            raise KeyError(key)
        del self._keys[index]
        return self._items.pop(index)

    def take_places(self, places: Iterable[int]) -> list[Item]:
        """Take the items of these rising places out."""
        wanted = list(places)
        taken = [self._items[place] for place in wanted]
        for place in reversed(wanted):
            del self._keys[place], self._items[place]
        return taken
