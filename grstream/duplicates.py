"""Events that come twice: ids accepted within the last so many offsets."""

import numpy as np
import numpy.typing as npt

from grstream.keys import ABSENT, Keys
from grstream.keytable import KeyTable

_NEVER = -(2**62)


class DuplicateWindow:
    """An id is a duplicate if it was accepted at most `window` offsets before. ABSENT never is."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._table = KeyTable()
        self._accepted_at = np.empty(0, np.int64)  # by slot
        # Accepted (slot, offset) in order of offset, from _begin to _end: what expires next stands first.
        self._queue = np.empty((2, 0), np.int64)
        self._begin = self._end = 0

    @property
    def nbytes(self) -> int:
        return self._table.nbytes + self._accepted_at.nbytes + self._queue.nbytes

    def accept(self, keys: Keys, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these events, in order of offset, are not duplicates; remembers them."""
        accepted = np.ones(len(keys), np.bool_)
        rows = np.flatnonzero(keys != ABSENT)
        if not self._window or not len(rows):
            return accepted
        keys, offsets = keys[rows], offsets[rows]
        slots = self._table.find(keys)
        last = np.full(len(keys), _NEVER)
        known = slots >= 0
        last[known] = self._accepted_at[slots[known]]
        fresh = offsets - last > self._window
        ordered = np.sort(keys)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            self._judge_in_order(np.flatnonzero(np.isin(keys, repeated)), keys, offsets, last, fresh)
        accepted[rows] = fresh
        self._remember(keys[fresh], offsets[fresh], slots[fresh])
        self._forget_before(int(offsets[-1]) - self._window + 1)
        return accepted

    def entries(self, next_offset: int) -> tuple[Keys, npt.NDArray[np.int64]]:
        """Ids that an event at `next_offset` or later can repeat, in the order of their offsets."""
        slots, offsets = self._queue[:, self._begin : self._end]
        inside = offsets >= next_offset - self._window
        return self._table.keys(slots[inside]), offsets[inside]

    def _judge_in_order(
        self,
        rows: npt.NDArray[np.int64],
        keys: Keys,
        offsets: npt.NDArray[np.int64],
        last: npt.NDArray[np.int64],
        fresh: npt.NDArray[np.bool_],
    ) -> None:
        """Judge rows whose id occurs more than once among them one after another."""
        accepted_at: dict[int, int] = {}
        columns = zip(rows.tolist(), keys[rows].tolist(), offsets[rows].tolist(), strict=True)
        for row, key, offset in columns:
            fresh[row] = offset - accepted_at.get(key, int(last[row])) > self._window
            if fresh[row]:
                accepted_at[key] = offset

    def _remember(self, keys: Keys, offsets: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            distinct, inverse = np.unique(keys[missing], return_inverse=True)
            slots[missing] = self._table.insert(distinct)[inverse]
            if self._table.stop > len(self._accepted_at):
                self._accepted_at.resize(self._table.stop * 5 // 4, refcheck=False)
        self._accepted_at[slots] = offsets  # of one id that was accepted twice the later stands
        if self._end + len(keys) > self._queue.shape[1]:
            held = self._queue[:, self._begin : self._end]
            self._queue = np.empty((2, (held.shape[1] + len(keys)) * 3 // 2), np.int64)
            self._queue[:, : held.shape[1]] = held
            self._begin, self._end = 0, held.shape[1]
        self._queue[0, self._end : self._end + len(keys)] = slots
        self._queue[1, self._end : self._end + len(keys)] = offsets
        self._end += len(keys)

    def _forget_before(self, offset: int) -> None:
        slots, offsets = self._queue[:, self._begin : self._end]
        expired = int(np.searchsorted(offsets, offset))
        # An id that was accepted again since then has a later entry.
        gone = slots[:expired][self._accepted_at[slots[:expired]] == offsets[:expired]]
        if len(gone):
            self._accepted_at[gone] = _NEVER
            self._table.remove(gone)
        self._begin += expired
