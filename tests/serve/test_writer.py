import contextlib
import pathlib
import time
import uuid
from typing import Any

import kafka
import pytest

from grstream.config import Config, parse
from grstream.events import ActionEvent
from grstream.kafka import consumer, create_topic, partition_of
from serve.errors import Refusal, Unavailable
from serve.writer import ActionWriter

pytestmark = pytest.mark.kafka


def config_for(bootstrap: str, timeout_ms: int = 3000) -> Config:
    return parse(
        {
            "storage": "unused",
            "kafka": {"bootstrap_servers": [bootstrap], "topic": f"writer-{uuid.uuid4().hex[:8]}"},
            "events": {"actions": ["click"]},
            "serve": {"request_timeout_ms": timeout_ms},
        }
    )


def event(user: int, item: int | str = 1) -> ActionEvent:
    return ActionEvent(user_id=user, item_id=item, actions=["click"], timestamp_ms=5)


def test_each_event_is_told_where_it_stands_in_the_log(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 3)
    writer = ActionWriter(config)
    users = [1, 2, 3, 1, 2, 3, 1]
    placed = writer.append([event(u) for u in users])
    assert [p.partition for p in placed] == [partition_of(u, 3) for u in users]
    for partition in range(3):
        offsets = [p.offset for p in placed if p.partition == partition]
        assert offsets == list(range(len(offsets))), "one user's events stand in the order given"
    writer.close()


def test_a_tombstone_goes_to_every_partition_and_tells_of_the_users_own(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 3)
    writer = ActionWriter(config)
    writer.append([event(1), event(1)])
    placed = writer.forget(1)
    assert (placed.partition, placed.offset) == (partition_of(1, 3), 2)
    writer.close()
    with contextlib.closing(consumer(config.kafka)) as log:
        partitions = [kafka.TopicPartition(config.kafka.topic, p) for p in range(3)]
        log.assign(partitions)
        log.seek_to_beginning(*partitions)
        found = []
        while len(found) < 5:
            found += [r for records in log.poll(1000).values() for r in records]
    empty = [r for r in found if r.value is None]
    assert sorted(r.partition for r in empty) == [0, 1, 2]
    assert {r.key for r in empty} == {b"1"}


def test_an_event_too_large_for_the_log_is_named(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    writer = ActionWriter(config)
    with pytest.raises(Refusal, match="too_large") as caught:
        writer.append([event(1), event(1, "x" * 2_000_000)])
    assert caught.value.status == 413
    assert caught.value.problem.field == "events.1"
    writer.close()


def test_a_missing_topic_is_named(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    writer = ActionWriter(config)
    with pytest.raises(Unavailable, match=config.kafka.topic):
        writer.append([event(1)])
    writer.close()


def test_a_broker_that_is_away_is_reported_within_the_time_of_a_request_and_used_again_when_back(
    broker_process: Any, tmp_path: pathlib.Path
) -> None:
    with broker_process(tmp_path) as (process, bootstrap):
        config = config_for(bootstrap)
        create_topic(config.kafka, 1)
        writer = ActionWriter(config)
        assert writer.append([event(1)])[0].offset == 0
        process.kill()
        process.wait()
    for lost in (writer, ActionWriter(config)):  # one that was connected, one that never was
        began = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            lost.append([event(2), event(3)])
        assert time.monotonic() - began < 4
        assert caught.value.problem.type == "broker_unavailable"
        assert caught.value.problem.acknowledged == [None, None]
        with pytest.raises(Unavailable) as caught:
            lost.forget(2)
        assert caught.value.problem.type == "broker_unavailable"
    with broker_process(tmp_path, int(bootstrap.rsplit(":", 1)[1])):
        deadline = time.monotonic() + 20
        while True:
            try:
                placed = writer.append([event(4)])
                break
            except Unavailable:
                assert time.monotonic() < deadline
        assert placed[0].offset >= 1
        writer.close()
