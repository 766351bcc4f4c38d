"""`HistoryTail`: follows partitions of the log into histories, for serving.

It reads as the trainer's readers do and folds with the same `RollingHistories` (law 3), but writes nothing;
dead letters are the trainer's to send. It begins at the newest snapshot that the readers left, else at the
log's start, which may lie in a backfill's segments, reads on through a broker that goes away and comes back,
takes on partitions that the topic gets, and never passes over lost offsets in silence: they are logged and
counted.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import kafka
import kafka.errors
import numpy as np

from grstream.config import Config
from grstream.events import EventDecoder
from grstream.histories import History, RollingHistories
from grstream.kafka import BrokerUnavailable, TopicMissing, consumer, partition_count, reaching
from grstream.segments import Segments
from grstream.snapshot_files import SnapshotFiles
from grstream.waiters import Waiters

logger = logging.getLogger(__name__)

POLL_MS = 100  # how late a stop or a probe may come; new records end the wait at once
PROBE_S = 1.0  # between questions for the log's end: the lag is known this well, and so is a broker's absence
RETRY_S = 0.25  # first wait before connecting again; doubled each time up to
RETRY_MAX_S = 5.0


class TailNotReady(RuntimeError):
    """Histories have not caught up with the log since the tail started: what it holds may lack events."""


class TailBehind(LookupError):
    """The tail has not read as far as was asked for, and did not in the time given."""


@dataclasses.dataclass(frozen=True)
class TailStatus:
    """Where a tail stands."""

    connected: bool
    caught_up: bool  # was at the log's end at least once
    partitions: int | None  # of the topic; None until the broker was reached
    positions: dict[int, int]  # partition -> next offset to be read, of this tail's partitions
    lag: int | None  # offsets between the positions and the log's end, as of the last probe
    gaps: int  # offsets that the log no longer had when they were due
    rejected: int  # records that are no events
    reason: str | None  # why it is not connected
    lags: dict[int, int] = dataclasses.field(default_factory=dict)  # `lag` by partition
    # Age in ms of the record of the newest event that was folded in, by partition; none where there was none
    # since the start, or its record has no time.
    ages_ms: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Partition:
    histories: RollingHistories
    position: int
    end: int  # of the log, as of the last probe
    newest_ms: int = -1  # time of the record of the newest event that was folded in


class HistoryTail:
    """Histories of the partitions p with p % shards == shard, kept current by a thread. Thread-safe."""

    def __init__(
        self,
        config: Config,
        shard: int = 0,
        shards: int = 1,
        visible: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`visible` is told of each read how old its oldest record was when it was in the histories.

        Its thread calls it, and not before it has caught up: what is read until then was sent before.
        """
        self._config, self._shard, self._shards = config, shard, shards
        self._visible = visible
        self._decoder = EventDecoder(config.events)
        self._lock = threading.Lock()  # over the histories and all the state below
        self._partitions: dict[int, _Partition] = {}
        self._waiters = Waiters()
        self._count: int | None = None
        self._connected = self._caught_up = False
        self._gaps = self._rejected = 0
        self._reason: str | None = "the log has not been reached yet"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"history-tail-{shard}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def history(
        self, user: int, partition: int, min_offset: int | None = None, wait_s: float = 0
    ) -> tuple[History, int]:
        """A user's history by user key, and the position it is as of.

        With `min_offset` it includes the record at that offset, which is waited for up to `wait_s`; else
        TailBehind. Raises TailNotReady before the tail has caught up, LookupError for a partition that is not
        its own.
        """
        read = threading.Event()
        with self._waiting(user, partition, min_offset, read.set) as held:
            return held or self._within(user, partition, min_offset, wait_s, read.wait(wait_s))

    async def history_soon(
        self, user: int, partition: int, min_offset: int | None = None, wait_s: float = 0
    ) -> tuple[History, int]:
        """The same without holding up the event loop or a thread, however many wait."""
        loop, read = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(read.set)

        with self._waiting(user, partition, min_offset, tell) as held:
            if held is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(read.wait(), wait_s)
            return held or self._within(user, partition, min_offset, wait_s, read.is_set())

    @contextlib.contextmanager
    def _waiting(
        self, user: int, partition: int, min_offset: int | None, tell: Callable[[], object]
    ) -> Iterator[tuple[History, int] | None]:
        """The history, or None where it is not read so far; then `tell` is called once it is."""
        with self._lock:
            held = self._own(partition)
            if min_offset is None or held.position > min_offset:
                waiting, found = None, (held.histories.history(user), held.position)
            else:
                waiting, found = self._waiters.add(partition, min_offset, tell), None
        try:
            yield found
        finally:
            if waiting is not None:
                with self._lock:
                    self._waiters.take_back(waiting)

    def _within(
        self, user: int, partition: int, min_offset: int | None, wait_s: float, read: bool
    ) -> tuple[History, int]:
        """The history after having waited, `read` where the tail said that it got there."""
        with self._lock:
            held = self._own(partition)
            # Not even then where the log turned out to be another one meanwhile.
            if not read or (min_offset is not None and held.position <= min_offset):
                raise TailBehind(
                    f"offset {min_offset} of partition {partition} is not read yet, nor was within "
                    f"{wait_s:g} s: the next to be read is {held.position}"
                )
            return held.histories.history(user), held.position

    def _own(self, partition: int) -> _Partition:
        """The partition, once histories can be read; called under the lock."""
        if not self._caught_up:
            raise TailNotReady(f"histories are being read from the log: {self._reason or 'not at its end'}")
        held = self._partitions.get(partition)
        if held is None:
            raise LookupError(
                f"partition {partition} is not one of {sorted(self._partitions)}, those of shard "
                f"{self._shard} of {self._shards}"
            )
        return held

    def status(self) -> TailStatus:
        now_ms = time.time_ns() // 1_000_000
        with self._lock:
            known = self._count is not None
            lags = {p: max(0, held.end - held.position) for p, held in self._partitions.items()}
            return TailStatus(
                connected=self._connected,
                caught_up=self._caught_up,
                partitions=self._count,
                positions={p: held.position for p, held in self._partitions.items()},
                lag=sum(lags.values()) if known else None,
                gaps=self._gaps,
                rejected=self._rejected,
                reason=self._reason,
                lags=lags,
                ages_ms={
                    p: max(0, now_ms - held.newest_ms)
                    for p, held in self._partitions.items()
                    if held.newest_ms >= 0
                },
            )

    # -- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        def follow(reached: Callable[[], None]) -> None:
            with self._log() as log:
                reached()
                self._follow(log)

        def away(reason: str) -> None:
            with self._lock:
                self._connected, self._reason = False, reason

        until_stopped(self._stopping, "histories do", follow, away)

    @contextlib.contextmanager
    def _log(self) -> Iterator[kafka.KafkaConsumer]:
        """A consumer at the positions of this tail's partitions."""
        count = partition_count(self._config.kafka)
        if self._count is not None and count != self._count:
            logger.warning(
                "%s went from %d to %d partitions: users have moved between them, and their histories begin "
                "anew",
                *(self._config.kafka.topic, self._count, count),
            )
        with contextlib.closing(consumer(self._config.kafka)) as log:
            log.assign([self._tp(p) for p in range(self._shard, count, self._shards)])
            begins = self._bounds(log.beginning_offsets, log)
            ends = self._bounds(log.end_offsets, log)
            segments = Segments.of(self._config)
            beginning = {
                p: self._begin(p, begins[p], ends[p], segments) for p in ends if p not in self._partitions
            }
            with self._lock:
                self._count = count
                for partition, held in self._partitions.items():
                    self._resume(partition, held, begins[partition], ends[partition])
                self._partitions.update(beginning)
                self._connected, self._reason = True, None
            for partition, held in self._partitions.items():
                log.seek(self._tp(partition), held.position)
            yield log

    def _begin(self, partition: int, begin: int, end: int, segments: Segments | None) -> _Partition:
        """Histories from the newest snapshot that lies within the log, else from the log's start."""
        span = segments.span(partition) if segments else None
        start, seam = span or (begin, begin)
        files = SnapshotFiles(self._config, partition)
        found = files.restore(at_least=start if begin <= seam else begin, at_most=end, track_new=False)
        histories, position = found or (self._empty(partition), start)
        logger.info("partition %d: histories from %d", partition, position)
        held = _Partition(histories, position, end)
        if segments and position < seam:
            for records in segments.records(partition, position):
                if self._stopping.is_set():
                    break
                self._take_into(partition, held, records, records[-1].offset + 1)
            held.position = seam
            self._resume(partition, held, begin, end)
        return held

    def _resume(self, partition: int, held: _Partition, begin: int, end: int) -> None:
        """Where to read on within the log as it is now."""
        held.end = end
        if held.position > end:
            logger.error(
                "partition %d ends at %d, before position %d: it is another log; histories are read anew",
                *(partition, end, held.position),
            )
            self._gaps += held.position - end
            held.histories, held.position = self._empty(partition), begin
            self._caught_up = False
        elif held.position < begin:
            logger.error(
                "%d offsets of partition %d are lost to histories: the log begins at %d, beyond position %d",
                *(begin - held.position, partition, begin, held.position),
            )
            self._gaps += begin - held.position
            held.position = begin

    def _follow(self, log: kafka.KafkaConsumer) -> None:
        """Fold records in until told to stop, or there are more partitions.

        Raises what the client raises, a lost range among them.
        """
        probed = time.monotonic()
        while not self._stopping.is_set():
            if len(log.partitions_for_topic(self._config.kafka.topic)) > (self._count or 0):
                return
            with reaching(self._config.kafka):
                fetched = log.poll(timeout_ms=POLL_MS)
                for tp in log.assignment():
                    self._take(tp.partition, fetched.get(tp, []), log.position(tp))
                if time.monotonic() - probed > PROBE_S:
                    ends = self._bounds(log.end_offsets, log)
                    probed = time.monotonic()
                    with self._lock:
                        for partition, end in ends.items():
                            self._partitions[partition].end = end
            self._note_end()

    def _take(self, partition: int, records: list, position: int) -> None:
        """Fold in records, and pass over offsets that hold none."""
        self._take_into(partition, self._partitions[partition], records, position)

    def _take_into(self, partition: int, held: _Partition, records: list, position: int) -> None:
        decoded = None
        if records:
            offsets = np.fromiter((r.offset for r in records), np.int64, len(records))
            times = np.fromiter((r.timestamp for r in records), np.int64, len(records))
            values, keys = [r.value for r in records], [r.key for r in records]
            decoded = self._decoder.decode(partition, offsets, values, times, keys)
        with self._lock:
            if decoded is not None:
                held.histories.append(decoded.batch, tombstones=decoded.tombstones)
                self._rejected += len(decoded.rejected)
                if len(decoded.batch):
                    held.newest_ms = int(times[np.searchsorted(offsets, decoded.batch.offsets[-1])])
            held.position = max(held.position, position)
            self._waiters.reached(partition, held.position)
        if records and self._caught_up and int(times.min()) >= 0:
            self._visible(max(0.0, time.time() - int(times.min()) / 1000))

    def _note_end(self) -> None:
        if self._caught_up:
            return
        with self._lock:
            self._caught_up = all(held.position >= held.end for held in self._partitions.values())
        if self._caught_up:
            logger.info("shard %d has caught up with the log", self._shard)

    def _bounds(self, ask: Callable[..., Mapping], log: kafka.KafkaConsumer) -> Mapping[int, int]:
        with reaching(self._config.kafka):
            return {tp.partition: offset for tp, offset in ask(log.assignment()).items()}

    def _empty(self, partition: int) -> RollingHistories:
        return RollingHistories(
            self._config.histories,
            features=len(self._config.events.features),
            partition=partition,
            track_new=False,
        )

    def _tp(self, partition: int) -> kafka.TopicPartition:
        return kafka.TopicPartition(self._config.kafka.topic, partition)


def until_stopped(
    stopping: threading.Event,
    who: str,
    follow: Callable[[Callable[[], None]], None],
    away: Callable[[str], None],
) -> None:
    """Follow the log again and again, waiting longer each time that it was not even reached.

    `follow` is given what it calls once it has reached the log, and may return to be called again. `away` is
    told why it ended where the broker or the topic is not there.
    """
    wait_s = RETRY_S

    def reached() -> None:
        nonlocal wait_s
        wait_s = RETRY_S

    while not stopping.is_set():
        try:
            follow(reached)
        except (BrokerUnavailable, TopicMissing, kafka.errors.KafkaError) as error:
            away(str(error))
            logger.warning("%s not follow the log; again in %.1f s: %s", who, wait_s, error)
            stopping.wait(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)
