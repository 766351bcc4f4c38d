"""Lists go to the log as impressions that the join can read, and never hold up an answer."""

import contextlib
import pathlib
import time
import uuid
from typing import Any

import kafka
import numpy as np
import pytest
from fastapi.testclient import TestClient

from grstream.columns import exposure_keys
from grstream.config import Config, ConfigError, parse
from grstream.events import EventDecoder, EventSchema
from grstream.kafka import consumer, create_topic, partition_of
from grstream.keys import Namespace, feature_namespace, key_of
from serve import exposure_log
from serve.exposure_log import ExposureLog, Listing
from serve.gateway import create_app
from tests.serve.fake import CONFIG, FakeBackend


def config_for(bootstrap: str, timeout_ms: int = 3000) -> Config:
    topic = f"shown-{uuid.uuid4().hex[:8]}"
    events = CONFIG.events.model_dump() | {"exposures": {}}
    addresses = {"bootstrap_servers": [bootstrap], "topic": topic, "request_timeout_ms": timeout_ms}
    return parse(
        {"storage": "unused", "kafka": addresses, "events": events, "serve": {"exposure_topic": topic}}
    )


def listing(items: int = 3, user: int | str = 7) -> Listing:
    scores = np.arange(items, dtype=np.float32)
    return Listing("abc", "rank", 4, "b", 1000, user, {"place": 9}, [*range(items)], scores)


def test_what_is_answered_is_what_is_logged() -> None:
    logged: list[Listing] = []
    client = TestClient(create_app(CONFIG, FakeBackend(), exposures=logged.append))
    candidates = [20, {"item_id": "x", "item_features": {"genre": "noir"}}]
    body = {"user_id": "eve", "context": {"place": 9}, "ids_as_strings": True}
    ranked = client.post("/v1/rank", json=body | {"candidates": candidates}).json()
    found = client.post("/v1/retrieve", json=body).json()
    best = client.post("/v1/batch/recommend", json={"requests": [body]}).json()["results"][0]["answer"]
    assert [entry.by for entry in logged] == ["rank", "retrieve", "recommend"]
    assert [entry.exposure_id for entry in logged] == [a["exposure_id"] for a in (ranked, found, best)]
    assert len({entry.exposure_id for entry in logged}) == 3
    for entry, answer in zip(logged, (ranked, found, best), strict=True):
        assert [str(i) for i in entry.items] == [r["item_id"] for r in answer["results"]]
        assert (entry.user, entry.version, entry.context) == ("eve", 4, {"place": 9})
    assert logged[0].scores[0] == pytest.approx(sum(ranked["results"][0]["scores"].values()))
    assert logged[0].item_features == [{}, {"genre": "noir"}]
    assert logged[2].scores.tolist() == [r["score"] for r in best["results"]]
    client.post("/v1/rank", json={"user_id": "eve", "candidates": []})
    assert len(logged) == 3, "what is refused was not shown"
    plain = TestClient(create_app(CONFIG, FakeBackend()))
    assert plain.post("/v1/retrieve", json=body).json()["exposure_id"] is None


def test_the_actions_topic_takes_impressions_only_where_they_are_joined() -> None:
    given = {"storage": "x", "events": {"actions": ["a"]}, "serve": {"exposure_topic": "actions"}}
    with pytest.raises(ConfigError, match=r"events\.exposures"):
        parse(given)
    parse(given | {"serve": {"exposure_topic": "shown"}})


@pytest.mark.kafka
def test_a_listing_is_an_impression_an_item_that_readers_decode(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 3)
    log = ExposureLog(config)
    scores = np.array([0.25, 0.75, 0.5], np.float32)
    features = [{}, {"genre": "noir"}, {}]
    log.add(Listing("abc", "rank", 4, "b", 1000, 7, {"place": 9}, [1, "x", 2], scores, features))
    log.close(30)
    assert log.dropped == 0
    records = []
    with contextlib.closing(consumer(config.kafka)) as reader:
        tp = kafka.TopicPartition(config.kafka.topic, partition_of(7, 3))
        reader.assign([tp])
        reader.seek_to_beginning(tp)
        deadline = time.monotonic() + 20
        while len(records) < 3 and time.monotonic() < deadline:
            records += [r for polled in reader.poll(1000).values() for r in polled]
    decoded = EventDecoder(config.events).decode(
        0, [r.offset for r in records], [r.value for r in records], [r.timestamp for r in records]
    )
    assert not decoded.rejected
    batch = decoded.batch
    assert batch.items.tolist() == [key_of(Namespace.ITEM, i) for i in (1, "x", 2)]
    assert set(batch.users.tolist()) == {key_of(Namespace.USER, 7)}
    assert batch.actions.tolist() == [0, 0, 0]
    assert batch.features[:, 0].tolist() == [key_of(feature_namespace("context.place"), 9)] * 3
    assert batch.features[1, 1] == key_of(feature_namespace("item.genre"), "noir")
    expected = exposure_keys(batch.users, ["abc/0", "abc/1", "abc/2"])
    assert batch.exposures is not None
    assert batch.exposures.tolist() == expected.tolist()
    served = [EventSchema(config.events).validate(r.value).served for r in records]
    told: list[Any] = [(s.by, s.version, s.score, s.rank, s.arm) for s in served if s]
    assert told == [("rank", 4, 0.25, 2, "b"), ("rank", 4, 0.75, 0, "b"), ("rank", 4, 0.5, 1, "b")]


def test_what_the_log_does_not_take_is_dropped_and_counted_and_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exposure_log, "HELD", 10)
    log = ExposureLog(config_for("127.0.0.1:9", timeout_ms=300))  # nobody listens there
    began = time.monotonic()
    for _ in range(1000):
        log.add(listing())
    assert time.monotonic() - began < 0.2
    log.close(30)
    assert log.dropped == 3000
    assert "impressions are not in" in caplog.text
    assert sum(r.name == exposure_log.__name__ for r in caplog.records) == 1


@pytest.mark.kafka
def test_a_topic_that_is_not_there_is_named(kafka_bootstrap: str, caplog: pytest.LogCaptureFixture) -> None:
    config = config_for(kafka_bootstrap)
    log = ExposureLog(config)
    log.add(listing())
    log.close(30)
    assert log.dropped == 3
    assert config.kafka.topic in caplog.text


@pytest.mark.kafka
def test_a_broker_that_dies_and_comes_back_is_written_to_again(
    broker_process: Any, tmp_path: pathlib.Path
) -> None:
    with broker_process(tmp_path) as (process, bootstrap):
        config = config_for(bootstrap, timeout_ms=1000)
        create_topic(config.kafka, 1)
        log = ExposureLog(config)
        log.add(listing())
        time.sleep(1)
        process.kill()
        process.wait()
    log.add(listing())
    deadline = time.monotonic() + 20
    while log.dropped < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with broker_process(tmp_path, int(bootstrap.rsplit(":", 1)[1])):
        deadline = time.monotonic() + 20
        with contextlib.closing(consumer(config.kafka)) as reader:
            tp = kafka.TopicPartition(config.kafka.topic, 0)
            reader.assign([tp])
            before = reader.end_offsets([tp])[tp]
            while reader.end_offsets([tp])[tp] == before:
                assert time.monotonic() < deadline
                log.add(listing())
                time.sleep(0.3)
        log.close(30)
