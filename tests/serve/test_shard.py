"""A history shard: its own partitions alone, no further than it has read, and healthy while it reads."""

import asyncio
import contextlib
import pathlib
import uuid

import pytest

from grstream.config import Config, parse
from grstream.events import ActionEvent
from grstream.kafka import create_topic, partition_of, producer
from grstream.keys import Namespace, key_of, partition_key
from grstream.schema import Schema
from grstream.tail import TailBehind
from serve.shard import HistoryShard

pytestmark = pytest.mark.kafka
SCHEMA = Schema(("click",), ())
USERS = range(12)


def configured(storage: pathlib.Path, bootstrap: str) -> Config:
    return parse(
        {
            "storage": str(storage),
            "kafka": {"bootstrap_servers": [bootstrap], "topic": f"shard-{uuid.uuid4().hex[:8]}"},
            "events": {"actions": ["click"]},
            "serve": {"history_shards": 2},
        }
    )


def post(config: Config, users: range, item: int) -> None:
    with contextlib.closing(producer(config.kafka)) as log:
        for user in users:
            event = ActionEvent(user_id=user, item_id=item, actions=["click"], timestamp_ms=1000 + item)
            log.send(config.kafka.topic, event.to_json(), key=partition_key(user))
        log.flush(timeout=10)


def test_two_shards_hold_each_users_history_once_and_wait_for_what_is_not_read_yet(
    tmp_path: pathlib.Path, kafka_bootstrap: str
) -> None:
    config = configured(tmp_path, kafka_bootstrap)
    create_topic(config.kafka, 3)
    post(config, USERS, 1)

    async def scenario() -> None:
        shards = [HistoryShard(config, index) for index in range(2)]
        async with asyncio.timeout(60):
            while not all([(await shard.status()).caught_up for shard in shards]):
                await asyncio.sleep(0.05)
        at = {}
        for user in USERS:
            partition = partition_of(user, 3)
            own, other = shards[partition % 2], shards[1 - partition % 2]
            key = key_of(Namespace.USER, user)
            held = await own.history(SCHEMA, key, partition)
            assert (len(held.history.items), held.partition, held.stale) == (1, partition, False)
            at[partition] = held.position
            with pytest.raises(LookupError, match=str(partition)):
                await other.history(SCHEMA, key, partition)
        user, partition = 5, partition_of(5, 3)
        own, key = shards[partition % 2], key_of(Namespace.USER, 5)
        with pytest.raises(TailBehind):
            await own.history(SCHEMA, key, partition, at[partition], 0.05)
        waiting = asyncio.create_task(own.history(SCHEMA, key, partition, at[partition], 30))
        await asyncio.to_thread(post, config, range(user, user + 1), 2)
        assert len((await waiting).history.items) == 2
        for shard in shards:
            await shard.check_health()
            shard._tail.stop()
            with pytest.raises(RuntimeError, match="follows the log"):
                await shard.check_health()

    asyncio.run(scenario())


def test_what_a_shard_tells_is_of_its_own_partitions(tmp_path: pathlib.Path, kafka_bootstrap: str) -> None:
    config = configured(tmp_path, kafka_bootstrap)
    create_topic(config.kafka, 4)
    post(config, USERS, 1)

    async def scenario() -> None:
        shard = HistoryShard(config, 1)
        async with asyncio.timeout(60):
            while not (await shard.status()).caught_up:
                await asyncio.sleep(0.05)
        await shard.check_health()
        shard._tail.stop()
        status = await shard.status()
        assert set(status.positions) == set(status.lags) == {1, 3}
        assert status.lag == 0

    asyncio.run(scenario())
