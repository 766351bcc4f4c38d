"""Against Apache Kafka with TLS and SASL: every mechanism works, and what is wrong is told at once."""

import contextlib
import logging
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import kafka
import pytest

from grstream.config import KAFKA_PASSWORD_VARIABLE, Config, KafkaConfig, parse
from grstream.events import ActionEvent
from grstream.kafka import (
    AuthenticationFailed,
    consumer,
    create_topic,
    partition_count,
    producer,
    reaching,
)
from grstream.keys import Namespace, key_of, partition_key
from grstream.ledger import Disposition, Ledger
from grstream.microbatch import MicroBatch
from grstream.reader import LogReader
from grstream.replay import Speed, replay
from grstream.tail import HistoryTail
from tests.security.certificates import Authority
from tests.security.secured_kafka import PASSWORD, REAUTHENTICATE_MS, SecuredKafka
from tests.security.token_endpoint import EXPIRED

pytestmark = pytest.mark.kafka
AT_ONCE_S = 10.0  # half of the time-out that these clients have
PATIENCE_S = 60.0

WAYS: dict[str, Callable[[SecuredKafka], KafkaConfig]] = {
    "PLAIN": lambda secured: secured.config(mechanism="PLAIN"),
    "SCRAM-SHA-256": lambda secured: secured.config(mechanism="SCRAM-SHA-256"),
    "SCRAM-SHA-512": lambda secured: secured.config(),
    "SCRAM without TLS": lambda secured: secured.config("SASL_PLAINTEXT"),
    "OAUTHBEARER": lambda secured: secured.oauth(),
    "a certificate": lambda secured: secured.config(
        "MUTUAL", cert_file=secured.client.cert_file, key_file=secured.client.key_file
    ),
    "an unchecked host": lambda secured: secured.config("ELSEWHERE", check_hostname=False),
}
WRONG: dict[str, tuple[Callable[[SecuredKafka, pathlib.Path], KafkaConfig], str]] = {
    "PLAIN": (
        lambda secured, wrong: secured.config(mechanism="PLAIN", password_file=wrong),
        r"PLAIN as 'grstream' was refused; check kafka\.security\.username and the password in \S+/wrong",
    ),
    "SCRAM-SHA-256": (
        lambda secured, wrong: secured.config(mechanism="SCRAM-SHA-256", password_file=wrong),
        "SCRAM-SHA-256 as 'grstream' was refused",
    ),
    "SCRAM-SHA-512": (
        lambda secured, wrong: secured.config(password_file=wrong),
        "SCRAM-SHA-512 as 'grstream' was refused",
    ),
    "a user that is not there": (
        lambda secured, wrong: secured.config(username="nobody"),
        "as 'nobody' was refused",
    ),
    "a mechanism that is off": (
        lambda secured, wrong: secured.config("ROTATING", mechanism="PLAIN"),
        r"PLAIN is not spoken there; check kafka\.security\.mechanism",
    ),
    "an authority that did not sign": (
        lambda secured, wrong: secured.config(ca_file=secured.strangers.ca_file),
        r"not trusted; check kafka\.security\.ca_file",
    ),
    "the system's authorities": (
        lambda secured, wrong: secured.config(ca_file=None),
        r"not trusted; check kafka\.security\.ca_file",
    ),
    "another host": (
        lambda secured, wrong: secured.config("ELSEWHERE"),
        r"another host's; check kafka\.bootstrap_servers.*not valid for '127\.0\.0\.1'",
    ),
    "no client certificate": (
        lambda secured, wrong: secured.config("MUTUAL"),
        r"ended the TLS handshake; check kafka\.security\.cert_file",
    ),
    "an expired token": (
        lambda secured, wrong: secured.oauth(scope=EXPIRED),
        r"OAUTHBEARER with a token of client 'grstream' was refused.*invalid_token",
    ),
    "a wrong client secret": (
        lambda secured, wrong: secured.oauth(client_secret_file=wrong),
        r"gave client 'grstream' no token: HTTP 401 \(invalid_client\)",
    ),
}

TOO = (producer, partition_count)  # fail alike


@pytest.fixture
def wrong(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file with a secret that is none."""
    path = tmp_path / "wrong"
    path.write_text("hunter2")
    return path


@pytest.mark.parametrize("way", WAYS)
def test_what_is_produced_is_consumed(way: str, secured: SecuredKafka) -> None:
    config = WAYS[way](secured).model_copy(update={"topic": f"way-{uuid.uuid4().hex[:8]}"})
    assert create_topic(config, 2) == 2
    with contextlib.closing(producer(config)) as sender:
        sent = sender.send(config.topic, way.encode(), partition=1).get(timeout=PATIENCE_S)
    at = kafka.TopicPartition(config.topic, 1)
    with contextlib.closing(consumer(config)) as reader:
        reader.assign([at])
        reader.seek(at, sent.offset)
        deadline = time.monotonic() + PATIENCE_S
        while not (read := reader.poll(100).get(at, [])) and time.monotonic() < deadline:
            pass
    assert [record.value for record in read] == [way.encode()]


@pytest.mark.parametrize(
    ("what", "client"),
    [(what, consumer) for what in WRONG]
    + [
        (what, client) for what in ("SCRAM-SHA-512", "another host") for client in (producer, partition_count)
    ],
)
def test_what_is_wrong_is_told_at_once(
    what: str, client: Callable, secured: SecuredKafka, wrong: pathlib.Path
) -> None:
    make, told = WRONG[what]
    began = time.monotonic()
    with pytest.raises(AuthenticationFailed, match=told) as failed:
        client(make(secured, wrong))
    assert time.monotonic() - began < AT_ONCE_S
    assert "hunter2" not in str(failed.value)
    assert PASSWORD not in str(failed.value)


def test_a_broker_that_does_not_know_who_signed_the_clients_certificate_is_named(
    secured: SecuredKafka, tmp_path: pathlib.Path
) -> None:
    stranger = Authority(tmp_path).sign("stranger", ["stranger"])
    config = secured.config("MUTUAL", cert_file=stranger.cert_file, key_file=stranger.key_file)
    with pytest.raises(AuthenticationFailed, match=r"ended the TLS handshake.*an authority that they know"):
        consumer(config)


def test_a_broker_that_is_advertised_at_another_host_is_named_when_it_is_gone_to(
    secured: SecuredKafka,
) -> None:
    config = secured.config("ELSEWHERE")
    port = config.bootstrap_servers[0].rpartition(":")[2]
    config = config.model_copy(update={"bootstrap_servers": [f"localhost:{port}"]})
    began = time.monotonic()
    with pytest.raises(AuthenticationFailed, match="another host's"):
        partition_count(config)
    with contextlib.closing(consumer(config)) as reader:
        at = kafka.TopicPartition("any", 0)
        reader.assign([at])
        with pytest.raises(AuthenticationFailed, match="another host's"), reaching(config):
            reader.end_offsets([at], timeout_ms=20_000)
    assert time.monotonic() - began < 2 * AT_ONCE_S


def test_a_password_may_come_from_the_environment(
    secured: SecuredKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KAFKA_PASSWORD_VARIABLE, PASSWORD)
    with contextlib.closing(consumer(secured.config(password_file=None))):
        pass


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-512", "OAUTHBEARER"])
def test_no_log_has_a_secret_even_where_all_is_logged(
    way: str, secured: SecuredKafka, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = WAYS[way](secured)
    create_topic(config, 1)
    with contextlib.closing(producer(config)), contextlib.closing(consumer(config)) as reader:
        shown = repr(vars(reader)) + repr(reader.config)
    for text in (caplog.text, shown, repr(config), config.model_dump_json()):
        assert PASSWORD not in text
        assert secured.secret_file.read_text() not in text
        assert "Bearer" not in text
    assert "SaslAuthenticate" in caplog.text, "nothing was logged that could have had one"


def test_a_replayed_data_set_reaches_micro_batches_and_a_shards_histories(
    secured: SecuredKafka, tmp_path: pathlib.Path
) -> None:
    config = system(secured, tmp_path, "SASL_SSL")
    create_topic(config.kafka, 2)
    events = [
        ActionEvent(user_id=i % 5, item_id=i, actions=["click"], timestamp_ms=1_700_000_000_000 + i)
        for i in range(40)
    ]
    assert replay(events, config.kafka, Speed()) == 40
    with contextlib.closing(producer(config.kafka)) as sender:
        sender.send(config.kafka.topic, b"poison", key=b"x").get(timeout=PATIENCE_S)
    tail = HistoryTail(config)
    tail.start()
    try:
        ledger = settled(config, 41)
        assert ledger.count(Disposition.TRAINED) == 40
        assert ledger.count(Disposition.DEAD_LETTER) == 1
        eventually(lambda: tail.status().caught_up)
        held = [
            len(history.items)
            for user in range(5)
            for partition in range(2)
            for history, _ in [tail.history(key_of(Namespace.USER, user), partition)]
        ]
        assert sum(held) == 40
    finally:
        tail.stop()


def test_a_running_reader_shard_and_producer_go_on_with_a_password_that_was_changed(
    secured: SecuredKafka, tmp_path: pathlib.Path
) -> None:
    password_file = tmp_path / "password"
    password_file.write_text(PASSWORD)
    config = system(secured, tmp_path, "ROTATING", password_file=password_file)
    create_topic(config.kafka, 1)
    tail = HistoryTail(config)
    tail.start()
    try:
        with reading(config) as batches, contextlib.closing(producer(config.kafka)) as lasting:
            send(config, 3, lasting)
            eventually(lambda: events_in(batches) == 3)
            secured.set_password("another one")
            # The broker asks again, is told the old password, refuses it and drops the connections.
            time.sleep(REAUTHENTICATE_MS / 1000)
            with pytest.raises(AuthenticationFailed):
                consumer(config.kafka)
            password_file.write_text("another one")
            send(config, 4)
            eventually(lambda: events_in(batches) == 7)
            eventually(lambda: tail.status().positions == {0: 7})
            time.sleep(1.5 * REAUTHENTICATE_MS / 1000)  # and goes on to
            send(config, 1, lasting)
            eventually(lambda: events_in(batches) == 8)
            eventually(lambda: tail.status().positions == {0: 8})
    finally:
        tail.stop()
        secured.set_password(PASSWORD)


def test_a_client_authenticates_anew_with_the_next_token(secured: SecuredKafka) -> None:
    config = secured.oauth(scope="renewed")
    create_topic(config, 1)
    asked = len(secured.endpoint.asked)
    secured.endpoint.life_s = 4
    try:
        with contextlib.closing(producer(config)) as sender, reaching(config):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                sender.send(config.topic, b"x", partition=0).get(timeout=PATIENCE_S)
                time.sleep(0.2)
    finally:
        secured.endpoint.life_s = 300
    assert 3 <= len(secured.endpoint.asked) - asked <= 6, "a token is used for most of its life"


# -- a system, read in a thread ---------------------------------------------------------------------------


def system(secured: SecuredKafka, storage: pathlib.Path, listener: str, **security: object) -> Config:
    client = secured.config(listener, f"actions-{uuid.uuid4().hex[:8]}", **security)
    return parse(
        {
            "storage": str(storage),
            "kafka": client.model_dump(),
            "events": {"actions": ["click"]},
            "source": {"flush_ms": 100},
        }
    )


def send(config: Config, count: int, sender: kafka.KafkaProducer | None = None) -> None:
    """By a producer that is there already, or by one of its own."""
    event = ActionEvent(user_id=1, item_id=2, actions=["click"], timestamp_ms=1_700_000_000_000)
    with contextlib.ExitStack() as own:
        sender = sender or own.enter_context(contextlib.closing(producer(config.kafka)))
        sent = [sender.send(config.kafka.topic, event.to_json(), key=partition_key(1)) for _ in range(count)]
        for future in sent:
            future.get(timeout=PATIENCE_S)


@contextlib.contextmanager
def reading(config: Config) -> Iterator[list[MicroBatch]]:
    """The micro-batches of a reader, which is ended on leaving."""
    batches: list[MicroBatch] = []
    done = threading.Event()

    def read() -> None:
        for batch in LogReader(config, 0, Ledger(), None).batches():
            batches.append(batch)
            if done.is_set():
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield batches
    finally:
        done.set()
        send(config, 1)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def settled(config: Config, count: int) -> Ledger:
    ledger = Ledger()
    for batch in LogReader(config, 0, Ledger(), None).batches():
        for part in batch.ranges:
            ledger.add(part)
        if sum(ledger.count(disposition) for disposition in Disposition) >= count:
            break
    return ledger


def events_in(batches: list[MicroBatch]) -> int:
    return sum(batch.new_events for batch in batches)


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)
