"""The users of a partition: columns by slot, and who was active least recently."""

import numpy as np
import numpy.typing as npt

from grstream.arena import NO_BLOCK, Ints
from grstream.keys import Keys
from grstream.keytable import KeyTable, Slots

NO_TIME = -(2**63)  # the newest time of a history without events
NO_SEQUENCE = -1
_GONE = -1  # as an offset: the slot is free
_GROWTH = 1.25
_MIN_QUEUE = 4096


class UserTable:
    """User keys and, by slot, where a user's chain of events stands and what it has seen."""

    def __init__(self) -> None:
        self.table = KeyTable()
        self.heads, self.tails = (np.empty(0, np.int64) for _ in range(2))  # blocks
        self.lengths = np.empty(0, np.int64)  # events in the window
        self.appended = np.empty(0, np.int64)  # events ever appended; their numbers are below this
        self.epochs = np.empty(0, np.int64)
        self.newest = np.empty(0, np.int64)  # greatest time in the window, ms
        self.active = np.empty(0, np.int64)  # offset of the last event
        self.open = np.empty(0, np.int64)  # the pending sequence that the next new event belongs to
        self.open_first = np.empty(0, np.int64)  # the number of its first event
        self.shared = np.empty(0, np.int64)  # events below this number are part of a pending sequence
        self._columns = (
            *(self.heads, self.tails, self.lengths, self.appended, self.epochs),
            *(self.newest, self.active, self.open, self.open_first, self.shared),
        )
        # The least recently active, in order, as they were when this was made: slots, and their `active`,
        # which tells who has been active since (or is gone). Everyone else was active later than these.
        self._queue = np.empty(0, np.int64)
        self._queued_at = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + sum(c.nbytes for c in (*self._columns, self._queue, self._queued_at))

    def add(self, keys: Keys, epochs: Ints) -> Slots:
        """Slots for new users without events."""
        slots = self.table.insert(keys)
        if self.table.stop > len(self.heads):
            capacity = max(self.table.stop, int(len(self.heads) * _GROWTH))
            for column in self._columns:
                column.resize(capacity, refcheck=False)
        for column, start in (
            *((self.heads, NO_BLOCK), (self.tails, NO_BLOCK), (self.lengths, 0), (self.appended, 0)),
            *((self.newest, NO_TIME), (self.open, NO_SEQUENCE), (self.shared, 0)),
        ):
            column[slots] = start
        self.epochs[slots] = epochs
        return slots

    def remove(self, slots: Slots) -> None:
        self.active[slots] = _GONE
        self.table.remove(slots)

    def firsts(self, slots: Slots) -> Ints:
        """The number of the oldest event in each window."""
        return self.appended[slots] - self.lengths[slots]

    def by_activity(self) -> Slots:
        """All users, the least recently active first."""
        slots = self.table.slots()
        return slots[np.argsort(self.active[slots])]

    def idle(self, users: int, events: int) -> Slots:
        """The fewest least recently active users that are at least so many and hold so many events.

        In order; everybody, if all together are fewer.
        """
        if users <= 0 and events <= 0:
            return np.empty(0, np.int64)
        look = max(64, 2 * users)
        while True:
            queued = self._queue[:look]
            valid = self.active[queued] == self._queued_at[:look]
            slots = queued[valid]
            held = np.cumsum(self.lengths[slots])
            count = max(users, int(np.searchsorted(held, events)) + 1 if events > 0 else 0)
            if count <= len(slots):
                stale = int(valid.argmax())
                self._queue, self._queued_at = self._queue[stale:], self._queued_at[stale:]
                return slots[:count]
            if look < len(self._queue):
                look *= 4
            elif len(slots) == len(self):
                return slots
            else:
                self._refill(2 * max(users, len(slots)))

    def _refill(self, least: int) -> None:
        """Queue at least `least` of the least recently active, and enough to do so seldom."""
        slots = self.table.slots()
        count = min(len(slots), max(least, _MIN_QUEUE, len(slots) // 8))
        active = self.active[slots]
        if count < len(slots):
            oldest = np.argpartition(active, count - 1)[:count]
            slots, active = slots[oldest], active[oldest]
        order = np.argsort(active)
        self._queue, self._queued_at = slots[order], active[order]


def grouped(slots: Slots) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows ordered by slot, and within one by row; and where in that order each slot's rows begin."""
    bits = max(len(slots) - 1, 1).bit_length()
    # One sort of plain integers is several times faster than a stable argsort.
    order = np.sort((slots << bits) | np.arange(len(slots)))
    ordered = order >> bits
    order &= (1 << bits) - 1
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(slots) else order
    return order, starts
