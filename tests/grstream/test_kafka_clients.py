"""Clients made from the configuration find the log, say what is wrong where they do not, and lose nothing."""

import socket
import uuid
from collections.abc import Iterator

import kafka
import kafka.errors
import pytest

from grstream.config import KafkaConfig
from grstream.events import Rejected
from grstream.kafka import (
    DEAD_LETTER_BYTES,
    BrokerUnavailable,
    DeadLetters,
    TopicMissing,
    consumer,
    create_topic,
    partition_count,
    partition_of,
    producer,
)
from grstream.keys import partition_key


@pytest.fixture
def config(kafka_bootstrap: str) -> KafkaConfig:
    return KafkaConfig(bootstrap_servers=[kafka_bootstrap], topic=f"actions-{uuid.uuid4().hex}")


@pytest.fixture
def nobody() -> Iterator[KafkaConfig]:
    """An address where nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        yield KafkaConfig(bootstrap_servers=[address], request_timeout_ms=500)


def records(config: KafkaConfig, topic: str, partition: int, expected: int) -> list:
    with consumer(config) as reader:
        at = kafka.TopicPartition(topic, partition)
        reader.assign([at])
        reader.seek(at, 0)
        read: list = []
        for _ in range(100):
            read += reader.poll(100).get(at, [])
            if len(read) >= expected:
                break
        return read


@pytest.mark.parametrize("client", [consumer, producer, partition_count])
def test_a_broker_that_is_down_is_named_with_what_to_do(client: object, nobody: KafkaConfig) -> None:
    assert callable(client)
    with pytest.raises(
        BrokerUnavailable, match=rf"{nobody.bootstrap_servers[0]} within 500 ms.*grstream broker"
    ):
        client(nobody)


def test_a_user_hashes_to_the_partition_that_the_java_client_gives() -> None:
    # From org.apache.kafka.common.utils.UtilsTest.testMurmur2.
    java = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536, "abc": 479470107}
    for user, murmur2 in java.items():
        assert partition_of(user, 1_000_003) == (murmur2 & 0x7FFFFFFF) % 1_000_003
    assert partition_of(21, 7) == partition_of("21", 7)


@pytest.mark.kafka
def test_a_missing_topic_is_named_and_a_created_one_has_its_partitions(config: KafkaConfig) -> None:
    with pytest.raises(TopicMissing, match=rf"no topic '{config.topic}'.*--create-topic"):
        partition_count(config)
    assert create_topic(config, 3) == 3
    assert create_topic(config, 5) == 3, "a topic that is there stays as it is"
    assert partition_count(config) == 3


@pytest.mark.kafka
def test_a_users_records_arrive_in_order_in_the_partition_that_is_computed(config: KafkaConfig) -> None:
    create_topic(config, 3)
    users = [-1, "ana", 2**62, 4, 5]
    with producer(config) as sender:
        for i in range(10):
            for user in users:
                sender.send(config.topic, b"%d" % i, key=partition_key(user))
    for user in users:
        read = records(config, config.topic, partition_of(user, 3), 10)
        assert [int(r.value) for r in read if r.key == partition_key(user)] == list(range(10))


@pytest.mark.kafka
def test_a_position_outside_the_log_is_an_error(config: KafkaConfig) -> None:
    create_topic(config, 1)
    with consumer(config) as reader:
        at = kafka.TopicPartition(config.topic, 0)
        reader.assign([at])
        reader.seek(at, 7)
        with pytest.raises(kafka.errors.OffsetOutOfRangeError):
            reader.poll(10_000)


@pytest.mark.kafka
def test_a_dead_letter_holds_the_value_and_says_why_and_whence(config: KafkaConfig) -> None:
    letters = DeadLetters(config)
    letters.flush()
    letters.send(2, Rejected(41, "unknown action 'é'", "actions"), b"\xff\x00{")
    letters.send(2, Rejected(42, "not JSON \ud800", None), b"x" * (DEAD_LETTER_BYTES + 1))
    letters.flush()
    letters.close()
    first, second = records(config, f"{config.topic}.dead", 0, 2)
    assert first.value == b"\xff\x00{"
    assert first.key == f"{config.topic}:2:41".encode()
    assert dict(first.headers) == {
        "reason": "unknown action 'é'".encode(),
        "field": b"actions",
        "topic": config.topic.encode(),
        "partition": b"2",
        "offset": b"41",
    }
    assert len(second.value) == DEAD_LETTER_BYTES
    assert dict(second.headers)["bytes"] == str(DEAD_LETTER_BYTES + 1).encode()
