"""A replay sends every event once, in order, at its speed, and says what did not arrive."""

import pathlib
import threading
import time
import uuid

import kafka
import pytest
import yaml

from grstream.config import EventsConfig, KafkaConfig
from grstream.events import ActionEvent, EventSchema
from grstream.kafka import BrokerUnavailable, DeliveryFailed, TopicMissing, consumer, create_topic
from grstream.replay import Speed, replay
from jobs.replay import main

SCHEMA = EventSchema(EventsConfig(actions=["click", "like"]))


@pytest.fixture
def config(kafka_bootstrap: str) -> KafkaConfig:
    return KafkaConfig(bootstrap_servers=[kafka_bootstrap], topic=f"actions-{uuid.uuid4().hex}")


def event(i: int, every_ms: int = 1) -> ActionEvent:
    return ActionEvent(event_id=f"e{i}", user_id=1, item_id=i, actions=["click"], timestamp_ms=i * every_ms)


def arrived(config: KafkaConfig, count: int) -> list[ActionEvent]:
    with consumer(config) as reader:
        at = kafka.TopicPartition(config.topic, 0)
        reader.assign([at])
        reader.seek(at, 0)
        records: list = []
        while len(records) < count and (polled := reader.poll(5000)):
            records += polled[at]
        return [SCHEMA.validate(record.value) for record in records]


@pytest.mark.kafka
def test_events_arrive_in_order_as_they_were_sent_and_progress_ends_at_their_number(
    config: KafkaConfig,
) -> None:
    create_topic(config, 1)
    events = [event(i) for i in range(1000)]
    heard: list[int] = []
    assert replay(events, config, Speed(), heard.append) == 1000
    assert arrived(config, 1000) == events
    assert heard == sorted(heard)
    assert heard[-1] == 1000


@pytest.mark.kafka
@pytest.mark.parametrize("speed", [Speed(events_per_s=100), Speed(times=2)])
def test_a_replay_keeps_its_speed(config: KafkaConfig, speed: Speed) -> None:
    create_topic(config, 1)
    began = time.monotonic()
    replay([event(i, every_ms=20) for i in range(51)], config, speed)
    assert time.monotonic() - began >= 0.5


@pytest.mark.kafka
def test_live_events_get_the_clocks_time(config: KafkaConfig) -> None:
    create_topic(config, 1)
    before = time.time_ns() // 1_000_000
    replay([event(i) for i in range(3)], config, Speed(), live=True)
    assert all(before <= e.timestamp_ms <= time.time_ns() // 1_000_000 for e in arrived(config, 3))


@pytest.mark.kafka
def test_a_stopped_replay_has_sent_what_it_says(config: KafkaConfig) -> None:
    create_topic(config, 1)
    stop = threading.Event()
    sent = replay(
        (event(i, every_ms=10) for i in range(10**6)),
        config,
        Speed(times=1),
        lambda sent: stop.set() if sent >= 10 else None,
        stop,
    )
    assert 10 <= sent < 1000
    assert len(arrived(config, sent)) == sent


@pytest.mark.kafka
def test_a_missing_topic_is_told_before_anything_is_sent(config: KafkaConfig) -> None:
    def unread() -> ActionEvent:
        raise AssertionError("an event was asked for")

    with pytest.raises(TopicMissing, match=config.topic):
        replay(iter(unread, None), config, Speed())


def test_a_broker_that_dies_is_a_failed_delivery_with_its_count(
    tmp_path: pathlib.Path, broker_process
) -> None:  # type: ignore[no-untyped-def]
    with broker_process(tmp_path) as (process, bootstrap):
        config = KafkaConfig(bootstrap_servers=[bootstrap], topic="t", request_timeout_ms=500)
        create_topic(config, 1)

        def events() -> object:
            for i in range(200):
                if i == 100:
                    process.kill()
                    process.wait()
                yield event(i)

        with pytest.raises((DeliveryFailed, BrokerUnavailable), match=r"not acknowledged|no Kafka broker"):
            replay(events(), config, Speed(events_per_s=1000))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("500", Speed(events_per_s=500)),
        ("0.5/s", Speed(events_per_s=0.5)),
        ("x60", Speed(times=60)),
        ("max", Speed()),
    ],
)
def test_a_speed_is_events_a_second_or_times_real_time_or_max(text: str, speed: Speed) -> None:
    assert Speed.parse(text) == speed


@pytest.mark.parametrize("text", ["", "fast", "0", "x0", "-5", "5x", "nan"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a speed is events a second"):
        Speed.parse(text)


@pytest.fixture
def settings(config: KafkaConfig, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "config.yaml"
    data = {
        "storage": str(tmp_path),
        "kafka": config.model_dump(),
        "events": {"actions": ["click", "like"]},
        "replay": {"actions": [{"action": "click"}]},
    }
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.kafka
def test_the_job_creates_the_topic_and_replays_a_file_or_the_synthetic_stream(
    config: KafkaConfig, settings: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "u.data"
    data.write_text("1\t2\t3\t100\n1\t3\t3\t50\n")
    assert main(["--config", str(settings), "--data", str(data)]) == 1
    assert "--create-topic" in capsys.readouterr().err
    assert main(["--config", str(settings), "--data", str(data), "--create-topic"]) == 0
    assert "2 events sent and acknowledged" in capsys.readouterr().out
    assert main(["--config", str(settings), "--data", "synthetic", "--limit", "5"]) == 0
    events = arrived(config, 7)
    assert [e.item_id for e in events[:2]] == [3, 2]
    assert all(e.event_id is None for e in events[2:])


def test_the_job_says_what_is_wrong_with_its_arguments(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(tmp_path / "none.yaml"), "--data", "synthetic"]) == 1
    assert "cannot read the configuration" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("{storage: var, events: {actions: [seen]}}")
    assert main(["--config", str(tmp_path / "c.yaml"), "--data", "synthetic"]) == 1
    assert "the synthetic stream needs click, like in events.actions" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--config", "c", "--data", "synthetic", "--speed", "fast"])
    assert "a speed is events a second" in capsys.readouterr().err
