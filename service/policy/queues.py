"""Items in order, small and quick: a sorted list, because a server's queue is thousands of rows and not millions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Key = tuple[Any, ...]


class _Entry(NamedTuple):
    key: Key
    item: Any  # never compared: keys differ


class SortedQueue(Generic[Item]):
    """Items by a key, least first. Keys are tuples of one form, each different from all others here."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Item]:
        return (entry.item for entry in self._entries)

    def __getitem__(self, index: int) -> Item:
        item: Item = self._entries[index].item
        return item

    def key(self, index: int) -> Key:
        """The key of the item at `index`."""
        return self._entries[index].key

    def keys(self, start: int, step: int) -> list[Key]:
        """The keys of every `step`th item from `start` on."""
        return [entry.key for entry in self._entries[start::step]]

    def before(self, key: Key) -> list[Item]:
        """The items with a smaller key."""
        return [entry.item for entry in self._entries[: self.below(key)]]

    def add(self, key: Key, item: Item) -> None:
        """Into its place."""
        entries = self._entries
        if not entries or entries[-1].key < key:  # mostly: budgets are much alike
            entries.append(_Entry(key, item))
        else:
            insort(entries, _Entry(key, item))

    def below(self, key: Key) -> int:
        """How many items have a smaller key."""
        return bisect_left(self._entries, (key,))

    def remove(self, key: Key) -> None:
        """Take the item with this key out.

        Raises:
            KeyError: there is none.
        """
        index = self.below(key)
        if index == len(self._entries) or self._entries[index].key != key:
            raise KeyError(key)
        del self._entries[index]

    def take_places(self, places: Iterable[int]) -> list[Item]:
        """Take the items of these rising places out."""
        wanted = list(places)
        taken = [self._entries[place].item for place in wanted]
        for place in reversed(wanted):
            del self._entries[place]
        return taken
