"""Keys and values kept per user between requests, each beside the tokens that it was computed from (law 5).

An entry is usable for a history if it comes from the same weights version and its tokens begin that history:
content decides, so nothing is ever invalidated, and a roll, a late event or new weights are simply a miss.
Least recently used entries go when the byte budget is exceeded. Not thread-safe: its engine holds a lock.
"""

import collections
import dataclasses

import numpy as np

from grstream.histories import History
from grstream.model import Cache
from grstream.scores import Reuse


@dataclasses.dataclass(frozen=True)
class Entry:
    """A user's encoded history."""

    version: int
    history: History  # the tokens that `cache` was computed from
    cache: Cache

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + sum(array.nbytes for array in _tokens(self.history))

    def reuse(self, version: int, history: History) -> Reuse:
        """How much of `history` under `version` this entry holds."""
        n = len(self.history.items)
        if version != self.version or n > len(history.items):
            return Reuse.MISS
        pairs = zip(_tokens(self.history), _tokens(history), strict=True)
        if not all(np.array_equal(held, given[:n]) for held, given in pairs):
            return Reuse.MISS
        return Reuse.HIT if n == len(history.items) else Reuse.EXTEND


class KVCache:
    """Entries by user key within `budget` bytes, the least recently used going first."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: collections.OrderedDict[int, Entry] = collections.OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, user: int) -> Entry | None:
        entry = self._entries.get(user)
        if entry is not None:
            self._entries.move_to_end(user)
        return entry

    def put(self, user: int, entry: Entry) -> None:
        """Keep an entry instead of the user's last one; an entry larger than the budget is not kept."""
        self._drop(user)
        if entry.nbytes > self._budget:
            return
        self._entries[user] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self._budget:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, user: int) -> None:
        entry = self._entries.pop(user, None)
        if entry is not None:
            self.nbytes -= entry.nbytes


def _tokens(history: History) -> tuple[np.ndarray, ...]:
    return history.items, history.actions, history.times, history.features
