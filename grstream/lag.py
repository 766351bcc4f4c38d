"""How far behind the end of the log a position is."""

import contextlib
import threading
from collections.abc import Mapping

import kafka
import kafka.errors

from grstream.config import KafkaConfig
from grstream.kafka import BrokerUnavailable, consumer, reaching

ANSWER_MS = 1000  # a lag is shown, not needed: nobody waits longer for it
ASK_S = 5.0  # between questions of one who follows


class Lag:
    """Asks the broker for the log's end, over one connection, opened when first needed."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._log: kafka.KafkaConsumer | None = None

    def ends(self) -> dict[int, int] | None:
        """Each partition's end; None while the broker does not answer, or has no such topic."""
        with contextlib.suppress(BrokerUnavailable, kafka.errors.KafkaError), reaching(self._config):
            if self._log is None:
                self._log = consumer(self._config)
            there = self._log.partitions_for_topic(self._config.topic)
            if not there:
                return None
            asked = [kafka.TopicPartition(self._config.topic, p) for p in sorted(there)]
            ends = self._log.end_offsets(asked, timeout_ms=ANSWER_MS)
            return {tp.partition: end for tp, end in ends.items()}
        return None

    def of(self, positions: Mapping[int, int]) -> int | None:
        """Offsets between the positions and the log's end; None while the broker does not answer."""
        ends = self.ends()
        return None if ends is None else sum(behind(ends, positions).values())

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def behind(ends: Mapping[int, int], positions: Mapping[int, int]) -> dict[int, int]:
    """By partition the offsets from the position, 0 where there is none, to the end."""
    return {p: max(0, end - positions.get(p, 0)) for p, end in ends.items()}


class LogEnds:
    """The log's end as it was a few seconds ago, asked for by a thread: nobody waits for a broker."""

    def __init__(self, config: KafkaConfig) -> None:
        self._lag = Lag(config)
        self._ends: dict[int, int] | None = None
        self._stopping = threading.Event()
        # A question may take as long as a connection attempt does, and whoever ends does not wait for that.
        threading.Thread(target=self._follow, name="log-ends", daemon=True).start()

    def now(self) -> dict[int, int] | None:
        """None while the broker does not answer."""
        return self._ends

    def close(self) -> None:
        self._stopping.set()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            self._ends = self._lag.ends()
            self._stopping.wait(ASK_S)
        self._lag.close()
