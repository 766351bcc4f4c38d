"""Where a bounded reading of the log ends."""

import contextlib
import dataclasses
import datetime
import re
import time
from collections.abc import Mapping

import kafka

from grstream.config import Config
from grstream.kafka import consumer, partition_count, reaching
from grstream.ledger import Ledger
from grstream.segments import Segments

_OFFSETS = re.compile(r"\d+:-?\d+(,\d+:-?\d+)*")

_UNREAD = -(2**63)  # below every offset, those of a backfill too


def end_offsets(config: Config) -> dict[int, int]:
    """The end of each partition of the topic as it is now. Raises BrokerUnavailable or TopicMissing."""
    partitions = range(partition_count(config.kafka))
    with reaching(config.kafka), contextlib.closing(consumer(config.kafka)) as log:
        ends = log.end_offsets([kafka.TopicPartition(config.kafka.topic, p) for p in partitions])
    return {tp.partition: offset for tp, offset in ends.items()}


@dataclasses.dataclass(frozen=True)
class Until:
    """Where a bounded run ends: before an offset of each partition, or before the first record of a time.

    A partition without an offset is not read at all.
    """

    offsets: Mapping[int, int] | None = None
    time_ms: int | None = None

    @classmethod
    def parse(cls, text: str, config: Config) -> "Until":
        """`now` (the log's end as it is), `0:1200,1:900` (partition:offset), or an ISO date and time.

        Raises ValueError for anything else, BrokerUnavailable and TopicMissing where the log must be asked.
        """
        if text == "now":
            return cls(offsets=end_offsets(config))
        if _OFFSETS.fullmatch(text):
            return cls(offsets={int(p): int(o) for p, o in (pair.split(":") for pair in text.split(","))})
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError as error:
            raise ValueError(
                f"{text!r} is no end of a run: expected `now`, `PARTITION:OFFSET,...` or an ISO date and time"
            ) from error
        return cls(time_ms=int(moment.timestamp() * 1000))

    def has_come(self) -> bool:
        """Whether it is decided by now where to stop."""
        return self.time_ms is None or time.time() * 1000 >= self.time_ms

    def stops(self, log: kafka.KafkaConsumer, config: Config, partitions: list[int]) -> dict[int, int] | None:
        """The offset of each partition at which to stop; None while the time has not come."""
        if self.offsets is not None:
            return {p: self.offsets.get(p, _UNREAD) for p in partitions}
        if not self.has_come():
            return None
        asked = [kafka.TopicPartition(config.kafka.topic, p) for p in partitions]
        found = log.offsets_for_times(dict.fromkeys(asked, self.time_ms))
        ends = log.end_offsets(asked)
        stops = {tp.partition: found[tp].offset if found.get(tp) else ends[tp] for tp in asked}
        segments = Segments.of(config)
        for partition, stop in stops.items():
            span = segments.span(partition) if segments else None
            if segments and span and stop <= span[1] and self.time_ms is not None:
                stops[partition] = segments.first_at(partition, self.time_ms)
        return stops

    def in_log(self, config: Config) -> bool:
        """Whether it is decided where to stop, and the log goes so far."""
        ends = end_offsets(config)
        with reaching(config.kafka), contextlib.closing(consumer(config.kafka)) as log:
            stops = self.stops(log, config, list(ends))
        return stops is not None and all(stop <= ends[p] for p, stop in stops.items())

    def reached(self, config: Config, ledger: Ledger) -> bool:
        """Whether everything before the end is in the ledger, or no longer in the log."""
        partitions = list(range(partition_count(config.kafka)))
        with reaching(config.kafka), contextlib.closing(consumer(config.kafka)) as log:
            stops = self.stops(log, config, partitions)
            begins = log.beginning_offsets([kafka.TopicPartition(config.kafka.topic, p) for p in partitions])
        if stops is None:
            return False
        starts = {tp.partition: offset for tp, offset in begins.items()}
        segments = Segments.of(config)
        if segments:
            starts |= {p: segments.manifest.partitions[p].start for p in partitions if segments.span(p)}
        return all(stop <= max(ledger.watermark(p) or starts[p], starts[p]) for p, stop in stops.items())
