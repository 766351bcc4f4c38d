"""How far behind the end of the log a position is."""

import contextlib
from collections.abc import Mapping

import kafka
import kafka.errors

from grstream.config import KafkaConfig
from grstream.kafka import BrokerUnavailable, consumer, reaching

ANSWER_MS = 1000  # a lag is shown, not needed: nobody waits longer for it


class Lag:
    """Asks the broker for the log's end, over one connection, opened when first needed."""

    def __init__(self, config: KafkaConfig, partitions: int) -> None:
        self._config = config
        self._asked = [kafka.TopicPartition(config.topic, p) for p in range(partitions)]
        self._log: kafka.KafkaConsumer | None = None

    def of(self, positions: Mapping[int, int]) -> int | None:
        """Offsets between the positions and the log's end; None while the broker does not answer."""
        with contextlib.suppress(BrokerUnavailable, kafka.errors.KafkaError), reaching(self._config):
            if self._log is None:
                self._log = consumer(self._config)
            ends = self._log.end_offsets(self._asked, timeout_ms=ANSWER_MS)
            return sum(max(0, end - positions.get(tp.partition, 0)) for tp, end in ends.items())
        return None

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
