"""What a read task does: follow its partitions of the log and turn them into micro-batches.

Every offset from the position on is settled once, in exactly one way: an event becomes trained or a
duplicate (its histories decide), a record that is no event a dead letter, one without a value a tombstone,
and offsets that hold no record (transaction markers, aborted records, what compaction removed) control.
Before the position histories are only rebuilt, from the newest snapshot that is old enough or from the log's
start; offsets beyond it that were consumed already, by ranks that ran ahead, change histories and are not
emitted.

What a backfill made (`grstream.segments`) is the log's beginning: segments are read before the topic.

A broker that goes away is waited for. A log that begins beyond the position has lost events: OffsetGap, or by
`source.on_gap: skip` a warning and a range that is settled as lost. A partition that is added to the topic is
read from its start by the reader whose it is.
"""

import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import kafka
import kafka.errors
import numpy as np
from kafka.consumer.fetcher import ConsumerRecord

from grstream.config import Config
from grstream.histories import Counters, RollingHistories
from grstream.kafka import (
    BrokerUnavailable,
    DeadLetters,
    DeliveryFailed,
    consumer,
    partition_count,
    reaching,
)
from grstream.ledger import Ledger
from grstream.microbatch import MicroBatch
from grstream.partition_reader import Letter, PartitionReader
from grstream.segments import Record, SegmentLog, Segments
from grstream.snapshot_files import Snapshooter, SnapshotFiles
from grstream.until import Until

logger = logging.getLogger(__name__)

T = TypeVar("T")

REPLAY_RECORDS = 5000  # a fetch's records while nothing is emitted
RETRY_S = 1.0  # between attempts to reach a broker that went away
COLLECT_OBJECTS = 100_000  # more came into being than went: several polls' worth
QUIET_S = 5.0  # nothing came for so long: ask the broker whether it is there, and whether the bound has come


class OffsetGap(RuntimeError):
    """The log no longer has offsets that were not consumed: the trainer was away for too long."""

    def __init__(self, topic: str, partition: int, position: int, log_start: int, lost: int) -> None:
        super().__init__(topic, partition, position, log_start, lost)
        self.topic, self.partition, self.position = topic, partition, position
        self.log_start, self.lost = log_start, lost

    def __str__(self) -> str:
        return (
            f"{self.lost} offsets of {self.topic}-{self.partition} are lost: the trainer has consumed up "
            f"to {self.position} and the log begins at {self.log_start}; lengthen the topic's retention, "
            "and set source.on_gap to skip to go on without them"
        )


class LogTruncated(RuntimeError):
    """The log ends before offsets that were consumed from it: it is not the log that was read."""

    def __init__(self, topic: str, partition: int, position: int, log_end: int) -> None:
        super().__init__(topic, partition, position, log_end)
        self.topic, self.partition, self.position, self.log_end = topic, partition, position, log_end

    def __str__(self) -> str:
        return (
            f"{self.topic}-{self.partition} ends at {self.log_end}, but was read up to {self.position}: it "
            "was created anew or is another broker's; correct kafka.bootstrap_servers, or use another storage"
        )


def collect_seldom() -> None:
    """Make the collector of cycles suit a process that does nothing but read.

    Records are many small objects without cycles, which die when they are decoded. By Python's defaults each
    700 of them cost a collection, and some of those a walk through all that Ray and PyArrow hold: a third of
    the client's time.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_OBJECTS)


class LogReader:
    """The partitions of one reader, as one stream of micro-batches."""

    def __init__(self, config: Config, reader: int, ledger: Ledger, until: Until | None) -> None:
        self._config, self._reader, self._ledger, self._until = config, reader, ledger, until
        self._letters = DeadLetters(config.kafka)
        self._partitions: dict[int, PartitionReader] = {}
        self._segments: Segments | None = None
        self._earlier: SegmentLog | None = None  # what is left to read of them
        self._count = 0  # of the topic's partitions
        self._stops: dict[int, int] | None = None
        self._pending_since: float | None = None  # since the oldest thing that the next micro-batch holds
        self._read_ms = 0

    def batches(self) -> Iterator[MicroBatch]:
        """Until the execution is to be renewed, or the bound is reached."""
        ends = time.monotonic() + self._config.source.recycle_s
        with contextlib.ExitStack() as open_clients:
            open_clients.callback(self._letters.close)
            log = self._persistently(lambda: consumer(self._config.kafka))
            open_clients.callback(log.close)
            if not self._open(log):
                return
            snapshots = Snapshooter(self._config)
            heard = time.monotonic()
            self._find_bound(log)
            while time.monotonic() < ends and not self._bound_reached():
                if self._poll(log):
                    heard = time.monotonic()
                elif time.monotonic() - heard > QUIET_S:
                    self._find_bound(log)
                    heard = time.monotonic()
                self._add_partitions(log)
                while self._due():
                    yield self._flush()
                    if snapshots.due():
                        snapshots.write(self._states())
            while self._pending_since is not None:
                yield self._flush()
            snapshots.write(self._states())
            self._forget_earlier()

    # -- beginning ----------------------------------------------------------------------------------------

    def _open(self, log: kafka.KafkaConsumer) -> bool:
        """Assign this reader's partitions and rebuild their histories up to the position."""
        topic = self._config.kafka.topic
        self._count = self._persistently(lambda: partition_count(self._config.kafka))
        mine = self._mine()
        if not mine:
            logger.warning(
                "reader %d has nothing to read: %s has %d partitions", self._reader, topic, self._count
            )
            return False
        self._segments = Segments.of_training(self._config, self._ledger)
        self._assign(log, mine)
        if self._segments:
            positions = {p: reader.position for p, reader in self._partitions.items()}
            self._earlier = SegmentLog(self._segments, positions)
        return True

    def _add_partitions(self, log: kafka.KafkaConsumer) -> None:
        """Take on what the topic got meanwhile, unless where to stop is decided already."""
        if self._stops is not None:
            return
        there = log.partitions_for_topic(self._config.kafka.topic)  # as of the client's newest metadata
        if len(there) <= self._count:
            return
        logger.warning(
            "%s went from %d to %d partitions: users have moved between them, and their histories begin anew",
            *(self._config.kafka.topic, self._count, len(there)),
        )
        self._count = len(there)
        self._assign(log, [p for p in self._mine() if p not in self._partitions])

    def _mine(self) -> list[int]:
        return list(range(self._reader, self._count, self._config.source.readers))

    def _assign(self, log: kafka.KafkaConsumer, partitions: Sequence[int]) -> None:
        """Read these partitions, too."""
        topic = self._config.kafka.topic
        assigned = {p: kafka.TopicPartition(topic, p) for p in partitions}
        log.assign([*log.assignment(), *assigned.values()])
        begins = self._ask(lambda: log.beginning_offsets([*assigned.values()]))
        ends = self._ask(lambda: log.end_offsets([*assigned.values()]))
        for partition, tp in assigned.items():
            consumed = self._ledger.consumed(partition)
            span = self._segments.span(partition) if self._segments else None
            read = max(consumed[-1][1] if consumed else 0, span[1] if span else 0)
            if read > ends[tp]:
                raise LogTruncated(topic, partition, read, ends[tp])
            reader = self._partitions[partition] = self._start(partition, begins[tp], span)
            log.seek(tp, max(reader.position, span[1] if span else 0))

    def _start(self, partition: int, topic_start: int, span: tuple[int, int] | None) -> PartitionReader:
        consumed = self._ledger.consumed(partition)
        log_start, seam = span or (topic_start, topic_start)
        watermark = consumed[0][1] if consumed else log_start
        if span and consumed and consumed[0][0] > log_start:
            watermark = log_start  # ranks ran ahead of the very first events
        files = SnapshotFiles(self._config, partition)
        if topic_start > (seam if span else watermark):
            lost = self._gap(partition, consumed, seam if span else consumed[0][0], topic_start)
            if lost is not None and self._config.source.on_gap == "fail":
                raise lost
        if log_start > watermark:
            found = files.restore(at_least=0, at_most=log_start)  # all that is left of what was before
        else:
            found = files.restore(at_least=log_start, at_most=watermark) if consumed else None
        if found:
            histories, position = found
        else:
            features = len(self._config.events.features)
            histories = RollingHistories(
                self._config.histories,
                features=features,
                partition=partition,
                exposures=self._config.events.exposures,
            )
            position = log_start
            if consumed and log_start > consumed[0][0]:
                logger.warning(
                    "no snapshot of partition %d at or before %d, and its log begins at %d: histories are "
                    "rebuilt without the %d offsets before",
                    *(partition, watermark, log_start, log_start - consumed[0][0]),
                )
        logger.info("partition %d: histories from %d, emitting from %d", partition, position, watermark)
        reader = PartitionReader(self._config, partition, consumed, histories, position, self._segments)
        if log_start > watermark:
            self._lose(reader, consumed[0][0], log_start)
        return reader

    def _gap(
        self, partition: int, consumed: Sequence[tuple[int, int]], since: int, topic_start: int
    ) -> OffsetGap | None:
        held = sum(max(0, min(stop, topic_start) - max(start, since)) for start, stop in consumed)
        lost = topic_start - since - held
        position = max(consumed[0][1], since) if consumed else since
        return OffsetGap(self._config.kafka.topic, partition, position, topic_start, lost) if lost else None

    def _lose(self, reader: PartitionReader, since: int, log_start: int) -> None:
        lost = reader.lose(since, log_start)
        if lost:
            logger.warning(
                "%d offsets of %s-%d are lost: its log begins at %d; they are recorded so and passed over",
                *(lost, self._config.kafka.topic, reader.partition, log_start),
            )

    # -- following ----------------------------------------------------------------------------------------

    def _poll(self, log: kafka.KafkaConsumer) -> bool:
        """Fetch once and fold in what came; whether anything did."""
        wait_s = self._config.source.flush_ms / 1000
        if self._pending_since is not None:
            wait_s = max(0.0, self._pending_since + wait_s - time.monotonic())
        room = self._config.source.flush_events - self._new_events()
        replay = min(reader.to_replay for reader in self._partitions.values())
        fetched = self._fetch(log, wait_s, max(room, min(replay, REPLAY_RECORDS)))
        if self._stops is None and self._until is not None and self._until.has_come():
            self._find_bound(log)  # before anything later than it is taken
        letters: list[Letter] = []
        moved = False
        for partition, (records, position) in fetched.items():
            reader = self._partitions[partition]
            stop = self._stops.get(partition) if self._stops is not None else None
            if stop is not None:
                records, position = [r for r in records if r.offset < stop], min(position, stop)
            moved |= position > reader.position
            if records:
                letters += reader.take(records)
            reader.advance(position)
        self._deliver(letters)
        self._note_pending()
        return moved

    def _fetch(
        self, log: kafka.KafkaConsumer, wait_s: float, most: int
    ) -> Mapping[int, tuple[Sequence[ConsumerRecord | Record], int]]:
        """By partition, the records that come next and the position behind them: segments, then the topic."""
        if self._earlier:
            return self._earlier.fetch(most, self._stops)
        try:
            fetched = log.poll(timeout_ms=int(wait_s * 1000), max_records=most)
        except kafka.errors.OffsetOutOfRangeError as error:
            self._pass_over_gaps(log, error)
            fetched = {}
        return {tp.partition: (fetched.get(tp, ()), log.position(tp)) for tp in log.assignment()}

    def _note_pending(self) -> None:
        if self._pending_since is None and any(r.histories.settles for r in self._partitions.values()):
            self._pending_since, self._read_ms = time.monotonic(), time.time_ns() // 1_000_000

    def _new_events(self) -> int:
        return sum(reader.histories.pending for reader in self._partitions.values())

    def _due(self) -> bool:
        if self._pending_since is None:
            return False
        waited_ms = (time.monotonic() - self._pending_since) * 1000
        return (
            waited_ms >= self._config.source.flush_ms
            or self._new_events() >= self._config.source.flush_events
        )

    def _flush(self) -> MicroBatch:
        """A micro-batch; where windows of many exposures ended at once, the first of several."""
        self._pending_since = None
        parts: list[MicroBatch] = []
        for reader in self._partitions.values():
            room = self._config.source.flush_events - sum(part.new_events for part in parts)
            if reader.histories.settles and (room or not parts):
                parts.append(reader.histories.pack(self._read_ms, room))
        self._note_pending()
        return joined(parts)

    def _forget_earlier(self) -> None:
        """Rid the segments of forgotten users, seldom: files are read whole for it. By one reader alone."""
        if self._segments is None or self._reader != 0:
            return
        # At the end of an execution, and the next one's may be too late.
        due = self._segments.noted_at() + self._config.forget_within_s / 2 - self._config.source.recycle_s
        if time.time() >= due:
            logger.info("%d records of forgotten users are deleted from segments", self._segments.forget())

    def _deliver(self, letters: list[Letter]) -> None:
        """Have dead letters acknowledged: their offsets must not count as settled before."""
        if not letters:
            return

        def send() -> None:
            try:
                for letter in letters:
                    self._letters.send(*letter)
                self._letters.flush()
            except (BrokerUnavailable, DeliveryFailed):
                self._letters.close()
                raise

        self._persistently(send)

    def counters(self) -> dict[int, Counters]:
        """What each partition's histories hold, and what happened in them so far."""
        return {p: reader.histories.counters() for p, reader in self._partitions.items()}

    def _states(self) -> list[tuple[int, RollingHistories, int]]:
        return [(p, reader.histories, reader.position) for p, reader in self._partitions.items()]

    # -- the bound ----------------------------------------------------------------------------------------

    def _find_bound(self, log: kafka.KafkaConsumer) -> None:
        """Learn where to stop, once that is decided; at the same time see that the broker is there."""
        partitions = list(self._partitions)
        assigned = [kafka.TopicPartition(self._config.kafka.topic, p) for p in partitions]
        if self._until is None or self._stops is not None:
            self._ask(lambda: log.end_offsets(assigned))
            return
        until = self._until
        self._stops = self._ask(lambda: until.stops(log, self._config, partitions))

    def _bound_reached(self) -> bool:
        stops = self._stops
        return stops is not None and all(r.position >= stops[p] for p, r in self._partitions.items())

    # -- a broker that is away ------------------------------------------------------------------------------

    def _ask(self, question: Callable[[], T]) -> T:
        """Ask the broker until it answers."""

        def ask() -> T:
            with reaching(self._config.kafka):
                return question()

        return self._persistently(ask)

    @staticmethod
    def _persistently(attempt: Callable[[], T]) -> T:
        """Try again until a broker is there, saying so once when it goes and once when it is back."""
        since: float | None = None
        while True:
            try:
                result = attempt()
            except (BrokerUnavailable, DeliveryFailed) as error:
                if since is None:
                    since = time.monotonic()
                    logger.warning("%s; reading goes on when it is back", error)
                time.sleep(RETRY_S)
                continue
            if since is not None:
                logger.warning("the broker is back after %.0f s", time.monotonic() - since)
            return result

    def _pass_over_gaps(self, log: kafka.KafkaConsumer, error: kafka.errors.OffsetOutOfRangeError) -> None:
        """Read on where positions have come to lie before the log. Raises OffsetGap or LogTruncated."""
        within = True
        for partition, reader in self._partitions.items():
            tp = kafka.TopicPartition(self._config.kafka.topic, partition)
            start = self._ask(lambda tp=tp: log.beginning_offsets([tp])[tp])  # type: ignore[misc]
            if start > reader.position:
                lost = sum(b - a for a, b in reader.unconsumed(reader.position, start))
                if lost and self._config.source.on_gap == "fail":
                    raise OffsetGap(tp.topic, partition, reader.position, start, lost) from error
                self._lose(reader, reader.position, start)
                log.seek(tp, start)
                within = False
            end = self._ask(lambda tp=tp: log.end_offsets([tp])[tp])  # type: ignore[misc]
            if end < reader.position:
                raise LogTruncated(tp.topic, partition, reader.position, end) from error
        if within:
            raise RuntimeError(
                "the broker says that a position is out of range, and every position is within it"
            ) from error


def joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of several partitions as one: a step for all is cheaper than a step for each."""
    if len(batches) == 1:
        return batches[0]
    arrays = {
        field.name: np.concatenate([getattr(batch, field.name) for batch in batches])
        for field in dataclasses.fields(MicroBatch)
        if isinstance(getattr(batches[0], field.name), np.ndarray)
    }
    return MicroBatch(
        **arrays,
        ranges=tuple(r for batch in batches for r in batch.ranges),
        item_names={key: name for batch in batches for key, name in batch.item_names.items()},
        newest_event_ms=max(batch.newest_event_ms for batch in batches),
        read_ms=min(batch.read_ms for batch in batches),
    )
