"""Appends posted events, and tombstones, to the log and says where each one stands."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import kafka
import kafka.errors

from grstream.api import Appended
from grstream.config import Config
from grstream.events import ActionEvent
from grstream.kafka import (
    AuthenticationFailed,
    BrokerUnavailable,
    TopicMissing,
    partition_count,
    partition_of,
    producer,
    reaching,
)
from grstream.keys import Id, partition_key
from serve.errors import Refusal, Unavailable

logger = logging.getLogger(__name__)

Record = tuple[bytes, bytes | None, int | None]  # key, value, and the partition if not the key's own

# A producer gives a record up after two request time-outs. Both fit into the time that a request may take, so
# that an answer knows what became of its events.
SPARE_MS = 200


class ActionWriter:
    """Blocking and thread-safe. Connects when first used and again after the broker was away."""

    def __init__(self, config: Config) -> None:
        patience = max(1, (config.serve.request_timeout_ms - SPARE_MS) // 2)
        timeout = min(config.kafka.request_timeout_ms, patience)
        self._config = config.kafka.model_copy(update={"request_timeout_ms": timeout})
        self._timeout_s = config.serve.request_timeout_ms / 1000
        self._lock = threading.Lock()
        self._producer: kafka.KafkaProducer | None = None

    def append(self, events: Sequence[ActionEvent]) -> list[Appended]:
        """Send events in order and wait until the log has them all.

        Raises Unavailable, with what was acknowledged, where the broker does not answer in time, and Refusal
        for an event that is larger than the broker takes.
        """
        return self._send(
            lambda log: [(partition_key(e.user_id), e.to_json(), None) for e in events],
            "events.{}",
            len(events),
        )

    def forget(self, user: Id) -> Appended:
        """Write a user's tombstone and wait until the log has it; where it stands. Raises as `append` does.

        It goes to every partition: before the topic grew, or by another client's hash, the user's events may
        have gone elsewhere. The one told of is the user's own.
        """

        def tombstones(log: kafka.KafkaProducer) -> list[Record]:
            partitions = log.partitions_for(self._config.topic)
            own = partition_of(user, len(partitions))
            return [(partition_key(user), None, p) for p in (own, *sorted(partitions - {own}))]

        return self._send(tombstones, "user_id", 1)[0]

    def _send(
        self, records: Callable[[kafka.KafkaProducer], list[Record]], field: str, count: int
    ) -> list[Appended]:
        """Send records and wait until the log has them all; where the first `count` stand."""
        deadline = time.monotonic() + self._timeout_s
        acknowledged: list[Appended | None] = [None] * count
        try:
            with reaching(self._config):
                log, futures = self._connected(), []
                for key, value, partition in records(log):
                    futures.append(log.send(self._config.topic, value, key=key, partition=partition))
                for i, future in enumerate(futures):
                    done = future.get(timeout=max(0.001, deadline - time.monotonic()))
                    if i < count:
                        acknowledged[i] = Appended(partition=done.partition, offset=done.offset)
        except AuthenticationFailed as error:  # it names this server's user and files: not for clients
            logger.error("%s", error)
            raise Unavailable(
                "broker_unavailable", "the log does not accept this server; its log says why", acknowledged
            ) from error
        except BrokerUnavailable as error:
            raise Unavailable("broker_unavailable", str(error), acknowledged) from error
        except kafka.errors.MessageSizeTooLargeError as error:
            raise Refusal(413, "too_large", str(error), field.format(len(futures)), acknowledged) from error
        except TopicMissing as error:
            raise Unavailable("topic_missing", str(error), acknowledged) from error
        except kafka.errors.KafkaError as error:
            logger.error("records were not acknowledged: %s", error)
            raise Unavailable("log_refused", str(error), acknowledged) from error
        return [at for at in acknowledged if at is not None]

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close(timeout=self._timeout_s)

    def _connected(self) -> kafka.KafkaProducer:
        with self._lock:
            if self._producer is None:
                partition_count(self._config)  # or a broker that creates topics unasked would take any name
                self._producer = producer(self._config)
            return self._producer
