"""Whose turn it is: those that wait are let in one of each client in turn, however many one client has."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """What waits, by client."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(each) for each in self._waiting.values())

    def add(self, client: str, item: Item) -> None:
        """Behind all that the client has waiting."""
        self._waiting.setdefault(client, deque()).append(item)

    def next(self) -> Item:
        """The first of the client whose turn it is; then it is the next one's."""
        client, items = next(iter(self._waiting.items()))
        item = items.popleft()
        if items:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return item

    def remove(self, client: str, item: Item) -> bool:
        """It waits no more; False if it did not."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[client]
        return True
