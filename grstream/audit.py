"""An audit of what a trainer says that it trained on (laws 4 and 7), against the topic itself.

Three accounts are compared, none made from another: the records of the topic, and before them those of a
backfill's segments, decoded anew, with duplicates found anew; the ledger of the newest checkpoint; and the
journals of the runs that led to it.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Sequence

import kafka
import numpy as np
import numpy.typing as npt
from kafka.consumer.fetcher import ConsumerRecord

from grstream.checkpoints import Checkpoint, CheckpointStore
from grstream.config import Config, ExposuresConfig
from grstream.events import Decoded, EventDecoder
from grstream.journal import Mark, lineage
from grstream.kafka import BrokerUnavailable, consumer, reaching
from grstream.keys import ABSENT, INT64_MAX, INT64_MIN
from grstream.ledger import Disposition
from grstream.segments import Record, Segments

UNRECORDED = -1
FORGOTTEN = -2  # the record is gone on purpose: whatever became of its offset is right
QUIET_POLLS = 20  # fetches in a row that bring nothing before the audit gives up on a broker
Dispositions = npt.NDArray[np.int8]  # by audited offset


class NothingToAudit(RuntimeError):
    """There is no checkpoint."""


@dataclasses.dataclass(frozen=True)
class PartitionAudit:
    """One partition, over the offsets that its log still has, up to the last one consumed."""

    partition: int
    start: int
    stop: int
    gone: int  # offsets read that the log no longer has
    lost: int  # offsets that the log lost before they were read
    missing: list[int]  # offsets before `stop` that the ledger lacks
    twice: list[int]  # offsets that the journals settle more than once
    unjournaled: list[int]  # offsets on which ledger and journals differ otherwise
    wrong: list[tuple[int, Disposition, Disposition]]  # offset, recorded, what the record says
    uncounted: int  # by how much the ledger's counts differ from the journals, where it counts alone
    counts: dict[Disposition, int]


@dataclasses.dataclass(frozen=True)
class Audit:
    """The audit of a checkpoint."""

    checkpoint: int
    trained: int  # events, as the trainer counted them
    recorded: int  # offsets that the ledger holds as trained, or as corrections that are trained on
    partitions: list[PartitionAudit]

    @property
    def missing(self) -> int:
        return sum(len(p.missing) for p in self.partitions)

    @property
    def twice(self) -> int:
        return sum(len(p.twice) for p in self.partitions)

    @property
    def wrong(self) -> int:
        return sum(len(p.wrong) + len(p.unjournaled) + p.uncounted for p in self.partitions)

    @property
    def passed(self) -> bool:
        return not (self.missing or self.twice or self.wrong) and self.trained == self.recorded

    def count(self, disposition: Disposition) -> int:
        return sum(p.counts[disposition] for p in self.partitions)


def audit(config: Config) -> Audit:
    """Audit the newest checkpoint. Raises NothingToAudit, BrokerUnavailable or FileNotFoundError."""
    checkpoint = CheckpointStore(config.storage / "checkpoints").newest()
    if checkpoint is None:
        raise NothingToAudit(
            f"no checkpoint in {config.storage / 'checkpoints'} yet: a trainer writes one every "
            "train.checkpoint_every_s, and when it is stopped"
        )
    with reaching(config.kafka), contextlib.closing(consumer(config.kafka)) as log:
        partitions = [_audit(config, log, checkpoint, p) for p in checkpoint.ledger.partitions()]
    return Audit(
        checkpoint=checkpoint.record.number,
        trained=checkpoint.record.events,
        recorded=sum(map(checkpoint.ledger.count, _learned(config))),
        partitions=partitions,
    )


def _audit(
    config: Config, log: kafka.KafkaConsumer, checkpoint: Checkpoint, partition: int
) -> PartitionAudit:
    consumed = checkpoint.ledger.consumed(partition)
    tp = kafka.TopicPartition(config.kafka.topic, partition)
    readable = _Readable.of(config, partition, consumed, log.beginning_offsets([tp])[tp])
    lost = checkpoint.ledger.count(Disposition.LOST, partition)
    recorded = np.full(len(readable), UNRECORDED, np.int8)
    for r in checkpoint.ledger:
        if r.partition == partition:
            recorded[readable.within(r.start, r.stop)] = r.disposition
    journaled = np.full(len(readable), UNRECORDED, np.int8)
    times = np.zeros(len(readable), np.int32)
    settled = checkpoint.ledger.settled(partition)
    told = [0] * len(Disposition)  # by the journals, of what the ledger counts alone
    mark = Mark(checkpoint.record.run, checkpoint.record.entries)
    for r in lineage(config.storage / "metrics", mark):
        if r.partition == partition:
            within = readable.within(r.start, r.stop)
            journaled[within] = r.disposition
            times[within] += 1
            if settled is not None:
                told[r.disposition] += max(0, min(r.stop, settled.stop) - max(r.start, settled.start))
    if settled is not None:
        within = readable.within(settled.start, settled.stop)
        recorded[within] = journaled[within]
    expected = _expected(config, log, tp, readable)
    wrong = (recorded != UNRECORDED) & (expected != FORGOTTEN) & (recorded != expected)
    return PartitionAudit(
        partition=partition,
        start=readable.spans[0][0],
        stop=readable.spans[-1][1],
        gone=sum(b - a for a, b in consumed) - sum(readable.count(a, b) for a, b in consumed) - lost,
        lost=lost,
        missing=readable.offsets(recorded == UNRECORDED),
        twice=readable.offsets(times > 1),
        unjournaled=readable.offsets((times < 2) & (journaled != recorded)),
        wrong=[
            (offset, Disposition(said), Disposition(is_so))
            for offset, said, is_so in zip(
                readable.offsets(wrong), recorded[wrong].tolist(), expected[wrong].tolist(), strict=True
            )
        ],
        uncounted=0 if settled is None else sum(map(abs, map(operator.sub, told, settled.counts))),
        counts={d: int((recorded == d).sum()) for d in Disposition},
    )


class _Readable:
    """The offsets of a partition that can be read still: of its segments, if it has any, and of the topic.

    An array by index holds those of the first span and then those of the second.
    """

    def __init__(self, segments: Segments | None, spans: list[tuple[int, int]]) -> None:
        self.segments, self.spans = segments, spans

    @classmethod
    def of(
        cls, config: Config, partition: int, consumed: list[tuple[int, int]], topic_start: int
    ) -> "_Readable":
        """Up to the last offset consumed."""
        stop = consumed[-1][1]
        segments = Segments.of(config)
        span = segments.span(partition) if segments else None
        if span is None:
            start = max(consumed[0][0], topic_start)
            return cls(None, [(start, max(start, stop))])
        start, seam = span
        topic_start = max(topic_start, seam)
        return cls(segments, [(start, max(start, min(seam, stop))), (topic_start, max(topic_start, stop))])

    def __len__(self) -> int:
        return sum(b - a for a, b in self.spans)

    def index(self, offsets: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """How many of these offsets lie before others: (n,)"""
        others = np.asarray(offsets, np.int64)
        return sum((np.clip(others - a, 0, b - a) for a, b in self.spans), np.zeros_like(others))

    def within(self, start: int, stop: int) -> slice:
        first, end = self.index([start, stop]).tolist()
        return slice(first, end)

    def count(self, start: int, stop: int) -> int:
        within = self.within(start, stop)
        return within.stop - within.start

    def offsets(self, where: npt.NDArray[np.bool_]) -> list[int]:
        """The offsets whose index is marked: the inverse of `index`."""
        found = np.flatnonzero(where)
        start, stop = self.spans[0]
        return np.where(found < stop - start, start + found, self.spans[-1][1] - len(self) + found).tolist()


def _learned(config: Config) -> list[Disposition]:
    """What becomes of offsets that are learned from as events of their own."""
    exposures = config.events.exposures
    corrections = [Disposition.CORRECTION] if exposures and exposures.late_labels == "train" else []
    return [Disposition.TRAINED, *corrections]


def _expected(
    config: Config, log: kafka.KafkaConsumer, tp: kafka.TopicPartition, readable: _Readable
) -> Dispositions:
    """What the records themselves say must become of each offset."""
    expected = np.full(len(readable), Disposition.CONTROL, np.int8)
    decoder = EventDecoder(config.events)
    accepted: dict[int, int] = {}  # event key -> offset
    join = _Join(config.events.exposures) if config.events.exposures else None
    for records in _records(log, tp, readable):
        offsets = [r.offset for r in records]
        decoded = decoder.decode(
            tp.partition,
            offsets,
            [r.value for r in records],
            [r.timestamp for r in records],
            [r.key for r in records],
        )
        expected[readable.index(decoded.batch.offsets)] = Disposition.TRAINED
        expected[readable.index(decoded.tombstones.offsets)] = Disposition.TOMBSTONE
        expected[readable.index([r.offset for r in decoded.rejected])] = Disposition.DEAD_LETTER
        repeated = []
        for key, offset in zip(
            decoded.batch.event_keys.tolist(), decoded.batch.offsets.tolist(), strict=True
        ):
            if key == ABSENT:
                continue
            if offset - accepted.get(key, -np.inf) <= config.histories.duplicate_window:
                repeated.append(offset)
            else:
                accepted[key] = offset
        expected[readable.index(repeated)] = Disposition.DUPLICATE
        if join is not None:
            join.judge(decoded, expected[readable.index(decoded.batch.offsets)] == Disposition.TRAINED)
            expected[readable.index([*join.ends])] = [*join.ends.values()]
            join.ends.clear()
    if readable.segments:
        forgotten = readable.segments.forgotten(tp.partition)
        expected[readable.index(forgotten[forgotten < readable.spans[0][1]])] = FORGOTTEN
    return expected


class _Join:
    """What becomes of labels, one event at a time; `grstream.exposures` says what is to."""

    def __init__(self, config: ExposuresConfig) -> None:
        self.ends: dict[int, Disposition] = {}
        self._config = config
        self._clock, self._events = INT64_MIN, 0
        self._shown: dict[int, tuple[int, int, int]] = {}  # exposure key -> user, clock, events so far

    def judge(self, decoded: Decoded, accepted: npt.NDArray[np.bool_]) -> None:
        batch = decoded.batch
        assert batch.exposures is not None
        columns = (batch.offsets, batch.users, batch.actions, batch.times, batch.exposures)
        events = [
            event
            for event, kept in zip(zip(*(c.tolist() for c in columns), strict=True), accepted, strict=True)
            if kept
        ]
        forgotten = zip(decoded.tombstones.offsets.tolist(), decoded.tombstones.users.tolist(), strict=True)
        for offset, user, *event in sorted([*events, *forgotten]):
            if not event:
                self._shown = {k: shown for k, shown in self._shown.items() if shown[0] != user}
                continue
            actions, time, exposure = event
            self._clock, self._events = max(self._clock, time), self._events + 1
            if exposure == ABSENT:
                continue
            if not actions:
                self._shown.pop(exposure, None)
                self._shown[exposure] = (user, self._clock, self._events)
                while self._clock - next(iter(self._shown.values()))[1] > self._config.window_ms:
                    del self._shown[next(iter(self._shown))]
                continue
            _, clock, events_then = self._shown.get(exposure, (user, -INT64_MAX, 0))
            is_open = (
                self._clock - clock <= self._config.window_ms
                and self._events - events_then < self._config.max_open
            )
            self.ends[offset] = Disposition.JOINED if is_open else Disposition.CORRECTION


def _records(
    log: kafka.KafkaConsumer, tp: kafka.TopicPartition, readable: _Readable
) -> Iterator[Sequence[ConsumerRecord | Record]]:
    if readable.segments:
        start, stop = readable.spans[0]
        for earlier in readable.segments.records(tp.partition, start):
            within = [r for r in earlier if r.offset < stop]
            if within:
                yield within
            if len(within) < len(earlier):
                break
    start, stop = readable.spans[-1]
    if start == stop:
        return
    log.assign([tp])
    log.seek(tp, start)
    quiet = 0
    while log.position(tp) < stop:
        before = log.position(tp)
        records = [r for r in log.poll(timeout_ms=1000).get(tp, []) if r.offset < stop]
        if records:
            yield records
        quiet = quiet + 1 if log.position(tp) == before else 0
        if quiet == QUIET_POLLS:
            raise BrokerUnavailable(f"the log of {tp.topic}-{tp.partition} does not go on at {before}")
