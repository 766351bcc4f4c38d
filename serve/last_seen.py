"""`LastSeen`: the last history that a gateway saw of each user, for when a history shard is away."""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable

from grstream.keys import Id
from serve.gateway import UserHistory

_OBJECTS_BYTES = 1_000  # of an entry's Python objects and array headers


def stale(seen: UserHistory) -> UserHistory:
    """A history as it was when last seen, with the position as of then: newer events may be missing."""
    return dataclasses.replace(seen, stale=True)


class LastSeen:
    """Histories by user: the ones least recently seen go first, and all after `keep_s`.

    A tombstone reaches a shard, not this: a forgotten user is gone once its shard was asked again, or after
    that time.
    """

    def __init__(
        self, users: int, nbytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._users, self._bytes, self._keep_s, self._clock = users, nbytes, keep_s, clock
        # In the order in which they were put: bytes, when, and the history.
        self._held: collections.OrderedDict[Id, tuple[int, float, UserHistory]] = collections.OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, user: Id) -> UserHistory | None:
        self._expire()
        entry = self._held.get(user)
        return None if entry is None else entry[2]

    def put(self, user: Id, history: UserHistory) -> None:
        """What a shard has just answered; one that does not fit is not kept."""
        self.drop(user)
        size = _size(history)
        self._held[user] = (size, self._clock(), history)
        self.nbytes += size
        while len(self._held) > self._users or self.nbytes > self._bytes:
            self.drop(next(iter(self._held)))
        self._expire()

    def drop(self, user: Id) -> None:
        entry = self._held.pop(user, None)
        if entry is not None:
            self.nbytes -= entry[0]

    def _expire(self) -> None:
        oldest = self._clock() - self._keep_s
        while self._held and next(iter(self._held.values()))[1] < oldest:
            self.drop(next(iter(self._held)))


def _size(held: UserHistory) -> int:
    history = held.history
    columns = (history.items, history.actions, history.times, history.features)
    names = sum(sys.getsizeof(name) + 100 for name in history.item_names.values())
    return _OBJECTS_BYTES + sum(column.nbytes for column in columns) + names
