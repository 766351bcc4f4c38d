import asyncio
import concurrent.futures
import contextlib
import logging
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import kafka
import kafka.admin
import numpy as np
import pytest

from grstream.config import Config, parse
from grstream.events import ActionEvent, EventDecoder
from grstream.histories import RollingHistories
from grstream.kafka import create_topic, partition_of, producer
from grstream.keys import Id, Namespace, key_of, partition_key
from grstream.snapshot_files import SnapshotFiles
from grstream.tail import HistoryTail, TailBehind, TailNotReady

pytestmark = pytest.mark.kafka
PATIENCE_S = 30.0


def config_for(bootstrap: str, **histories: Any) -> Config:
    return parse(
        {
            "storage": "unused",
            "kafka": {
                "bootstrap_servers": [bootstrap],
                "topic": f"tail-{uuid.uuid4().hex[:8]}",
                "request_timeout_ms": 1500,
            },
            "events": {"actions": ["click", "like"], "context": ["place"]},
            "histories": histories,
        }
    )


def event(user: Id, item: Id, at: int) -> ActionEvent:
    return ActionEvent(
        user_id=user, item_id=item, actions=["like"], timestamp_ms=at, context={"place": f"p{at % 3}"}
    )


def post(config: Config, events: list[ActionEvent]) -> None:
    with contextlib.closing(producer(config.kafka)) as log:
        for e in events:
            log.send(config.kafka.topic, e.to_json(), key=partition_key(e.user_id))
        log.flush(timeout=10)


def forget(config: Config, user: Id) -> None:
    with contextlib.closing(producer(config.kafka)) as log:
        log.send(config.kafka.topic, None, key=partition_key(user))
        log.flush(timeout=10)


@contextlib.contextmanager
def tailing(config: Config, shard: int = 0, shards: int = 1) -> Iterator[HistoryTail]:
    tail = HistoryTail(config, shard, shards)
    tail.start()
    try:
        yield tail
    finally:
        tail.stop()


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def length(tail: HistoryTail, user: Id, partitions: int) -> int:
    with contextlib.suppress(TailNotReady):
        return len(tail.history(key_of(Namespace.USER, user), partition_of(user, partitions))[0].items)
    return -1


def test_a_tail_holds_what_the_same_histories_folded_from_the_whole_log_hold(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap, window=8, chunk=3, lateness_ms=50)
    create_topic(config.kafka, 3)
    draw = np.random.default_rng(0)
    users: list[Id] = [*range(20), "ann", "bob"]
    events = [
        event(users[u], f"item {i % 7}" if i % 2 else i, 1000 + i + int(draw.integers(-30, 30)))
        for i, u in enumerate(draw.integers(0, len(users), 600))
    ]
    post(config, events[:250])
    with tailing(config, 0, 2) as even, tailing(config, 1, 2) as odd:
        eventually(lambda: even.status().caught_up and odd.status().caught_up)
        for i in range(250, 600, 50):
            forget(config, users[i // 50])
            post(config, events[i : i + 50])
        ends = log_ends(config, 3)
        eventually(lambda: {**even.status().positions, **odd.status().positions} == ends)
        assert even.status().positions.keys() == {0, 2}
        assert odd.status().positions.keys() == {1}
        expected = folded(config, 3)
        for user in users:
            partition, key = partition_of(user, 3), key_of(Namespace.USER, user)
            history, position = (odd if partition % 2 else even).history(key, partition)
            truth = expected[partition].history(key)
            assert position == ends[partition]
            assert len(truth.items) > 0
            for field in ("items", "actions", "times", "features"):
                np.testing.assert_array_equal(getattr(history, field), getattr(truth, field))
            assert (history.epoch, history.item_names) == (truth.epoch, truth.item_names)
        with pytest.raises(LookupError, match="shard 1 of 2"):
            odd.history(key_of(Namespace.USER, 1), 0)


def log_ends(config: Config, partitions: int) -> dict[int, int]:
    with contextlib.closing(kafka.KafkaConsumer(bootstrap_servers=config.kafka.bootstrap_servers)) as log:
        tps = [kafka.TopicPartition(config.kafka.topic, p) for p in range(partitions)]
        return {tp.partition: end for tp, end in log.end_offsets(tps).items()}


def folded(config: Config, partitions: int) -> dict[int, RollingHistories]:
    """Histories of the log as read by another client in batches of other sizes."""
    decoder, out = EventDecoder(config.events), {}
    for partition in range(partitions):
        out[partition] = RollingHistories(config.histories, features=1, partition=partition, track_new=False)
        end = log_ends(config, partitions)[partition]
        log = kafka.KafkaConsumer(bootstrap_servers=config.kafka.bootstrap_servers, max_poll_records=7)
        with contextlib.closing(log):
            tp = kafka.TopicPartition(config.kafka.topic, partition)
            log.assign([tp])
            log.seek(tp, 0)
            while log.position(tp) < end:
                for records in log.poll(timeout_ms=100).values():
                    offsets, times = (
                        np.array([getattr(r, f) for r in records]) for f in ("offset", "timestamp")
                    )
                    values, keys = [r.value for r in records], [r.key for r in records]
                    decoded = decoder.decode(partition, offsets, values, times, keys)
                    out[partition].append(decoded.batch, tombstones=decoded.tombstones)
    return out


def test_an_action_shows_in_a_history_without_waiting_for_others(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    with tailing(config) as tail:
        eventually(lambda: tail.status().caught_up)
        assert length(tail, 1, 1) == 0
        post(config, [event(1, 5, 10)])
        eventually(lambda: length(tail, 1, 1) == 1)
        status = tail.status()
        assert (status.connected, status.positions, status.gaps, status.reason) == (True, {0: 1}, 0, None)
        eventually(lambda: tail.status().lag == 0)


def test_a_forgotten_user_has_no_history_and_what_it_does_later_begins_another(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    post(config, [event(1, 5, 10), event(2, 5, 10), event(1, 6, 11)])
    with tailing(config) as tail:
        eventually(lambda: length(tail, 1, 1) == 2)
        forget(config, 1)
        eventually(lambda: length(tail, 1, 1) == 0)
        assert length(tail, 2, 1) == 1
        post(config, [event(1, 7, 12)])
        eventually(lambda: length(tail, 1, 1) == 1)
        assert tail.history(key_of(Namespace.USER, 1), 0)[0].epoch == 4
        assert tail.status().rejected == 0


def test_a_tail_that_begins_at_a_snapshot_holds_what_one_from_the_start_of_the_log_holds(
    kafka_bootstrap: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = config_for(kafka_bootstrap, window=8, chunk=3).model_copy(update={"storage": tmp_path})
    create_topic(config.kafka, 1)
    post(config, [event(i % 5, i, i) for i in range(60)])
    before, [end] = folded(config, 1)[0], log_ends(config, 1).values()
    SnapshotFiles(config, 0).write(before, end)
    post(config, [event(i % 6, i, i) for i in range(60, 90)])
    with tailing(config) as tail:
        eventually(lambda: tail.status().caught_up)
        truth = folded(config, 1)[0]
        for user in range(6):
            key = key_of(Namespace.USER, user)
            held, _ = tail.history(key, 0)
            np.testing.assert_array_equal(held.items, truth.history(key).items)
            assert held.epoch == truth.history(key).epoch
    assert "histories from 60" in caplog.text


def test_a_partition_that_the_topic_gets_is_followed(
    kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grstream.kafka.METADATA_MS", 300)
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    users: list[Id] = list(range(20))
    post(config, [event(user, 1, 1000) for user in users])
    with tailing(config) as tail:
        eventually(lambda: tail.status().caught_up)
        with kafka.admin.KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap_servers) as admin:
            admin.create_partitions({config.kafka.topic: 3})
        eventually(lambda: tail.status().partitions == 3)
        post(config, [event(user, 2, 2000) for user in users])
        eventually(lambda: tail.status().positions == log_ends(config, 3))
        stayed = [user for user in users if partition_of(user, 3) == 0]
        assert 0 < len(stayed) < len(users)
        for user in users:
            assert length(tail, user, 3) == (2 if user in stayed else 1)


def test_bytes_that_are_no_event_are_counted_and_passed_over(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    with contextlib.closing(producer(config.kafka)) as log:
        for value in (b"\xff\x00poison", b"{}", None, event(1, 2, 3).to_json()):
            log.send(config.kafka.topic, value, key=b"1")
    with tailing(config) as tail:
        eventually(lambda: length(tail, 1, 1) == 1)
        assert tail.status().rejected == 2
        assert tail.status().positions == {0: 4}


def test_a_topic_that_does_not_exist_is_named_and_waited_for(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    with tailing(config) as tail:
        eventually(lambda: config.kafka.topic in (tail.status().reason or ""))
        assert not tail.status().connected
        with pytest.raises(TailNotReady, match=config.kafka.topic):
            tail.history(1, 0)
        create_topic(config.kafka, 1)
        eventually(lambda: tail.status().caught_up)


def test_a_broker_that_goes_away_leaves_histories_readable_and_is_read_on_when_it_is_back(
    broker_process: Any, tmp_path: pathlib.Path
) -> None:
    with broker_process(tmp_path / "log") as (process, bootstrap):
        port = int(bootstrap.rsplit(":", 1)[1])
        config = config_for(bootstrap)
        create_topic(config.kafka, 1)
        post(config, [event(1, i, i) for i in range(3)])
        tail = HistoryTail(config)
        tail.start()
        eventually(lambda: length(tail, 1, 1) == 3)
        process.kill()
        process.wait()
        eventually(lambda: not tail.status().connected)
        assert bootstrap in (tail.status().reason or "")
        assert length(tail, 1, 1) == 3
    with broker_process(tmp_path / "log", port):
        post(config, [event(1, 9, 9)])
        eventually(lambda: length(tail, 1, 1) == 4)
        assert tail.status().connected
        assert tail.status().gaps == 0
        tail.stop()
    assert not tail.is_alive()


def test_a_broker_that_is_down_at_the_start_is_waited_for(
    broker_process: Any, tmp_path: pathlib.Path
) -> None:
    with broker_process(tmp_path / "log") as (_, bootstrap):
        config = config_for(bootstrap)
        create_topic(config.kafka, 1)
    port = int(bootstrap.rsplit(":", 1)[1])
    with tailing(config) as tail:
        eventually(lambda: "grstream broker" in (tail.status().reason or ""))
        assert tail.status().partitions is None
        with broker_process(tmp_path / "log", port):
            eventually(lambda: tail.status().caught_up)


def test_a_log_that_is_not_the_one_it_was_is_said_so_and_read_anew(
    broker_process: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with broker_process(tmp_path / "one") as (_, bootstrap):
        config = config_for(bootstrap)
        create_topic(config.kafka, 1)
        post(config, [event(1, i, i) for i in range(5)])
        tail = HistoryTail(config)
        tail.start()
        eventually(lambda: length(tail, 1, 1) == 5)
    with caplog.at_level(logging.ERROR), broker_process(tmp_path / "two", int(bootstrap.rsplit(":", 1)[1])):
        # The tail's client may have had the topic created before, with as many as the broker gives unasked.
        count = create_topic(config.kafka, 1)
        post(config, [event(1, 7, 7)])
        eventually(lambda: tail.status().partitions == count and length(tail, 1, count) == 1)
        assert tail.status().gaps in (4, 5)  # the new log may have been looked at before its first event
        tail.stop()
    assert "another log" in caplog.text


def test_what_was_posted_is_waited_for_and_too_far_an_offset_is_not_for_ever(kafka_bootstrap: str) -> None:
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    user = key_of(Namespace.USER, 1)
    with tailing(config) as tail:
        eventually(lambda: tail.status().caught_up)

        async def many() -> list[int]:
            waits = [tail.history_soon(user, 0, i % 3, PATIENCE_S) for i in range(300)]
            asked = asyncio.gather(*waits)
            await asyncio.sleep(0)  # all wait now, none in a thread
            assert threading.active_count() < 50
            await asyncio.to_thread(post, config, [event(1, i, i) for i in range(3)])
            return [len(history.items) - i % 3 for i, (history, _) in enumerate(await asked)]

        assert min(asyncio.run(many())) >= 1
        assert len(tail.history(user, 0, 2)[0].items) == 3
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(tail.history, user, 0, 3, PATIENCE_S)
            post(config, [event(2, 1, 1)])
            assert waiting.result()[1] == 4
        for offset in (4, 2**62):
            with pytest.raises(TailBehind, match="next to be read is 4"):
                tail.history(user, 0, offset)
            with pytest.raises(TailBehind):
                asyncio.run(tail.history_soon(user, 0, offset, 0.01))
        assert len(tail._waiters) == 0
        with pytest.raises(LookupError, match="is not one of"):
            tail.history(user, 1, 0)
        eventually(lambda: tail.status().lags == {0: 0})
        assert 0 <= tail.status().ages_ms[0] < 60_000


def test_a_read_tells_how_old_its_oldest_record_was_but_not_before_it_has_caught_up(
    kafka_bootstrap: str,
) -> None:
    told: list[float] = []
    config = config_for(kafka_bootstrap)
    create_topic(config.kafka, 1)
    post(config, [event("u", 1, 1)])
    time.sleep(1)
    tail = HistoryTail(config, visible=told.append)
    tail.start()
    try:
        eventually(lambda: tail.status().caught_up)
        assert told == [], "what was there before was sent before"
        post(config, [event("u", 2, 2)])
        eventually(lambda: len(told) == 1)
        assert 0 <= told[0] < PATIENCE_S
    finally:
        tail.stop()
