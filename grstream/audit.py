"""An audit of what a trainer says that it trained on (laws 4 and 7), against the topic itself.

Three accounts are compared, none made from another: the records of the topic, decoded anew, with duplicates
found anew; the ledger of the newest checkpoint; and the journals of the runs that led to it.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

import kafka
import numpy as np
import numpy.typing as npt

from grstream.checkpoints import Checkpoint, CheckpointStore
from grstream.config import Config
from grstream.events import EventDecoder
from grstream.journal import Mark, lineage
from grstream.kafka import BrokerUnavailable, consumer, reaching
from grstream.keys import ABSENT
from grstream.ledger import Disposition

UNRECORDED = -1
QUIET_POLLS = 20  # fetches in a row that bring nothing before the audit gives up on a broker
Dispositions = npt.NDArray[np.int8]  # by offset, from a partition's first audited offset on


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
    counts: dict[Disposition, int]


@dataclasses.dataclass(frozen=True)
class Audit:
    """The audit of a checkpoint."""

    checkpoint: int
    trained: int  # events, as the trainer counted them
    recorded: int  # offsets that the ledger holds as trained
    partitions: list[PartitionAudit]

    @property
    def missing(self) -> int:
        return sum(len(p.missing) for p in self.partitions)

    @property
    def twice(self) -> int:
        return sum(len(p.twice) for p in self.partitions)

    @property
    def wrong(self) -> int:
        return sum(len(p.wrong) + len(p.unjournaled) for p in self.partitions)

    @property
    def passed(self) -> bool:
        return not (self.missing or self.twice or self.wrong) and self.trained == self.recorded

    def count(self, disposition: Disposition) -> int:
        return sum(p.counts[disposition] for p in self.partitions)


def audit(config: Config) -> Audit:
    """Audit the newest checkpoint. Raises NothingToAudit, BrokerUnavailable or FileNotFoundError."""
    checkpoint = CheckpointStore(config.storage / "checkpoints").newest()
    if checkpoint is None:
        raise NothingToAudit(f"no checkpoint in {config.storage / 'checkpoints'}: nothing was trained yet")
    with reaching(config.kafka), contextlib.closing(consumer(config.kafka)) as log:
        partitions = [_audit(config, log, checkpoint, p) for p in checkpoint.ledger.partitions()]
    return Audit(
        checkpoint=checkpoint.record.number,
        trained=checkpoint.record.events,
        recorded=checkpoint.ledger.count(Disposition.TRAINED),
        partitions=partitions,
    )


def _audit(
    config: Config, log: kafka.KafkaConsumer, checkpoint: Checkpoint, partition: int
) -> PartitionAudit:
    consumed = checkpoint.ledger.consumed(partition)
    tp = kafka.TopicPartition(config.kafka.topic, partition)
    start = max(consumed[0][0], log.beginning_offsets([tp])[tp])
    stop = max(start, consumed[-1][1])
    lost = sum(
        r.stop - r.start
        for r in checkpoint.ledger
        if (r.partition, r.disposition) == (partition, Disposition.LOST)
    )
    recorded = np.full(stop - start, UNRECORDED, np.int8)
    for r in checkpoint.ledger:
        if r.partition == partition:
            recorded[max(r.start - start, 0) : max(r.stop - start, 0)] = r.disposition
    journaled = np.full(stop - start, UNRECORDED, np.int8)
    times = np.zeros(stop - start, np.int32)
    mark = Mark(checkpoint.record.run, checkpoint.record.entries)
    for r in lineage(config.storage / "metrics", mark):
        if r.partition == partition:
            within = slice(max(r.start - start, 0), max(r.stop - start, 0))
            journaled[within] = r.disposition
            times[within] += 1
    expected = _expected(config, log, tp, start, stop)
    wrong = np.flatnonzero((recorded != UNRECORDED) & (recorded != expected))
    return PartitionAudit(
        partition=partition,
        start=start,
        stop=stop,
        gone=sum(min(b, start) - a for a, b in consumed if a < start) - lost,
        lost=lost,
        missing=_offsets(recorded == UNRECORDED, start),
        twice=_offsets(times > 1, start),
        unjournaled=_offsets((times < 2) & (journaled != recorded), start),
        wrong=[(start + int(i), Disposition(int(recorded[i])), Disposition(int(expected[i]))) for i in wrong],
        counts={d: int((recorded == d).sum()) for d in Disposition},
    )


def _offsets(where: npt.NDArray[np.bool_], start: int) -> list[int]:
    return (np.flatnonzero(where) + start).tolist()


def _expected(
    config: Config, log: kafka.KafkaConsumer, tp: kafka.TopicPartition, start: int, stop: int
) -> Dispositions:
    """What the records themselves say must become of each offset."""
    expected = np.full(stop - start, Disposition.CONTROL, np.int8)
    decoder = EventDecoder(config.events)
    accepted: collections.OrderedDict[int, int] = collections.OrderedDict()  # event key -> offset
    for records in _records(config, log, tp, start, stop):
        offsets = [r.offset for r in records]
        decoded = decoder.decode(
            tp.partition,
            offsets,
            [r.value for r in records],
            [r.timestamp for r in records],
            [r.key for r in records],
        )
        expected[decoded.batch.offsets - start] = Disposition.TRAINED
        expected[decoded.tombstones.offsets - start] = Disposition.TOMBSTONE
        expected[[r.offset - start for r in decoded.rejected]] = Disposition.DEAD_LETTER
        for key, offset in zip(
            decoded.batch.event_keys.tolist(), decoded.batch.offsets.tolist(), strict=True
        ):
            if key == ABSENT:
                continue
            if offset - accepted.get(key, -np.inf) <= config.histories.duplicate_window:
                expected[offset - start] = Disposition.DUPLICATE
            else:
                accepted[key] = offset
    return expected


def _records(
    config: Config, log: kafka.KafkaConsumer, tp: kafka.TopicPartition, start: int, stop: int
) -> Iterator[list[kafka.consumer.fetcher.ConsumerRecord]]:
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
