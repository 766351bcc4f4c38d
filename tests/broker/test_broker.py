"""What the development broker promises beyond the conformance suite: kills, restarts, and whom it refuses."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import confluent_kafka
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import InvalidConfigurationError, KafkaError
from kafka.protocol.consumer import (
    HeartbeatRequest,
    HeartbeatResponse,
    JoinGroupRequest,
    JoinGroupResponse,
)
from kafka.protocol.metadata import ApiVersionsRequest, ApiVersionsResponse
from kafka.structs import OffsetAndMetadata

from grstream.broker import Broker, BrokerError, CorruptLog, DirectoryInUse, NotABrokerDirectory, NotLoopback


@contextlib.contextmanager
def _serving(directory: pathlib.Path) -> Iterator[Broker]:
    broker = Broker(directory, port=0)
    thread = threading.Thread(target=broker.serve_forever)
    thread.start()
    try:
        yield broker
    finally:
        broker.stop()
        thread.join()


class Numbers:
    """An idempotent producer of 0, 1, 2, … to one partition, in a thread and without pause until `finish`."""

    IN_FLIGHT = 3000

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.failed: list[object] = []
        self.sent = 0
        self.acknowledged = 0
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._send, args=(bootstrap, topic))
        self._thread.start()

    def finish(self) -> None:
        """Stop sending and wait until all is answered."""
        self._finish.set()
        self._thread.join()

    def _send(self, bootstrap: str, topic: str) -> None:
        raise NotImplementedError

    def _numbers(self) -> Iterator[bytes]:
        while not self._finish.is_set():
            if self.sent - self.acknowledged < self.IN_FLIGHT:
                yield b"%d" % self.sent
                self.sent += 1
            else:
                yield b""


class KafkaPythonNumbers(Numbers):
    def _send(self, bootstrap: str, topic: str) -> None:
        with KafkaProducer(
            bootstrap_servers=bootstrap,
            reconnect_backoff_ms=20,
            reconnect_backoff_max_ms=100,
            retry_backoff_ms=20,
        ) as producer:
            for number in self._numbers():
                if number:
                    future = producer.send(topic, number, partition=0)
                    future.add_callback(self._done)
                    future.add_errback(self.failed.append)
                else:
                    time.sleep(0.001)
            producer.flush(60)

    def _done(self, _: object) -> None:
        self.acknowledged += 1


class LibrdkafkaNumbers(Numbers):
    def _send(self, bootstrap: str, topic: str) -> None:
        producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "linger.ms": 1,
                "reconnect.backoff.ms": 20,
                "reconnect.backoff.max.ms": 100,
                "log_level": 0,
            }
        )
        for number in self._numbers():
            if number:
                producer.produce(topic, number, partition=0, on_delivery=self._delivered)
            producer.poll(0 if number else 0.001)
        producer.flush(60)

    def _delivered(self, error: object, _: object) -> None:
        if error is None:
            self.acknowledged += 1
        else:
            self.failed.append(error)


@pytest.mark.parametrize("numbers", [KafkaPythonNumbers, LibrdkafkaNumbers])
def test_kills_in_the_middle_of_producing_lose_and_repeat_nothing(numbers, broker_process, tmp_path):
    with contextlib.ExitStack() as at_end:
        process, bootstrap = at_end.enter_context(broker_process(tmp_path))
        port = int(bootstrap.rsplit(":", 1)[1])
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.create_topics({"numbers": {"num_partitions": 1}}, wait_for_metadata=True)
        producer = numbers(bootstrap, "numbers")
        at_end.callback(producer.finish)
        for kill in range(3):
            before = producer.acknowledged
            _eventually(lambda goal=before + 1000 * (kill + 1): producer.acknowledged >= goal)
            process.kill()
            process.wait()
            process, _ = at_end.enter_context(broker_process(tmp_path, port))
        producer.finish()
        assert not producer.failed
        assert producer.acknowledged == producer.sent
        assert _read(bootstrap, "numbers") == [b"%d" % i for i in range(producer.sent)]


def test_what_was_acknowledged_and_committed_survives_a_kill(broker_process, tmp_path):
    tp = TopicPartition("t", 0)
    with broker_process(tmp_path) as (process, bootstrap):
        _send(bootstrap, [b"v"])
        _commit(bootstrap, 1)
        process.kill()
    with broker_process(tmp_path) as (_, bootstrap):
        assert _read(bootstrap, "t") == [b"v"]
        with KafkaConsumer(bootstrap_servers=bootstrap, group_id="g") as consumer:
            assert consumer.committed(tp) == 1


def test_a_half_written_commit_is_forgotten_and_the_others_stay(tmp_path):
    with _serving(tmp_path) as broker:
        _commit(broker.bootstrap, 41)
    with (tmp_path / "offsets.jsonl").open("a") as file:
        file.write('["g", "t", 0, 4')
    with (
        _serving(tmp_path) as broker,
        KafkaConsumer(bootstrap_servers=broker.bootstrap, group_id="g") as consumer,
    ):
        assert consumer.committed(TopicPartition("t", 0)) == 41
        _commit(broker.bootstrap, 43)
    lines = (tmp_path / "offsets.jsonl").read_text().splitlines()
    assert [json.loads(line)[3] for line in lines] == [41, 43]


def test_a_second_broker_on_a_directory_is_refused_and_told_by_whom(broker_process, tmp_path):
    with broker_process(tmp_path) as (process, bootstrap):
        with pytest.raises(DirectoryInUse, match=f"pid {process.pid}"):
            Broker(tmp_path, port=0)
        second = _command("--dir", str(tmp_path), "--port", "0")
        assert second.returncode == 1
        assert f"pid {process.pid}" in second.stderr
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            assert admin.list_topics() == []


def test_a_directory_of_something_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(NotABrokerDirectory, match=r"thesis\.tex"):
        Broker(tmp_path, port=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_of_another_format_is_refused(tmp_path):
    Broker(tmp_path, port=0).close()
    (tmp_path / "broker.json").write_text('{"format": 2, "cluster_id": "x"}')
    with pytest.raises(NotABrokerDirectory, match="format 2"):
        Broker(tmp_path, port=0)
    (tmp_path / "broker.json").write_text("[]")
    with pytest.raises(NotABrokerDirectory):
        Broker(tmp_path, port=0)


def test_a_refused_directory_is_unlocked_again(tmp_path):
    with _serving(tmp_path) as broker:
        _send(broker.bootstrap, [b"a", b"b"])
    log = tmp_path / "topics" / "t" / "0.log"
    sound = log.read_bytes()
    log.write_bytes(sound[:20] + b"\xff" + sound[21:])
    with pytest.raises(CorruptLog):
        Broker(tmp_path, port=0)
    log.write_bytes(sound)
    with _serving(tmp_path) as broker:
        assert _read(broker.bootstrap, "t") == [b"a", b"b"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", ""])
def test_an_address_that_others_could_reach_is_refused(host, tmp_path):
    with pytest.raises(NotLoopback, match="loopback"):
        Broker(tmp_path / "d", port=0, host=host)
    assert not (tmp_path / "d").exists()


def test_a_port_that_is_taken_is_an_error_that_says_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port}"):
            Broker(tmp_path, port=port)
        assert _command("--dir", str(tmp_path), "--port", str(port)).returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_under_a_waiting_fetch(number, broker_process, tmp_path):
    with broker_process(tmp_path) as (process, bootstrap):
        _send(bootstrap, [b"v"])
        with KafkaConsumer(
            bootstrap_servers=bootstrap, auto_offset_reset="earliest", fetch_max_wait_ms=20_000
        ) as consumer:
            consumer.assign([TopicPartition("t", 0)])
            assert next(consumer).value == b"v"
            consumer.poll(200)
            process.send_signal(number)
            assert process.wait(5) == 0


def test_a_topic_is_whole_or_absent_after_a_kill(tmp_path):
    with _serving(tmp_path) as broker:
        _send(broker.bootstrap, [b"v"])
    (tmp_path / "topics" / "~being-made").mkdir()
    (tmp_path / "topics" / "~being-made" / "0.log").touch()
    with _serving(tmp_path) as broker, KafkaAdminClient(bootstrap_servers=broker.bootstrap) as admin:
        assert admin.list_topics() == ["t"]
    assert [p.name for p in (tmp_path / "topics").iterdir()] == ["t"]


def test_a_kill_within_a_deletion_leaves_no_commits_to_a_topic_of_the_same_name(tmp_path):
    with _serving(tmp_path) as broker:
        _commit(broker.bootstrap, 41)
    (tmp_path / "topics" / "t").rename(tmp_path / "topics" / "~being-deleted")
    for _ in range(2):
        with (
            _serving(tmp_path) as broker,
            KafkaConsumer(bootstrap_servers=broker.bootstrap, group_id="g") as consumer,
        ):
            _send(broker.bootstrap, [b"v"])
            assert consumer.committed(TopicPartition("t", 0)) is None


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a request of 1195725856 bytes"),
        (b"\xff\xff\xff\xff", "a request of -1 bytes"),
        (b"\x00\x00\x00\x0a\x00\x63\x00\x00\x00\x00\x00\x01\xff\xff", "API 99"),
        (b"\x00\x00\x00\x0a\x00\x00\x00\x02\x00\x00\x00\x01\xff\xff", "ProduceRequest version 2"),
        (
            b"\x00\x00\x00\x0a\x00\x01\x00\x04\x00\x00\x00\x01\xff\xff",
            "FetchRequest version 4 does not parse",
        ),
    ],
)
def test_what_is_no_request_closes_the_connection_with_a_line_in_the_log(frame, why, wire, tmp_path, caplog):
    with _serving(tmp_path) as broker:
        connection = wire(broker.bootstrap)
        connection.send(frame)
        assert connection.closed()
    assert why in caplog.text


def test_a_client_of_the_future_is_told_the_versions_in_the_oldest_form(wire, tmp_path):
    with _serving(tmp_path) as broker:
        request = ApiVersionsRequest(client_software_name="x", client_software_version="1")
        answer = wire(broker.bootstrap).ask(request, 4, ApiVersionsResponse)
    assert answer.error_code == 35
    assert {key.api_key: (key.min_version, key.max_version) for key in answer.api_keys}[1] == (4, 11)


def test_a_member_that_sends_no_heartbeat_is_put_out(wire, tmp_path):
    with _serving(tmp_path) as broker:
        connection = wire(broker.bootstrap)
        protocol = JoinGroupRequest.JoinGroupRequestProtocol(name="range", metadata=b"")
        joined = connection.ask(
            JoinGroupRequest(
                group_id="g",
                session_timeout_ms=500,
                rebalance_timeout_ms=500,
                member_id="",
                protocol_type="consumer",
                protocols=[protocol],
            ),
            3,
            JoinGroupResponse,
        )

        def heartbeat() -> int:
            request = HeartbeatRequest(
                group_id="g", generation_id=joined.generation_id, member_id=joined.member_id
            )
            code: int = connection.ask(request, 2, HeartbeatResponse).error_code
            return code

        for _ in range(4):
            time.sleep(0.2)
            assert heartbeat() == 0
        time.sleep(0.8)
        unknown_member = 25
        assert heartbeat() == unknown_member


def test_what_topics_do_not_do_cannot_be_configured(tmp_path):
    with _serving(tmp_path) as broker, KafkaAdminClient(bootstrap_servers=broker.bootstrap) as admin:
        with pytest.raises(InvalidConfigurationError):
            admin.create_topics({"t": {"num_partitions": 1, "configs": {"retention.ms": "1000"}}})
        admin.create_topics({"t": {"configs": {"cleanup.policy": "delete"}}})
        assert len(admin.describe_topics(["t"])[0]["partitions"]) == 4


def test_transactions_are_refused(tmp_path):
    with _serving(tmp_path) as broker:
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id="x", max_block_ms=3000)
        with contextlib.closing(producer), pytest.raises(KafkaError):
            producer.init_transactions()


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grstream.cli", "broker", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )


def _send(bootstrap: str, values: list[bytes]) -> None:
    with KafkaProducer(bootstrap_servers=bootstrap) as producer:
        for value in values:
            producer.send("t", value, partition=0).get(20)


def _commit(bootstrap: str, offset: int) -> None:
    with KafkaAdminClient(bootstrap_servers=bootstrap) as admin, contextlib.suppress(KafkaError):
        admin.create_topics({"t": {"num_partitions": 1}})
    tp = TopicPartition("t", 0)
    with KafkaConsumer(bootstrap_servers=bootstrap, group_id="g") as consumer:
        consumer.assign([tp])
        consumer.commit({tp: OffsetAndMetadata(offset, "", -1)})


def _read(bootstrap: str, topic: str) -> list[bytes]:
    """The values of partition 0."""
    tp = TopicPartition(topic, 0)
    with KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest") as consumer:
        consumer.assign([tp])
        end = consumer.end_offsets([tp])[tp]
        got: list[bytes] = []
        while consumer.position(tp) < end:
            got += [r.value for records in consumer.poll(100).values() for r in records]
    return got


def _eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)
