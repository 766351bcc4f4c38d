"""One partition: a file of v2 record batches, as the producers sent them but for the offset.

Appended is written to the operating system, before the caller learns the offset. The index (offset, position
and newest time of each batch) lives in memory, 24 bytes a batch, and is read back from the file at start. A
batch that a killed process left half-written is the file's tail and is cut; any other damage is CorruptLog.
"""

import array
import asyncio
import bisect
import logging
import mmap
import os
import pathlib
from collections.abc import Iterator

from kafka import errors

from grstream.broker import batch, files
from grstream.broker.batch import BatchHeader
from grstream.broker.errors import CorruptLog, Refused
from grstream.broker.sequences import Sequences

log = logging.getLogger(__name__)


class PartitionLog:
    """Offsets `start` <= o < `end`. Everything runs on the broker's one thread."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.end = 0
        self.size = 0  # bytes
        self._bases = array.array("q")
        self._positions = array.array("q")
        self._newest = array.array("q")  # greatest timestamp of this batch and all before it
        self._sequences = Sequences()
        self._waiting: set[asyncio.Event] = set()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._recover()
        self._start_path = path.with_suffix(".start")
        self.start = int(self._start_path.read_text()) if self._start_path.exists() else 0

    def append(self, data: bytes) -> int:
        """Store one batch and return its offset; for a batch that is here already, the offset it has."""
        header = batch.admit(data)
        if header.idempotent:
            duplicate = self._sequences.duplicate(header)
            if duplicate is not None:
                return duplicate
        base = self.end
        files.append(self._file, self.size, batch.placed_at(base, data))
        self._enter(header, base)
        self._wake()
        return base

    def available(self, offset: int) -> int:
        """Bytes from the batch that holds `offset` to the end. Refused outside start..end."""
        if not self.start <= offset <= self.end:
            raise Refused(
                errors.OffsetOutOfRangeError, f"offset {offset} is outside {self.start} to {self.end}"
            )
        return 0 if offset == self.end else self.size - self._positions[self._batch_of(offset)]

    def read(self, offset: int, max_bytes: int) -> bytes:
        """Whole batches from the one that holds `offset`: up to `max_bytes`, but one at least."""
        if not self.available(offset):
            return b""
        first = self._batch_of(offset)
        position = self._positions[first]
        stop = self.size
        if position + max_bytes < self.size:
            after = bisect.bisect_right(self._positions, position + max_bytes) - 1
            stop = self._position_of(max(after, first + 1))
        return os.pread(self._file, stop - position, position)

    def since(self, timestamp_ms: int) -> tuple[int, int] | None:
        """(offset, timestamp) of the first record at or after a time; None if there is none."""
        first = max(bisect.bisect_left(self._newest, timestamp_ms), self._batch_of(self.start))
        for index in range(max(first, 0), len(self._bases)):
            found = batch.first_record_since(self._batch(index), timestamp_ms, self.start)
            if found is not None:
                return found
        return None

    def delete_before(self, offset: int) -> None:
        """Move the log's start; the bytes stay, a development broker frees none."""
        if not self.start <= offset <= self.end:
            raise Refused(
                errors.OffsetOutOfRangeError, f"offset {offset} is outside {self.start} to {self.end}"
            )
        files.replace(self._start_path, str(offset))
        self.start = offset

    def wait_with(self, arrival: asyncio.Event) -> None:
        """Set `arrival` at every append until `forget`."""
        self._waiting.add(arrival)

    def forget(self, arrival: asyncio.Event) -> None:
        self._waiting.discard(arrival)

    def close(self) -> None:
        os.close(self._file)
        self._wake()

    def _wake(self) -> None:
        for arrival in self._waiting:
            arrival.set()

    def _batch_of(self, offset: int) -> int:
        return bisect.bisect_right(self._bases, offset) - 1

    def _position_of(self, index: int) -> int:
        return self._positions[index] if index < len(self._positions) else self.size

    def _batch(self, index: int) -> bytes:
        position = self._positions[index]
        return os.pread(self._file, self._position_of(index + 1) - position, position)

    def _enter(self, header: BatchHeader, base: int) -> None:
        newest = max(self._newest[-1], header.max_timestamp) if self._newest else header.max_timestamp
        self._bases.append(base)
        self._positions.append(self.size)
        self._newest.append(newest)
        self.size += header.size
        self.end = base + header.last_offset_delta + 1
        if header.idempotent:
            self._sequences.record(header, base)

    def _recover(self) -> None:
        length = os.fstat(self._file).st_size
        if not length:
            return
        with mmap.mmap(self._file, length, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            for header in self._sound_batches(view):
                self._enter(header, header.base_offset)
        if self.size < length:
            log.warning(
                "%s: cutting a torn tail of %d bytes, offset %d", self.path, length - self.size, self.end
            )
            os.ftruncate(self._file, self.size)

    def _sound_batches(self, view: memoryview) -> Iterator[BatchHeader]:
        """The batches up to a torn tail; CorruptLog where what follows is no torn tail."""
        while len(view) - self.size >= batch.HEADER.size:
            with view[self.size :] as rest:
                header = batch.read_header(rest)
                if header.base_offset != self.end or not header.plausible:
                    raise self._corrupt("no batch begins there")
                if header.size > len(rest):
                    return
                if not batch.crc_holds(header, rest):
                    raise self._corrupt("the batch's checksum does not match its content")
            yield header

    def _corrupt(self, what: str) -> CorruptLog:
        return CorruptLog(
            f"{self.path}, offset {self.end} at byte {self.size}: {what}. A kill cannot leave this: restore "
            f"the file, or cut it to {self.size} bytes and lose what follows."
        )
