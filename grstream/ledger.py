"""What became of every offset (law 7), and so the position of a model in its stream (law 4).

A `Ledger` holds, per partition, disjoint ranges of offsets with their disposition. The trainer adds a
micro-batch's ranges when it has learned from it and writes the ledger into its checkpoint; on resume a reader
skips what the ledger holds.
"""

import bisect
import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa


class Disposition(enum.IntEnum):
    """The one recorded end of an offset."""

    TRAINED = 0
    DUPLICATE = 1
    DEAD_LETTER = 2
    TOMBSTONE = 3
    CONTROL = 4  # transaction markers, aborted records, and offsets that compaction removed
    LOST = 5  # gone from the log before they were read, and passed over by `source.on_gap: skip`
    JOINED = 6  # a label, learned with the exposure that it names
    CORRECTION = (
        7  # a label whose exposure is not open; learned from by `events.exposures.late_labels: train`
    )


class OffsetRange(NamedTuple):
    """Offsets start <= o < stop of a partition, which all ended in the same way."""

    partition: int
    start: int
    stop: int
    disposition: Disposition


class OffsetConflict(RuntimeError):
    """An offset was to be recorded a second time: an event would have been trained twice."""


class Ledger:
    """Disjoint, merged offset ranges by partition. Adding an offset twice raises OffsetConflict."""

    def __init__(self, ranges: Iterable[OffsetRange] = ()) -> None:
        self._ranges: dict[int, list[OffsetRange]] = {}
        for r in ranges:
            self.add(r)

    def add(self, new: OffsetRange) -> None:
        if new.stop <= new.start:
            raise ValueError(f"an empty offset range: {new}")
        held = self._ranges.setdefault(new.partition, [])
        at = bisect.bisect_left(held, new.start, key=lambda r: r.start)
        for neighbour in held[max(at - 1, 0) : at + 1]:
            if neighbour.start < new.stop and new.start < neighbour.stop:
                raise OffsetConflict(f"{new} overlaps {neighbour}, which is already recorded")
        if at < len(held) and held[at].start == new.stop and held[at].disposition == new.disposition:
            new = new._replace(stop=held.pop(at).stop)
        if at and held[at - 1].stop == new.start and held[at - 1].disposition == new.disposition:
            held[at - 1] = held[at - 1]._replace(stop=new.stop)
        else:
            held.insert(at, new)

    def __iter__(self) -> Iterator[OffsetRange]:
        for partition in sorted(self._ranges):
            yield from self._ranges[partition]

    def consumed(self, partition: int) -> list[tuple[int, int]]:
        """The recorded offsets of a partition as maximal (start, stop) ranges, whatever their disposition."""
        merged: list[tuple[int, int]] = []
        for r in self._ranges.get(partition, ()):
            if merged and merged[-1][1] == r.start:
                merged[-1] = (merged[-1][0], r.stop)
            else:
                merged.append((r.start, r.stop))
        return merged

    def watermark(self, partition: int) -> int | None:
        """The first offset beyond the partition's first unbroken run; None where nothing is recorded."""
        consumed = self.consumed(partition)
        return consumed[0][1] if consumed else None

    def partitions(self) -> list[int]:
        return sorted(self._ranges)

    def count(self, disposition: Disposition) -> int:
        return sum(r.stop - r.start for r in self if r.disposition == disposition)

    def to_table(self) -> pa.Table:
        columns = list(zip(*self, strict=True)) or [(), (), (), ()]
        return pa.table(
            {
                "partition": pa.array(columns[0], pa.int32()),
                "start": pa.array(columns[1], pa.int64()),
                "stop": pa.array(columns[2], pa.int64()),
                "disposition": pa.array([int(d) for d in columns[3]], pa.int8()),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> "Ledger":
        columns = (table[name].to_pylist() for name in ("partition", "start", "stop", "disposition"))
        return cls(OffsetRange(p, a, b, Disposition(d)) for p, a, b, d in zip(*columns, strict=True))
