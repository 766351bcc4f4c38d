import contextlib
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import kafka.admin
import pytest

from grstream.catalogue import Catalogue, ItemRecord
from grstream.catalogue_tail import CatalogueTail
from grstream.config import Config, parse
from grstream.kafka import create_topic, producer
from grstream.keys import Id, Namespace, key_of
from tests.grstream.test_tail import eventually

pytestmark = pytest.mark.kafka


def config_for(bootstrap: str) -> Config:
    return parse(
        {
            "storage": "unused",
            "kafka": {
                "bootstrap_servers": [bootstrap],
                "items_topic": f"items-{uuid.uuid4().hex[:8]}",
                "request_timeout_ms": 1500,
            },
            "events": {"actions": ["click"], "item_features": ["category"]},
        }
    )


def say(config: Config, said: dict[Id, bytes | None]) -> None:
    with contextlib.closing(producer(config.kafka)) as log:
        for item, value in said.items():
            log.send(config.kafka.items_topic, value, key=str(item).encode())
        log.flush(timeout=10)


def announced(item: Id, available: bool = True) -> bytes:
    return ItemRecord(item_id=item, available=available, item_features={"category": 1}).to_json()


@contextlib.contextmanager
def tailing(config: Config) -> Iterator[tuple[CatalogueTail, list[Catalogue]]]:
    given: list[Catalogue] = []
    tail = CatalogueTail.of(config, given.append)
    assert tail is not None
    tail.start()
    try:
        yield tail, given
    finally:
        tail.stop()


def available(given: list[Catalogue]) -> set[int]:
    return set(given[-1].keys[given[-1].available].tolist()) if given else set()


def keys(*items: Id) -> set[int]:
    return {key_of(Namespace.ITEM, item) for item in items}


def test_items_come_and_go_and_come_back(kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grstream.kafka.METADATA_MS", 300)
    config = config_for(kafka_bootstrap)
    topic = config.kafka.items_topic
    create_topic(config.kafka, 2, topic)
    say(config, {i: announced(i) for i in (1, 2, "ann", 4)} | {9: b"{", "x": announced("y")})
    with tailing(config) as (tail, given):
        eventually(lambda: tail.status().caught_up and bool(given))
        assert available(given[:1]) == keys(1, 2, "ann", 4)  # none is given before all is read
        assert (tail.status().rejected, tail.status().lag, tail.status().reason) == (2, 0, None)
        say(config, {1: None, 2: announced(2, False)})
        eventually(lambda: available(given) == keys("ann", 4))
        say(config, {1: announced(1)})
        eventually(lambda: available(given) == keys(1, "ann", 4))
        with kafka.admin.KafkaAdminClient(bootstrap_servers=[kafka_bootstrap]) as admin:
            admin.create_partitions({topic: 5})
        eventually(lambda: len(tail.status().positions) == 5)
        say(config, {i: announced(i) for i in range(10, 30)} | {4: None})
        eventually(lambda: available(given) == keys(1, "ann", *range(10, 30)))
        revisions = [catalogue.revision for catalogue in given]
        assert revisions == sorted(set(revisions))
        assert given[-1].names[key_of(Namespace.ITEM, "ann")] == "ann"


def test_a_broker_that_goes_away_is_read_on_when_it_is_back_and_another_log_is_read_anew(
    broker_process: Any, tmp_path: pathlib.Path
) -> None:
    with broker_process(tmp_path / "one") as (_, bootstrap):
        port = int(bootstrap.rsplit(":", 1)[1])
        config = config_for(bootstrap)
        create_topic(config.kafka, 1, config.kafka.items_topic)
        say(config, {i: announced(i) for i in (1, 2)})
        tail_context = tailing(config)
        tail, given = tail_context.__enter__()
        eventually(lambda: available(given) == keys(1, 2))
    try:
        eventually(lambda: not tail.status().connected)
        assert bootstrap in (tail.status().reason or "")
        with broker_process(tmp_path / "one", port):
            say(config, {3: announced(3)})
            eventually(lambda: available(given) == keys(1, 2, 3))
        with broker_process(tmp_path / "two", port):
            create_topic(config.kafka, 1, config.kafka.items_topic)
            say(config, {7: announced(7)})
            eventually(lambda: available(given) == keys(7))
            assert given[-1].revision > given[-2].revision
    finally:
        tail_context.__exit__(None, None, None)


def test_without_a_topic_of_items_there_is_no_tail(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    config = config.model_copy(update={"kafka": config.kafka.model_copy(update={"items_topic": None})})
    assert CatalogueTail.of(config, lambda _: None) is None
