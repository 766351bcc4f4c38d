"""The two clients of the conformance suite behind one face, topics for them, and a client of bare frames."""

import contextlib
import dataclasses
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import confluent_kafka
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.record.default_records import DefaultRecordBatchBuilder

PATIENCE_S = 20.0
Headers = list[tuple[str, bytes]]


@dataclasses.dataclass(frozen=True)
class Sent:
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    timestamp_ms: int | None = None
    headers: Headers = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Got:
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None
    timestamp_ms: int
    headers: Headers


class Client(Protocol):
    """What both clients can do; `codec` is a compression type."""

    def produce(self, topic: str, records: Sequence[Sent], codec: str = "none") -> None: ...

    def consume(self, topic: str, partitions: int, count: int) -> list[Got]: ...


class KafkaPython:
    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def produce(self, topic: str, records: Sequence[Sent], codec: str = "none") -> None:
        with KafkaProducer(
            bootstrap_servers=self.bootstrap,
            compression_type=None if codec == "none" else codec,
            linger_ms=5,
        ) as producer:
            futures = [
                producer.send(
                    topic,
                    r.value,
                    key=r.key,
                    partition=r.partition,
                    timestamp_ms=r.timestamp_ms,
                    headers=r.headers,
                )
                for r in records
            ]
            for future in futures:
                future.get(PATIENCE_S)

    def consume(self, topic: str, partitions: int, count: int) -> list[Got]:
        with KafkaConsumer(
            bootstrap_servers=self.bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            allow_auto_create_topics=False,
        ) as consumer:
            consumer.assign([TopicPartition(topic, p) for p in range(partitions)])
            got: list[Got] = []
            deadline = time.monotonic() + PATIENCE_S
            while len(got) < count and time.monotonic() < deadline:
                for records in consumer.poll(100).values():
                    got += [
                        Got(r.partition, r.offset, r.value, r.key, r.timestamp, list(r.headers))
                        for r in records
                    ]
            return got


class Librdkafka:
    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def produce(self, topic: str, records: Sequence[Sent], codec: str = "none") -> None:
        producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": self.bootstrap,
                "compression.type": codec,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "linger.ms": 5,
            }
        )
        failures = []

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                failures.append(error)

        for r in records:
            options: dict[str, Any] = {"headers": r.headers} if r.headers else {}
            if r.partition is not None:
                options["partition"] = r.partition
            if r.timestamp_ms is not None:
                options["timestamp"] = r.timestamp_ms
            producer.produce(topic, r.value, key=r.key, on_delivery=delivered, **options)
            producer.poll(0)
        assert producer.flush(PATIENCE_S) == 0
        assert not failures

    def consume(self, topic: str, partitions: int, count: int) -> list[Got]:
        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": self.bootstrap, "group.id": uuid.uuid4().hex, "enable.auto.commit": False}
        )
        with contextlib.closing(consumer):
            consumer.assign([confluent_kafka.TopicPartition(topic, p, 0) for p in range(partitions)])
            got: list[Got] = []
            deadline = time.monotonic() + PATIENCE_S
            while len(got) < count and time.monotonic() < deadline:
                for m in consumer.consume(1000, 0.1):
                    assert m.error() is None, m.error()
                    got.append(
                        Got(
                            m.partition(), m.offset(), m.value(), m.key(), m.timestamp()[1], m.headers() or []
                        )
                    )
            return got


CLIENTS: dict[str, Callable[[str], Client]] = {"kafka-python": KafkaPython, "librdkafka": Librdkafka}


@pytest.fixture(params=CLIENTS)
def producing(request: pytest.FixtureRequest, kafka_bootstrap: str) -> Client:
    return CLIENTS[request.param](kafka_bootstrap)


@pytest.fixture(params=CLIENTS)
def consuming(request: pytest.FixtureRequest, kafka_bootstrap: str) -> Client:
    return CLIENTS[request.param](kafka_bootstrap)


@pytest.fixture
def librdkafka(kafka_bootstrap: str) -> Client:
    return Librdkafka(kafka_bootstrap)


@pytest.fixture
def kafka_python(kafka_bootstrap: str) -> Client:
    return KafkaPython(kafka_bootstrap)


@pytest.fixture(scope="session")
def sent() -> type[Sent]:
    return Sent


@pytest.fixture(scope="session")
def admin(kafka_bootstrap: str) -> Iterator[KafkaAdminClient]:
    with KafkaAdminClient(bootstrap_servers=kafka_bootstrap) as client:
        yield client


@pytest.fixture
def make_topic(admin: KafkaAdminClient) -> Callable[..., str]:
    """`make_topic(partitions=1)`: the name of a new topic that is ready for use."""

    def make(partitions: int = 1) -> str:
        name = f"t-{uuid.uuid4().hex}"
        admin.create_topics({name: {"num_partitions": partitions}}, wait_for_metadata=True)
        return name

    return make


@pytest.fixture
def group() -> str:
    return f"g-{uuid.uuid4().hex}"


class Wire:
    """One connection, one request at a time: what no client library would send."""

    def __init__(self, bootstrap: str) -> None:
        host, port = bootstrap.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def closed(self) -> bool:
        """Whether the broker hangs up."""
        return self._socket.recv(1) == b""

    def ask(self, request: Any, version: int, answer: Any) -> Any:
        """The response to a request, decoded by `answer`'s class."""
        request.API_VERSION = version
        request.with_header(7)
        self.send(request.encode(header=True, framed=True))
        stream = self._socket.makefile("rb")
        (size,) = struct.unpack(">i", stream.read(4))
        return answer.decode(stream.read(size), version=version, header=True)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def wire() -> Iterator[Callable[[str], Wire]]:
    with contextlib.ExitStack() as opened:
        yield lambda bootstrap: opened.enter_context(contextlib.closing(Wire(bootstrap)))


@pytest.fixture(scope="session")
def record_batch() -> Callable[..., bytes]:
    """`record_batch(values, producer_id=-1, epoch=-1, sequence=-1)`: a v2 batch as a producer builds it."""

    def build(values: Sequence[bytes], producer_id: int = -1, epoch: int = -1, sequence: int = -1) -> bytes:
        builder = DefaultRecordBatchBuilder(2, 0, False, producer_id, epoch, sequence, 1 << 20)
        for i, value in enumerate(values):
            builder.append(i, 1_000 + i, None, value, [])
        return bytes(builder.build())

    return build
