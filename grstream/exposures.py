"""Exposures and the labels that name them, joined along a partition's log.

An event with an exposure id and no actions is an *impression*: an item was shown. An event of the same user
with the same exposure id and actions is a *label*: it says what came of it. One event at a time the join is
this:

1. The clock is the greatest time of all events so far, so that a replay ends the same windows at the same
   offsets, and no window ends while nothing comes.
2. An impression opens an exposure at the clock's time. It is open until the clock is more than `window_ms`
   later, or `max_open` events have come since: then it is closed early, and counted.
3. A label whose exposure is open is *joined*: its actions are added to the exposure's. Of several impressions
   of one id the newest counts.
4. A label whose exposure is not open is a *correction*: its window has ended, or was never seen.
5. A tombstone parts its user's exposures from their ids: what names them later is a correction.

So exposures close in the order in which they opened, and what becomes of a label is known when it comes. What
the event of an exposure is to be learned with is known when it closes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from grstream.arena import Ints
from grstream.config import ExposuresConfig
from grstream.events import EventBatch
from grstream.keys import ABSENT, INT64_MAX, INT64_MIN, Keys
from grstream.keytable import KeyTable
from grstream.ledger import Disposition

_COLUMNS = ("keys", "users", "offsets", "clocks", "ordinals", "labels")
_KEYS, _USERS, _OFFSETS, _CLOCKS, _ORDINALS, _LABELS = range(len(_COLUMNS))
KEPT = _COLUMNS[:_LABELS]  # of an open exposure in a snapshot, which no reader resumes from to learn from it


class Closed(NamedTuple):
    """Exposures that closed with labels, in the order of their offsets."""

    offsets: Ints  # (n,) of the impressions
    labels: npt.NDArray[np.int32]  # (n,) bits

    def before(self, offset: int) -> "Closed":
        stop = np.searchsorted(self.offsets, offset)
        return Closed(self.offsets[:stop], self.labels[:stop])

    def beyond(self, offset: int) -> "Closed":
        start = np.searchsorted(self.offsets, offset)
        return Closed(self.offsets[start:], self.labels[start:])


class ExposureJoin:
    """The exposures of one partition. Not thread-safe."""

    def __init__(self, config: ExposuresConfig) -> None:
        self._window, self._max_open = config.window_ms, config.max_open
        self.clock = INT64_MIN
        self.events = 0  # so far
        self.closed_early = 0
        # Open exposures, oldest first, from _begin to _end; the one at _begin has the number _first.
        self._queue = np.empty((len(_COLUMNS), 0), np.int64)
        self._begin = self._end = self._first = 0
        self._table = KeyTable()  # exposure key -> the newest open exposure of that key
        self._numbers = np.empty(0, np.int64)  # by slot
        self._closed: list[Closed] = []

    def __len__(self) -> int:
        """Open exposures."""
        return self._end - self._begin

    @property
    def nbytes(self) -> int:
        return self._queue.nbytes + self._table.nbytes + self._numbers.nbytes

    @property
    def oldest(self) -> int:
        """The offset of the oldest open exposure; beyond all offsets where none is open."""
        return int(self._queue[_OFFSETS, self._begin]) if len(self) else INT64_MAX

    def take(self, batch: EventBatch, accepted: npt.NDArray[np.bool_], ends: npt.NDArray[np.int8]) -> None:
        """Take in the accepted events of a batch; sets the dispositions (n,) of those that are labels."""
        rows = np.flatnonzero(accepted)
        if not len(rows):
            return
        clocks = np.maximum.accumulate(np.maximum(batch.times[rows], self.clock))
        first = self.events
        self.clock, self.events = int(clocks[-1]), first + len(rows)
        if batch.exposures is not None:
            keys, actions = batch.exposures[rows], batch.actions[rows]
            named = keys != ABSENT
            shown, labels = np.flatnonzero(named & (actions == 0)), np.flatnonzero(named & (actions != 0))
            of_labels = self._newest(keys[labels])
            numbers = self._open(
                keys[shown],
                batch.users[rows[shown]],
                batch.offsets[rows[shown]],
                clocks[shown],
                first + shown,
            )
            if len(labels):
                among = _last_before(keys, shown, labels)
                of_labels = np.where(among < 0, of_labels, numbers[0] + among if len(numbers) else -1)
                at = np.where(of_labels < 0, 0, of_labels - self._first + self._begin)
                known = of_labels >= 0
                if known.any():
                    since = self._queue[:, at]
                    known &= clocks[labels] - since[_CLOCKS] <= self._window
                    known &= first + labels - since[_ORDINALS] < self._max_open
                np.bitwise_or.at(self._queue[_LABELS], at[known], actions[labels[known]].astype(np.int64))
                ends[rows[labels]] = np.where(known, Disposition.JOINED, Disposition.CORRECTION)
        self._close(clocks, first)

    def forget(self, users: Keys) -> None:
        """Part these users' exposures from their ids; what stays until their windows end names nobody."""
        held = self._queue[:, self._begin : self._end]
        mine = np.flatnonzero(np.isin(held[_USERS], users))
        self._unindex(held[_KEYS, mine], self._first + mine)
        held[_KEYS, mine] = held[_USERS, mine] = ABSENT

    def closed(self) -> Closed:
        """What closed with labels since the last call."""
        parts, self._closed = self._closed, []
        if not parts:
            return Closed(np.empty(0, np.int64), np.empty(0, np.int32))
        return Closed(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def state(self) -> tuple[dict[str, int], dict[str, Ints]]:
        """What the next events depend on: numbers, and columns of the open exposures."""
        held = self._queue[:, self._begin : self._end]
        indexed = self._newest(held[_KEYS]) == self._first + np.arange(len(self))
        columns = {name: held[i] for i, name in enumerate(KEPT)}
        columns["keys"] = np.where(indexed, held[_KEYS], ABSENT)
        counts = {"clock": self.clock, "events": self.events, "closed_early": self.closed_early}
        return counts, columns

    def load(self, counts: Mapping[str, int], columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """The inverse of `state`, into an empty join; labels that came before are not known any more."""
        self.clock, self.events, self.closed_early = counts["clock"], counts["events"], counts["closed_early"]
        self._open(*(columns[name] for name in KEPT))

    def _newest(self, keys: Keys) -> Ints:
        """The number of the newest open exposure of each key, -1 where there is none."""
        slots = self._table.find(keys)
        return np.where(slots < 0, -1, self._numbers[slots] if len(self._numbers) else -1)

    def _open(self, keys: Keys, *columns: Ints) -> Ints:
        """Append exposures; their numbers. Of one key the last is to be found."""
        count = len(keys)
        numbers = self._first + len(self) + np.arange(count)
        if not count:
            return numbers
        if self._end + count > self._queue.shape[1]:
            held = self._queue[:, self._begin : self._end]
            self._queue = np.empty((len(_COLUMNS), (held.shape[1] + count) * 3 // 2), np.int64)
            self._queue[:, : held.shape[1]] = held
            self._begin, self._end = 0, held.shape[1]
        at = slice(self._end, self._end + count)
        for column, values in enumerate((keys, *columns)):
            self._queue[column, at] = values
        self._queue[_LABELS, at] = 0
        self._end += count
        slots = self._table.find(keys)
        missing = np.flatnonzero((slots < 0) & (keys != ABSENT))
        if len(missing):
            distinct, inverse = np.unique(keys[missing], return_inverse=True)
            slots[missing] = self._table.insert(distinct)[inverse]
            if self._table.stop > len(self._numbers):
                self._numbers.resize(self._table.stop * 5 // 4, refcheck=False)
        findable = slots >= 0
        self._numbers[slots[findable]] = numbers[findable]  # of one slot the last stands
        return numbers

    def _close(self, clocks: Ints, first: int) -> None:
        """Close what is to be closed after events at these clocks, `first` events having come before them."""
        held = self._queue[:, self._begin : self._end]
        by_clock = int(np.searchsorted(held[_CLOCKS], self.clock - self._window)) if len(self) else 0
        count = max(by_clock, int(np.searchsorted(held[_ORDINALS], self.events - self._max_open)))
        if not count:
            return
        gone = held[:, :count]
        # The event at which the clock ended each window, or would have.
        ended_at = first + np.searchsorted(clocks - self._window, gone[_CLOCKS], side="right")
        self.closed_early += int((gone[_ORDINALS] + self._max_open < ended_at).sum())
        labelled = np.flatnonzero(gone[_LABELS])
        if len(labelled):
            self._closed.append(Closed(gone[_OFFSETS, labelled], gone[_LABELS, labelled].astype(np.int32)))
        self._unindex(gone[_KEYS], self._first + np.arange(count))
        self._begin += count
        self._first += count

    def _unindex(self, keys: Keys, numbers: Ints) -> None:
        """Have these exposures no longer found by their keys, where no newer one took their place."""
        slots = self._table.find(keys)
        found = np.flatnonzero(slots >= 0)
        found = found[self._numbers[slots[found]] == numbers[found]]
        self._table.remove(slots[found])


def _last_before(keys: Keys, shown: Ints, labels: Ints) -> Ints:
    """Of each of the rows `labels`: which of the rows `shown` is the last before it of its key, or -1."""
    rows = np.concatenate([shown, labels])
    which = np.concatenate([np.arange(len(shown)), np.full(len(labels), -1)])
    order = np.lexsort((rows, keys[rows]))
    ordered = keys[rows[order]]
    group = np.cumsum(np.append(True, ordered[1:] != ordered[:-1]))
    # The running maximum starts anew with each key if every key's values lie above those of the one before.
    step = len(shown) + 1
    running = np.maximum.accumulate(group * step + which[order]) - group * step
    last = np.empty_like(running)
    last[order] = running
    return last[len(shown) :]
