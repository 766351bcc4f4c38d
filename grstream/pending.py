"""New events since the last micro-batch, each with the window that it came upon.

A *sequence* here is a window as it stood: its head block and first number. It is opened by the first new
event that comes upon it and takes in the following ones until the window rolls, or an event is placed in
front of one of them; then the next new event opens another. The blocks it reads are held until `pack`.
"""

import dataclasses
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from grstream.arena import Blocks, EventArena, Ints
from grstream.item_names import ItemNames
from grstream.keys import Keys
from grstream.ledger import Disposition, OffsetRange
from grstream.microbatch import MicroBatch, Role

T = TypeVar("T", "Sequences", "NewEvents")


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Windows of S users."""

    users: Keys  # (S,)
    slots: Ints  # (S,) of the users, as long as they are not evicted
    heads: Blocks  # (S,) the block of the oldest event
    firsts: Ints  # (S,) its number
    opened_at: Ints  # (S,) offset of the first new event

    def __len__(self) -> int:
        return len(self.users)


@dataclasses.dataclass(frozen=True)
class NewEvents:
    """N new events in their sequences."""

    sequences: Ints  # (N,)
    numbers: Ints  # (N,) in the chain
    offsets: Ints  # (N,)
    roles: npt.NDArray[np.uint8]  # (N,)


class Pending:
    """What the next micro-batch of a partition will hold and settle."""

    def __init__(self, partition: int) -> None:
        self._partition = partition
        self._clear()

    def __len__(self) -> int:
        """New events."""
        return self._count

    def open(self, sequences: Sequences) -> Ints:
        """Open sequences; returns their numbers."""
        start = self._opened
        self._opened += len(sequences)
        self._sequences.append(sequences)
        return np.arange(start, self._opened)

    def add(self, events: NewEvents) -> None:
        self._events.append(events)
        self._count += len(events.offsets)

    def hold(self, blocks: Blocks) -> None:
        """Blocks that left their histories and are to be released after the pack."""
        self._held.append(blocks)

    def settle(self, range_: OffsetRange) -> None:
        self._ranges.append(range_)

    def settle_rows(self, offsets: Ints, dispositions: npt.NDArray[np.int8]) -> None:
        """Record the disposition of ascending offsets, as few ranges."""
        if not len(offsets):
            return
        breaks = np.flatnonzero((np.diff(offsets) != 1) | (np.diff(dispositions) != 0)) + 1
        starts, stops = np.append(0, breaks), np.append(breaks, len(offsets))
        columns = (offsets[starts], offsets[stops - 1] + 1, dispositions[starts])
        for start, stop, disposition in zip(*(c.tolist() for c in columns), strict=True):
            self._ranges.append(OffsetRange(self._partition, start, stop, Disposition(disposition)))

    def pack(self, arena: EventArena, names: ItemNames, read_ms: int) -> tuple[MicroBatch, Ints]:
        """The micro-batch, and the slots of the users in it; begins anew."""
        ranges = _merged(self._ranges)
        if not self._count:
            self._clear(arena)
            return MicroBatch.empty(arena.features.shape[1], ranges), np.empty(0, np.int64)
        sequences = _concatenated(self._sequences)
        events = _concatenated(self._events)
        # In the order in which they were opened: a function of the log, not of how it was cut into batches.
        order = np.argsort(sequences.opened_at)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        rank = rank[events.sequences]
        behind = events.numbers - sequences.firsts[events.sequences]  # events before it in its sequence
        placed = np.lexsort((behind, rank))
        rank, behind = rank[placed], behind[placed]
        newest = np.flatnonzero(np.append(rank[1:] != rank[:-1], True))  # a sequence ends with a new event
        lengths = behind[newest] + 1
        rows = arena.rows(sequences.heads[order], sequences.firsts[order], lengths)
        at = (np.cumsum(lengths) - lengths)[rank] + behind
        roles = np.full(len(rows), Role.CONTEXT, np.uint8)
        roles[at] = events.roles[placed]
        items, times = arena.items.take(rows), arena.times.take(rows)
        batch = MicroBatch(
            users=sequences.users[order],
            lengths=lengths.astype(np.int32),
            items=items,
            actions=arena.actions.take(rows),
            times=times,
            features=arena.features.take(rows, axis=0),
            roles=roles,
            partitions=np.full(len(at), self._partition, np.int32),
            offsets=events.offsets[placed],
            ranges=ranges,
            item_names=names.of(items[at]),
            newest_event_ms=int(times[at].max()),
            read_ms=read_ms,
        )
        self._clear(arena)
        return batch, sequences.slots

    def _clear(self, arena: EventArena | None = None) -> None:
        if arena is not None:
            for blocks in self._held:
                arena.release(blocks)
        self._sequences: list[Sequences] = []
        self._events: list[NewEvents] = []
        self._held: list[Blocks] = []
        self._ranges: list[OffsetRange] = []
        self._opened = self._count = 0


def _concatenated(parts: list[T]) -> T:
    """Dataclasses of arrays as one."""
    kind = type(parts[0])
    fields = [f.name for f in dataclasses.fields(kind)]
    return kind(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))


def _merged(ranges: list[OffsetRange]) -> tuple[OffsetRange, ...]:
    """In order, adjacent ranges of one disposition as one."""
    merged: list[OffsetRange] = []
    for r in sorted(ranges):
        if merged and merged[-1].stop == r.start and merged[-1].disposition == r.disposition:
            merged[-1] = merged[-1]._replace(stop=r.stop)
        else:
            merged.append(r)
    return tuple(merged)
