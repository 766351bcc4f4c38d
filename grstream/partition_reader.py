"""One partition of the log, as a read task follows it: records in, histories kept, offsets settled.

It knows what the log holds, not who fetches it. What was consumed before changes histories and settles
nothing.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from kafka.consumer.fetcher import ConsumerRecord

from grstream.config import Config
from grstream.events import EventDecoder, Rejected
from grstream.histories import RollingHistories
from grstream.ledger import Disposition, OffsetRange
from grstream.segments import Record, Segments

# Partition, why it is no event, the record's value and its key.
Letter = tuple[int, Rejected, bytes | None, bytes | None]


class PartitionReader:
    """Not thread-safe."""

    def __init__(
        self,
        config: Config,
        partition: int,
        consumed: Sequence[tuple[int, int]],
        histories: RollingHistories,
        position: int,
        segments: Segments | None = None,
    ) -> None:
        self.partition, self.histories, self.position = partition, histories, position
        self._segments = segments
        self._decoder = EventDecoder(config.events)
        # Sorted, disjoint, and between them gaps: what a search by start and stop answers.
        self._starts = np.array([start for start, _ in consumed], np.int64)
        self._stops = np.array([stop for _, stop in consumed], np.int64)

    @property
    def to_replay(self) -> int:
        """How many offsets come next that were all consumed before."""
        return max(0, int(self._stops[0]) - self.position) if len(self._stops) else 0

    def take(self, records: Sequence[ConsumerRecord | Record]) -> list[Letter]:
        """Fold in records from the position on; returns the dead letters among them, to be delivered."""
        offsets = np.fromiter((r.offset for r in records), np.int64, len(records))
        times = np.fromiter((r.timestamp for r in records), np.int64, len(records))
        values = [r.value for r in records]
        keys = [r.key for r in records]
        decoded = self._decoder.decode(self.partition, offsets, values, times, keys)
        self._settle_jumps(offsets)
        self.position = int(offsets[-1]) + 1
        fresh = self._fresh(decoded.batch.offsets)
        self.histories.append(decoded.batch, None if fresh.all() else fresh, decoded.tombstones)
        if self._segments and self._fresh(decoded.tombstones.offsets).any():
            self._segments.note(self.partition, decoded.tombstones)  # before a ledger says that it was read
        for offset in decoded.tombstones.offsets.tolist():
            self._settle(offset, offset + 1, Disposition.TOMBSTONE)
        letters = []
        for rejected in decoded.rejected:
            if self._settle(rejected.offset, rejected.offset + 1, Disposition.DEAD_LETTER):
                row = int(np.searchsorted(offsets, rejected.offset))
                letters.append((self.partition, rejected, values[row], keys[row]))
        return letters

    def advance(self, position: int) -> None:
        """Settle what lies before the client's position and brought no record."""
        if position > self.position:
            self._settle(self.position, position, Disposition.CONTROL)
            self.position = position

    def lose(self, since: int, log_start: int) -> int:
        """Settle what lies from `since` to the log's start and was not consumed; how many offsets that is."""
        lost = self.unconsumed(since, log_start)
        self._settle(since, log_start, Disposition.LOST)
        self.position = max(self.position, log_start)
        return sum(b - a for a, b in lost)

    def _settle_jumps(self, offsets: npt.NDArray[np.int64]) -> None:
        expected = np.append(self.position, offsets[:-1] + 1)
        for at in np.flatnonzero(offsets != expected):
            self._settle(int(expected[at]), int(offsets[at]), Disposition.CONTROL)

    def _fresh(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which offsets were not consumed before: (n,)"""
        if not len(self._starts) or not len(offsets) or offsets[0] >= self._stops[-1]:
            return np.ones(len(offsets), np.bool_)
        within = np.searchsorted(self._starts, offsets, side="right") - 1
        return (within < 0) | (offsets >= self._stops[np.maximum(within, 0)])

    def _settle(self, start: int, stop: int, disposition: Disposition) -> bool:
        """Settle what of a range was not consumed before; whether anything was left."""
        left = self.unconsumed(start, stop)
        for a, b in left:
            self.histories.settle(OffsetRange(self.partition, a, b, disposition))
        return bool(left)

    def unconsumed(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What of a range was not consumed before this reader began."""
        left: list[tuple[int, int]] = []
        for a, b in zip(self._starts.tolist(), self._stops.tolist(), strict=True):
            if a >= stop:
                break
            if start < a:
                left.append((start, a))
            start = max(start, b)
        if start < stop:
            left.append((start, stop))
        return left
