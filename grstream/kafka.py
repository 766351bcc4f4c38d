"""Clients of the log, made from the configuration: `consumer`, `producer`, topics, dead letters.

Clients speak bytes. A broker that cannot be reached is `BrokerUnavailable`, one that refuses the client or
that the client does not trust `AuthenticationFailed`, a topic that is not there `TopicMissing`; all say what
was tried and what to do. Offsets live in checkpoints: consumers have no group.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import kafka
import kafka.admin
import kafka.errors
import kafka.partitioner

from grstream.config import KafkaConfig
from grstream.connections import opening
from grstream.events import Rejected
from grstream.keys import Id, partition_key
from grstream.refusals import REFUSALS, refusal

# How long a broker holds a fetch that finds nothing. New records end the wait at once; it only bounds how
# late an idle reader notices a seek or a stop.
FETCH_WAIT_MS = 50
# A producer waits this long for company: long enough to fill batches at 10k events/s and more, short beside
# the tens of milliseconds from log to trainer.
LINGER_MS = 5
BATCH_BYTES = 128 << 10
METADATA_MS = 30_000  # a consumer knows of partitions that are added after so long at most
# Headers must fit beside the value under a broker's usual limit of 1 MB a record.
DEAD_LETTER_BYTES = 900_000
DEAD_LETTER_KEY_BYTES = 10_000

logger = logging.getLogger(__name__)


class BrokerUnavailable(ConnectionError):
    """No broker answers at the configured addresses, or none did in time."""


class AuthenticationFailed(BrokerUnavailable):
    """A broker answers, and it and the client do not accept each other: who and what to check, no secret."""


class TopicMissing(LookupError):
    """The broker does not have the topic."""


class DeliveryFailed(RuntimeError):
    """Records were not acknowledged by the broker."""


@contextlib.contextmanager
def reaching(config: KafkaConfig) -> Iterator[None]:
    """Turns kafka-python's connection errors and time-outs within into BrokerUnavailable.

    What authentication or TLS fail by is an AuthenticationFailed.
    """
    addresses = ", ".join(config.bootstrap_servers)
    try:
        yield
    except REFUSALS as error:
        why = refusal(error, config.security)
        raise AuthenticationFailed(f"no connection to the Kafka broker at {addresses}: {why}") from error
    except (
        kafka.errors.KafkaTimeoutError,
        kafka.errors.KafkaConnectionError,
        kafka.errors.NodeNotReadyError,
        kafka.errors.BrokerNotAvailableError,
        kafka.errors.RequestTimedOutError,
    ) as error:
        raise BrokerUnavailable(
            f"no Kafka broker answered at {addresses} within {config.request_timeout_ms} ms ({error}); "
            "start it (for development: `grstream broker`), or correct kafka.bootstrap_servers or "
            "kafka.security.protocol"
        ) from error


def consumer(config: KafkaConfig, max_poll_records: int = 2000) -> kafka.KafkaConsumer:
    """A consumer without a group, to be used with `assign` and `seek`.

    A position outside the log raises OffsetOutOfRangeError from `poll`: a gap is never skipped in silence.
    Records of aborted transactions are not seen.
    """
    with reaching(config), opening(config.security) as secured:
        return kafka.KafkaConsumer(
            **_connection(config),
            **secured,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            fetch_max_wait_ms=min(FETCH_WAIT_MS, config.request_timeout_ms - 1),
            metadata_max_age_ms=METADATA_MS,
            max_poll_records=max_poll_records,
        )


def producer(config: KafkaConfig) -> kafka.KafkaProducer:
    """An idempotent producer: acknowledged by all replicas, in order, once.

    Its default partitioner is murmur2 of the key, as `partition_of` computes it. Wait for its futures with a
    time-out of your own and close it with `close_producer`.
    """
    with reaching(config), opening(config.security) as secured:
        return kafka.KafkaProducer(
            **_connection(config),
            **secured,
            enable_idempotence=True,
            acks="all",
            compression_type="lz4",
            linger_ms=LINGER_MS,
            batch_size=BATCH_BYTES,
            max_block_ms=config.request_timeout_ms,
            delivery_timeout_ms=2 * config.request_timeout_ms + LINGER_MS,
            allow_auto_create_topics=False,
        )


def close_producer(sender: kafka.KafkaProducer, timeout_s: float) -> None:
    """Close, waiting so long at most for what is still under way; after that it fails with KafkaTimeoutError.

    Without this a producer that lost its broker may never close: kafka-python 3.0.12 stops expiring batches
    once it wants a new producer id, whatever `delivery_timeout_ms` says.
    """
    try:
        sender.close(timeout=timeout_s)
    except kafka.errors.KafkaTimeoutError:
        sender._sender.force_close()  # `close` raises before it comes to this
        sender.close(timeout=timeout_s)


def partition_of(user: Id, partitions: int) -> int:
    """The partition of a user's events: what the Java client and kafka-python make of the record key.

    librdkafka's default differs (use `partitioner=murmur2_random` there).
    """
    return int((kafka.partitioner.murmur2(partition_key(user)) & 0x7FFFFFFF) % partitions)


def partition_count(config: KafkaConfig, topic: str | None = None) -> int:
    """How many partitions the topic (default: the topic of actions) has. Raises TopicMissing."""
    topic = topic or config.topic
    with _admin(config) as admin:
        [described] = admin.describe_topics([topic])
    if described["error_code"] == kafka.errors.UnknownTopicOrPartitionError.errno:
        raise TopicMissing(
            f"the broker at {', '.join(config.bootstrap_servers)} has no topic {topic!r}; create it (`python "
            "jobs/replay.py --create-topic --partitions N ...`, or Kafka's own tools) or correct kafka.topic"
        )
    if described["error_code"]:
        raise kafka.errors.for_code(described["error_code"])(topic)
    return len(described["partitions"])


def create_topic(
    config: KafkaConfig, partitions: int, topic: str | None = None, retention_ms: int | None = None
) -> int:
    """Create the topic (default: the topic of actions) unless it is there; how many partitions it has.

    Its records are deleted by age and never compacted. A broker that cannot be told an age keeps its own.
    """
    topic = topic or config.topic
    options: dict[str, Any] = {"num_partitions": partitions, "configs": {"cleanup.policy": "delete"}}
    with _admin(config) as admin, contextlib.suppress(kafka.errors.TopicAlreadyExistsError):
        try:
            aged = {"retention.ms": str(retention_ms)} if retention_ms else {}
            configs = options["configs"] | aged
            admin.create_topics({topic: options | {"configs": configs}}, wait_for_metadata=True)
        except kafka.errors.InvalidConfigurationError as error:
            logger.warning("%s gets the broker's own retention: %s", topic, error)
            admin.create_topics({topic: options}, wait_for_metadata=True)
    return partition_count(config, topic)


class DeadLetters:
    """Records that are no events, sent whole to the dead-letter topic. Connects at the first one.

    A letter's key is `topic:partition:offset`, so letters sent again after a restart can be told; the same
    and `reason` and `field` are in its headers, and the record's own key, which names a user, in `key`. A
    value too long to fit is cut, with its length in the header `bytes`. Letters go by age alone, those of
    forgotten users, too: the topic is created with `dead_letter_retention_ms`; one that is there keeps its
    own.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._producer: kafka.KafkaProducer | None = None
        self._sent: list[Any] = []  # futures

    def send(
        self, partition: int, rejected: Rejected, value: bytes | None, record_key: bytes | None = None
    ) -> None:
        """Send one letter; `flush` says whether letters arrived."""
        if self._producer is None:
            create_topic(self._config, 1, self._config.dead_letters, self._config.dead_letter_retention_ms)
            self._producer = producer(self._config)
        headers = {
            "reason": rejected.reason,
            "topic": self._config.topic,
            "partition": str(partition),
            "offset": str(rejected.offset),
        }
        if rejected.field is not None:
            headers["field"] = rejected.field
        if value is not None and len(value) > DEAD_LETTER_BYTES:
            headers["bytes"] = str(len(value))
            value = value[:DEAD_LETTER_BYTES]
        with reaching(self._config):
            self._sent.append(
                self._producer.send(
                    self._config.dead_letters,
                    value,
                    key=f"{self._config.topic}:{partition}:{rejected.offset}".encode(),
                    headers=[
                        *((k, v.encode("utf-8", "backslashreplace")) for k, v in headers.items()),
                        *([("key", record_key[:DEAD_LETTER_KEY_BYTES])] if record_key is not None else []),
                    ],
                )
            )

    def flush(self) -> None:
        """Wait until every letter is acknowledged. Raises DeliveryFailed if one is not."""
        if self._producer is None:
            return
        with reaching(self._config):
            self._producer.flush(timeout=2 * self._config.request_timeout_ms / 1000)
        sent, self._sent = self._sent, []
        failed = [future.exception for future in sent if future.failed()]
        if failed:
            raise DeliveryFailed(
                f"{len(failed)} of {len(sent)} dead letters were not acknowledged by "
                f"{self._config.dead_letters!r}: {failed[0]}"
            )

    def close(self) -> None:
        if self._producer is not None:
            close_producer(self._producer, 2 * self._config.request_timeout_ms / 1000)
            self._producer = None


@contextlib.contextmanager
def _admin(config: KafkaConfig) -> Iterator[kafka.admin.KafkaAdminClient]:
    with reaching(config):
        with opening(config.security) as secured:
            admin = kafka.admin.KafkaAdminClient(**_connection(config), **secured)
        try:
            yield admin
        finally:
            admin.close()


def _connection(config: KafkaConfig) -> dict[str, Any]:
    return {
        "bootstrap_servers": config.bootstrap_servers,
        "request_timeout_ms": config.request_timeout_ms,
        "bootstrap_timeout_ms": config.request_timeout_ms,
        # The default backs off to 30 s, which a broker's restart would cost a reader.
        "reconnect_backoff_max_ms": 1000,
    }
