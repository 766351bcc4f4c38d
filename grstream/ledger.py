"""What became of every offset (law 7), and so the position of a model in its stream (law 4).

A `Ledger` holds, per partition, disjoint ranges of offsets with their disposition. The trainer adds a
micro-batch's ranges when it has learned from it and writes the ledger into its checkpoint; on resume a reader
skips what the ledger holds.

A ledger that has grown long counts what lies before a partition's watermark by disposition instead of listing
it: a trainer of months would otherwise write years of single duplicates into every checkpoint. Which offset
ended how is then told by the journals.
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


class Settled(NamedTuple):
    """Offsets start <= o < stop of a partition of which a ledger knows but how many ended in each way."""

    start: int
    stop: int
    counts: tuple[int, ...]  # by Disposition


class Ledger:
    """Disjoint, merged offset ranges by partition. Adding an offset twice raises OffsetConflict."""

    def __init__(self, ranges: Iterable[OffsetRange] = ()) -> None:
        self._ranges: dict[int, list[OffsetRange]] = {}
        self._settled: dict[int, Settled] = {}
        for r in ranges:
            self.add(r)

    def add(self, new: OffsetRange) -> None:
        if new.stop <= new.start:
            raise ValueError(f"an empty offset range: {new}")
        settled = self._settled.get(new.partition)
        if settled is not None and settled.start < new.stop and new.start < settled.stop:
            raise OffsetConflict(
                f"{new} overlaps [{settled.start}, {settled.stop}), which is recorded already"
            )
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

    def settle(self, most: int) -> None:
        """Where more than `most` ranges are listed, count instead what each partition's first run holds."""
        if sum(map(len, self._ranges.values())) <= most:
            return
        for partition in self.partitions():
            before = self._settled.get(partition)
            # The first run, as a rule: ranks may run ahead of the very first offsets.
            start, stop = next(
                (a, b) for a, b in self.consumed(partition) if before is None or a <= before.start < b
            )
            counts = list(before.counts) if before else [0] * len(Disposition)
            held = self._ranges.get(partition, [])
            for r in held:
                counts[r.disposition] += (r.stop - r.start) * (start <= r.start < stop)
            self._settled[partition] = Settled(start, stop, tuple(counts))
            self._ranges[partition] = [r for r in held if not start <= r.start < stop]

    def copy(self) -> "Ledger":
        other = Ledger()
        other._ranges = {partition: list(held) for partition, held in self._ranges.items()}
        other._settled = dict(self._settled)
        return other

    def position(self) -> "Ledger":
        """The same offsets, without how they ended: all that a reader needs, and small."""
        return Ledger(
            OffsetRange(partition, start, stop, Disposition.TRAINED)
            for partition in self.partitions()
            for start, stop in self.consumed(partition)
        )

    def __iter__(self) -> Iterator[OffsetRange]:
        """The ranges that are listed."""
        for partition in sorted(self._ranges):
            yield from self._ranges[partition]

    def settled(self, partition: int) -> Settled | None:
        """What is counted alone."""
        return self._settled.get(partition)

    def consumed(self, partition: int) -> list[tuple[int, int]]:
        """The recorded offsets of a partition as maximal (start, stop) ranges, whatever their disposition."""
        settled = self._settled.get(partition)
        parts = [(r.start, r.stop) for r in self._ranges.get(partition, ())]
        if settled is not None:
            bisect.insort(parts, (settled.start, settled.stop))
        merged: list[tuple[int, int]] = []
        for start, stop in parts:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        return merged

    def watermark(self, partition: int) -> int | None:
        """The first offset beyond the partition's first unbroken run; None where nothing is recorded."""
        consumed = self.consumed(partition)
        return consumed[0][1] if consumed else None

    def partitions(self) -> list[int]:
        return sorted(self._ranges.keys() | self._settled.keys())

    def count(self, disposition: Disposition, partition: int | None = None) -> int:
        """Offsets that ended so, of one partition if it is given."""
        listed = sum(
            r.stop - r.start
            for p in (self._ranges if partition is None else (partition,))
            for r in self._ranges.get(p, ())
            if r.disposition == disposition
        )
        settled = (s for p, s in self._settled.items() if partition in (None, p))
        return listed + sum(s.counts[disposition] for s in settled)

    def to_table(self) -> pa.Table:
        rows: list[tuple[int | None, ...]] = [
            (r.partition, r.start, r.stop, int(r.disposition), None) for r in self
        ]
        for partition, settled in sorted(self._settled.items()):
            span = (partition, settled.start, settled.stop)
            rows += [(*span, disposition, count) for disposition, count in enumerate(settled.counts)]
        columns = list(zip(*rows, strict=True)) or [()] * 5
        names = ("partition", "start", "stop", "disposition", "count")
        types = (pa.int32(), pa.int64(), pa.int64(), pa.int8(), pa.int64())
        return pa.table(
            {name: pa.array(c, type) for name, type, c in zip(names, types, columns, strict=True)}
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> "Ledger":
        columns = [table[name].to_pylist() for name in ("partition", "start", "stop", "disposition")]
        # Before there was a count every range was listed.
        counted = table["count"].to_pylist() if "count" in table.column_names else [None] * len(table)
        ledger = cls()
        counts: dict[tuple[int, int, int], list[int]] = {}
        for p, a, b, d, count in zip(*columns, counted, strict=True):
            if count is None:
                ledger.add(OffsetRange(p, a, b, Disposition(d)))
            else:
                counts.setdefault((p, a, b), [0] * len(Disposition))[d] = count
        for (partition, start, stop), by_disposition in counts.items():
            ledger._settled[partition] = Settled(start, stop, tuple(by_disposition))
        return ledger
