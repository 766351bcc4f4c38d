"""What the project relies on from a Kafka's consumer groups.

Runs against the development broker, or any other (`--apache-kafka`, `KAFKA_BOOTSTRAP_SERVERS`).
"""

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

import confluent_kafka
import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import CommitFailedError, KafkaError, RebalanceInProgressError
from kafka.structs import OffsetAndMetadata

pytestmark = pytest.mark.kafka


class Member(Protocol):
    """A consumer in a group."""

    def poll(self) -> list[bytes]: ...

    def assigned(self) -> set[int]: ...

    def commit(self) -> None: ...

    def close(self) -> None: ...


class KafkaPythonMember:
    def __init__(self, bootstrap: str, topic: str, group: str) -> None:
        self.consumer = KafkaConsumer(
            topic,
            bootstrap_servers=bootstrap,
            group_id=group,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            heartbeat_interval_ms=200,
            max_poll_records=5,
        )

    def poll(self) -> list[bytes]:
        return [r.value for records in self.consumer.poll(50).values() for r in records]

    def assigned(self) -> set[int]:
        return {tp.partition for tp in self.consumer.assignment()}

    def commit(self) -> None:
        self.consumer.commit()

    def close(self) -> None:
        self.consumer.close()


class LibrdkafkaMember:
    def __init__(self, bootstrap: str, topic: str, group: str) -> None:
        self.consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": group,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "heartbeat.interval.ms": 200,
            }
        )
        self.consumer.subscribe([topic])

    def poll(self) -> list[bytes]:
        return [m.value() for m in self.consumer.consume(5, 0.05) if m.error() is None]

    def assigned(self) -> set[int]:
        return {tp.partition for tp in self.consumer.assignment()}

    def commit(self) -> None:
        self.consumer.commit(asynchronous=False)

    def close(self) -> None:
        self.consumer.close()


MEMBERS: dict[str, Callable[[str, str, str], Member]] = {
    "kafka-python": KafkaPythonMember,
    "librdkafka": LibrdkafkaMember,
}
each_pair = pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a in MEMBERS for b in MEMBERS], ids=lambda name: name
)


@each_pair
def test_two_members_share_the_partitions_and_one_takes_over(
    first, second, kafka_bootstrap, make_topic, group, admin
):
    topic = make_topic(4)
    with contextlib.closing(MEMBERS[first](kafka_bootstrap, topic, group)) as a:
        _poll_until([a], lambda _: a.assigned() == {0, 1, 2, 3})
        b = MEMBERS[second](kafka_bootstrap, topic, group)
        _poll_until([a, b], lambda _: len(a.assigned()) == 2 and a.assigned() | b.assigned() == {0, 1, 2, 3})
        described = admin.describe_groups([group])[group]
        assert (described["group_state"], len(described["members"])) == ("Stable", 2)
        b.close()
        _poll_until([a], lambda _: a.assigned() == {0, 1, 2, 3})
    _eventually(lambda: admin.describe_groups([group])[group]["group_state"] in ("Empty", "Dead"))


@each_pair
def test_a_group_goes_on_where_it_committed(
    first, second, kafka_bootstrap, make_topic, group, kafka_python, sent, admin
):
    topic = make_topic()
    kafka_python.produce(topic, [sent(b"%d" % i) for i in range(10)])
    with contextlib.closing(MEMBERS[first](kafka_bootstrap, topic, group)) as member:
        got = _poll_until([member], lambda got: len(got) >= 5)
        assert got == [b"%d" % i for i in range(5)]
        member.commit()
        _poll_until([member], lambda got: len(got) >= 5)  # read, but not committed
    assert admin.list_group_offsets({group: None})[group][TopicPartition(topic, 0)].offset == 5
    with contextlib.closing(MEMBERS[second](kafka_bootstrap, topic, group)) as member:
        got = _poll_until([member], lambda got: len(got) >= 5)
    assert got == [b"%d" % i for i in range(5, 10)]


def test_a_reader_that_assigns_itself_commits_and_finds_its_metadata(
    kafka_bootstrap, make_topic, group, admin
):
    topic = make_topic()
    tp = TopicPartition(topic, 0)
    with KafkaConsumer(bootstrap_servers=kafka_bootstrap, group_id=group) as consumer:
        consumer.assign([tp])
        assert consumer.committed(tp) is None
        consumer.commit({tp: OffsetAndMetadata(42, "here ✓", -1)})
        assert consumer.committed(tp, metadata=True)[:2] == (42, "here ✓")
    assert group in [g["group_id"] for g in admin.list_groups()]


def test_a_member_that_fell_silent_loses_its_partitions(kafka_bootstrap, make_topic, group):
    topic = make_topic(2)
    silent = KafkaConsumer(
        topic,
        bootstrap_servers=kafka_bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=6000,  # Apache Kafka's least
        heartbeat_interval_ms=500,
        max_poll_interval_ms=1000,
    )
    with contextlib.closing(silent):
        deadline = time.monotonic() + 20
        while len(silent.assignment()) < 2 and time.monotonic() < deadline:
            silent.poll(50)
        with contextlib.closing(KafkaPythonMember(kafka_bootstrap, topic, group)) as other:
            _poll_until([other], lambda _: other.assigned() == {0, 1})
            # The second where the client has heard already that it is out.
            with pytest.raises((CommitFailedError, RebalanceInProgressError)):
                silent.commit({TopicPartition(topic, 0): OffsetAndMetadata(1, "", -1)})


def test_a_commit_for_an_unknown_partition_is_refused(kafka_bootstrap, make_topic, group):
    topic = make_topic(1)
    with KafkaConsumer(bootstrap_servers=kafka_bootstrap, group_id=group) as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        with pytest.raises(KafkaError):
            consumer.commit({TopicPartition(topic, 7): OffsetAndMetadata(1, "", -1)}, timeout_ms=1000)


def test_deleting_a_topic_forgets_what_was_committed_for_it(kafka_bootstrap, make_topic, group, admin):
    topic = make_topic()
    tp = TopicPartition(topic, 0)
    with KafkaConsumer(bootstrap_servers=kafka_bootstrap, group_id=group) as consumer:
        consumer.assign([tp])
        consumer.commit({tp: OffsetAndMetadata(42, "", -1)})
    admin.delete_topics([topic])
    _eventually(lambda: topic not in admin.list_topics())
    _eventually(lambda: tp not in admin.list_group_offsets({group: None}).get(group, {}))


def _poll_until(members: list[Member], done: Callable[[list[bytes]], bool]) -> list[bytes]:
    """Let members poll in turn until something holds of what they got, or of them; what they got."""
    got: list[bytes] = []
    deadline = time.monotonic() + 30
    while not done(got):
        assert time.monotonic() < deadline, [m.assigned() for m in members]
        for member in members:
            got += member.poll()
    return got


def _eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
