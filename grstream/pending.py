"""New events since the last micro-batch, each with the window that it came upon.

A *sequence* here is a window as it stood: its head block and first number. It is opened by the first new
event that comes upon it and takes in the following ones until the window rolls, or an event is placed in
front of one of them; then the next new event opens another. The blocks it reads are held until all its events
are packed.

Where exposures are joined, this is a delay line: offsets leave it in their order, and one whose exposure is
open holds up itself and all behind it. What waits in it was settled by nobody, so a reader that resumes reads
it again; nothing of it needs to be kept.
"""

import collections
import dataclasses
import heapq
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from grstream.arena import Blocks, EventArena, Ints
from grstream.exposures import Closed, ExposureJoin
from grstream.item_names import ItemNames
from grstream.keys import INT64_MAX, Keys
from grstream.keytable import Slots
from grstream.ledger import Disposition, OffsetRange
from grstream.microbatch import MicroBatch, Role

T = TypeVar("T", "Sequences", "NewEvents")

_NONE = np.empty(0, np.int64)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Windows of S users."""

    users: Keys  # (S,)
    slots: Ints  # (S,) of the users, as long as they are not evicted
    heads: Blocks  # (S,) the block of the oldest event
    firsts: Ints  # (S,) its number


@dataclasses.dataclass(frozen=True)
class NewEvents:
    """N new events in their sequences."""

    sequences: Ints  # (N,)
    numbers: Ints  # (N,) in the chain
    offsets: Ints  # (N,)
    roles: npt.NDArray[np.uint8]  # (N,)

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, rows: Ints | slice) -> "NewEvents":
        return NewEvents(self.sequences[rows], self.numbers[rows], self.offsets[rows], self.roles[rows])


class Pending:
    """What the next micro-batches of a partition will hold and settle."""

    def __init__(self, partition: int, join: ExposureJoin | None = None) -> None:
        self._partition = partition
        self._join = join
        # Open sequences by number: columns of `Sequences`, and the offset of the newest event of each.
        self._sequences = np.empty((5, 0), np.int64)
        self._free = np.empty(0, np.int64)  # numbers below _stop that are not in use
        self._stop = 0
        self._fresh: list[NewEvents] = []  # since the last `seal`
        self._waiting: collections.deque[NewEvents] = collections.deque()  # in the order of their offsets
        self._ready: list[NewEvents] = []  # the same; before every open exposure
        self._ranges: list[OffsetRange] = []  # a heap
        self._fresh_held: list[Blocks] = []
        self._held: collections.deque[tuple[int, Blocks]] = collections.deque()
        self._closed = Closed(_NONE, np.empty(0, np.int32))

    def __len__(self) -> int:
        """New events that the next packs may hold."""
        return sum(map(len, self._ready))

    @property
    def settles(self) -> bool:
        """Whether the next pack settles anything."""
        return bool(self._ranges) and self._ranges[0].start < self._open_from

    @property
    def _open_from(self) -> int:
        return INT64_MAX if self._join is None else self._join.oldest

    def open(self, sequences: Sequences) -> Ints:
        """Open sequences; returns their numbers."""
        count = len(sequences.users)
        reused = min(count, len(self._free))
        numbers = np.concatenate([self._free[:reused], np.arange(self._stop, self._stop + count - reused)])
        self._free = self._free[reused:]
        self._stop += count - reused
        if self._stop > self._sequences.shape[1]:
            grown = np.empty((5, self._stop * 3 // 2), np.int64)
            grown[:, : self._sequences.shape[1]] = self._sequences
            self._sequences = grown
        columns = (sequences.users, sequences.slots, sequences.heads, sequences.firsts)
        for column, values in zip(self._sequences, columns, strict=False):
            column[numbers] = values
        return numbers

    def add(self, events: NewEvents) -> None:
        self._fresh.append(events)
        self._sequences[4, events.sequences] = events.offsets  # ascend within a sequence: the last stands

    def hold(self, blocks: Blocks) -> None:
        """Blocks that left their histories and are to be released when what was added so far is packed."""
        self._fresh_held.append(blocks)

    def seal(self, offset: int, arena: EventArena) -> None:
        """Everything up to this offset has been added."""
        self._line_up(offset)
        if not self._ready and not self._waiting:
            self._release(arena, INT64_MAX)

    def _line_up(self, offset: int) -> None:
        if self._fresh_held:
            self._held.append((offset, np.concatenate(self._fresh_held)))
            self._fresh_held.clear()
        if self._fresh:
            events = _concatenated(self._fresh)
            self._fresh.clear()
            self._waiting.append(events if self._join is None else events.where(np.argsort(events.offsets)))
        if self._join is None:
            self._ready.extend(self._waiting)
            self._waiting.clear()
            return
        closed = self._join.closed()
        if len(closed.offsets):
            self._closed = Closed(
                np.concatenate([self._closed.offsets, closed.offsets]),
                np.concatenate([self._closed.labels, closed.labels]),
            )
        open_from = self._open_from
        while self._waiting and self._waiting[0].offsets[0] < open_from:
            events = self._waiting.popleft()
            stop = int(np.searchsorted(events.offsets, open_from))
            self._ready.append(events.where(slice(stop)))
            if stop < len(events):
                self._waiting.appendleft(events.where(slice(stop, None)))

    def settle(self, range_: OffsetRange) -> None:
        heapq.heappush(self._ranges, range_)

    def settle_rows(self, offsets: Ints, dispositions: npt.NDArray[np.int8]) -> None:
        """Record the disposition of ascending offsets, as few ranges."""
        if not len(offsets):
            return
        breaks = np.flatnonzero((np.diff(offsets) != 1) | (np.diff(dispositions) != 0)) + 1
        starts, stops = np.append(0, breaks), np.append(breaks, len(offsets))
        columns = (offsets[starts], offsets[stops - 1] + 1, dispositions[starts])
        for start, stop, disposition in zip(*(c.tolist() for c in columns), strict=True):
            self.settle(OffsetRange(self._partition, start, stop, Disposition(disposition)))

    def pack(
        self, arena: EventArena, names: ItemNames, read_ms: int, limit: int | None
    ) -> tuple[MicroBatch, Ints, Slots]:
        """A micro-batch of what is ready, at most `limit` new events; which sequences ended, and whose."""
        events, bound = self._taken(limit)
        ranges = self._settled(bound)
        closed, self._closed = self._closed.before(bound), self._closed.beyond(bound)
        if not len(events):
            self._release(arena, bound)
            return MicroBatch.empty(arena.features.shape[1], ranges), _NONE, _NONE
        whole = bound == INT64_MAX and not len(self._free)  # every sequence is here, and ends
        if whole:
            numbers, rank = np.arange(self._stop), events.sequences
        else:
            numbers, rank = np.unique(events.sequences, return_inverse=True)
        # In the order of their first new events: a function of the log, not of how it was cut into batches.
        began = np.full(len(numbers), INT64_MAX)
        np.minimum.at(began, rank, events.offsets)
        by_offset = np.argsort(began)
        order = np.empty_like(by_offset)
        order[by_offset] = np.arange(len(by_offset))
        users, slots, heads, firsts, newest = self._sequences[:, numbers[by_offset]]
        rank = order[rank]
        behind = events.numbers - firsts[rank]  # events before it in its sequence
        placed = np.lexsort((behind, rank))
        rank, behind = rank[placed], behind[placed]
        ends = np.flatnonzero(np.append(rank[1:] != rank[:-1], True))  # a sequence ends with a new event
        lengths = behind[ends] + 1
        rows = arena.rows(heads, firsts, lengths)
        at = (np.cumsum(lengths) - lengths)[rank] + behind
        roles = np.full(len(rows), Role.CONTEXT, np.uint8)
        roles[at] = events.roles[placed]
        items, times, actions = arena.items.take(rows), arena.times.take(rows), arena.actions.take(rows)
        offsets, labels = events.offsets[placed], actions[at]
        if len(closed.offsets):
            found = np.minimum(np.searchsorted(closed.offsets, offsets), len(closed.offsets) - 1)
            labels = np.where(closed.offsets[found] == offsets, closed.labels[found], labels)
        batch = MicroBatch(
            users=users,
            lengths=lengths.astype(np.int32),
            items=items,
            actions=actions,
            times=times,
            features=arena.features.take(rows, axis=0),
            roles=roles,
            labels=labels,
            partitions=np.full(len(at), self._partition, np.int32),
            offsets=offsets,
            ranges=ranges,
            item_names=names.of(items[at]),
            newest_event_ms=int(times[at].max()),
            read_ms=read_ms,
        )
        ended = newest < bound
        numbers, slots = numbers[by_offset][ended], slots[ended]
        if whole:
            self._stop = 0
        else:
            self._free = np.concatenate([self._free, numbers])
        self._release(arena, bound)
        return batch, numbers, slots

    def _taken(self, limit: int | None) -> tuple[NewEvents, int]:
        """Take what is ready from the line, at most `limit` events; all before the offset told goes."""
        ready, self._ready = self._ready, []
        bound = self._open_from
        if not ready:
            return NewEvents(_NONE, _NONE, _NONE, np.empty(0, np.uint8)), bound
        events = _concatenated(ready)
        if limit is not None and len(events) > limit:
            if self._join is None:
                events = events.where(np.argsort(events.offsets))
            bound = int(events.offsets[limit])
            self._ready = [events.where(slice(limit, None))]
            events = events.where(slice(limit))
        return events, bound

    def _settled(self, bound: int) -> tuple[OffsetRange, ...]:
        """Take the ranges before an offset: in order, adjacent ones of one disposition as one."""
        merged: list[OffsetRange] = []
        while self._ranges and self._ranges[0].start < bound:
            r = heapq.heappop(self._ranges)
            if r.stop > bound:
                heapq.heappush(self._ranges, r._replace(start=bound))
                r = r._replace(stop=bound)
            if merged and merged[-1].stop == r.start and merged[-1].disposition == r.disposition:
                merged[-1] = merged[-1]._replace(stop=r.stop)
            else:
                merged.append(r)
        return tuple(merged)

    def _release(self, arena: EventArena, bound: int) -> None:
        while self._held and self._held[0][0] < bound:
            arena.release(self._held.popleft()[1])


def _concatenated(parts: list[T]) -> T:
    """Dataclasses of arrays as one."""
    if len(parts) == 1:
        return parts[0]
    kind = type(parts[0])
    fields = [f.name for f in dataclasses.fields(kind)]
    return kind(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))
