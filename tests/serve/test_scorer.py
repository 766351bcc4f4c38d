import asyncio
import contextlib
import pathlib
import time
import uuid
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from grstream.config import Config, ModelConfig, parse
from grstream.histories import History
from grstream.kafka import create_topic, producer
from grstream.schema import Schema
from grstream.scores import EngineNotReady, Rank, Recommend, Retrieve
from grstream.telemetry import BY_PART, Part
from grstream.weights import Manifest, Recipe
from serve.errors import OtherSchema, QueueFull
from serve.scorer import Scorer, export_served
from serve.shard import HistoryShard
from tests.exported import Exported

NOTHING = np.empty(0, np.int64)
SCHEMA = Schema(("click",), ())
HISTORY = History(NOTHING, np.empty(0, np.int32), NOTHING, np.empty((0, 0), np.int64), 0, 0)


TO_FIND = Retrieve(history=HISTORY, at_ms=0, k=1)


def to_rank(at_ms: int = 0) -> Rank:
    return Rank(history=HISTORY, at_ms=at_ms, user=1, items=NOTHING)


def config(storage: pathlib.Path, queue: int, kafka: dict[str, Any] | None = None) -> Config:
    return parse(
        {
            "kafka": kafka or {},
            "storage": str(storage),
            "events": {"actions": ["click"]},
            "serve": {"queue": queue, "cache_bytes": 0},
        }
    )


class Engine:
    """Answers with the time that was asked for, once it is let."""

    manifest = None

    def __init__(self) -> None:
        self.asked: list[tuple[Rank, Future[Any]]] = []

    def ask(self, ask: Rank) -> Future[Any]:
        self.asked.append((ask, Future()))
        return self.asked[-1][1]

    def let(self) -> None:
        for ask, future in self.asked:
            if not future.done():
                future.set_result(ask.at_ms)


def test_a_scorer_holds_so_many_requests_and_refuses_the_next_at_once(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        scorer, engine = Scorer(config(tmp_path, queue=3)), Engine()
        scorer._engine.close()
        scorer._engine = engine  # type: ignore[assignment]

        def ask(number: int) -> asyncio.Task:
            return asyncio.create_task(scorer.rank(SCHEMA, to_rank(number)))

        held = [ask(number) for number in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull, match="3 requests"):
            await ask(3)
        held[1].cancel()
        await asyncio.sleep(0)
        assert engine.asked[1][1].cancelled(), "nothing is computed for who no longer waits"
        held.append(ask(4))
        await asyncio.sleep(0.05)
        engine.let()
        answers = await asyncio.gather(*held, return_exceptions=True)
        assert [answers[i] for i in (0, 2, 3)] == [0, 2, 4]
        assert isinstance(answers[1], asyncio.CancelledError)
        assert [asked.at_ms for asked, _ in engine.asked] == [0, 1, 2, 4]
        for asked, _ in engine.asked:
            assert asked.deadline is not None
            assert 0 < asked.deadline - time.monotonic() < 5
        scorer._follower.stop()

    asyncio.run(scenario())


def test_a_scorer_exports_its_counts_and_a_shard_where_it_stands_whenever_serve_asks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = {Part.SCORER: Exported(), Part.SHARD: Exported()}
    monkeypatch.setattr("serve.scorer.Exporter", lambda: out[Part.SCORER])
    monkeypatch.setattr("serve.shard.Exporter", lambda: out[Part.SHARD])

    async def scenario() -> None:
        without_broker = config(
            tmp_path, 3, {"bootstrap_servers": ["127.0.0.1:9"], "request_timeout_ms": 200}
        )
        scorer, shard = Scorer(without_broker), HistoryShard(without_broker, 0)
        count = scorer._engine.steps.count
        count.update(steps=3, requests=4, candidates=90, encoded_tokens=50, found_tokens=20, hits=2, misses=2)
        await scorer.check_health()
        count.update(steps=1, hits=1)
        scorer._follower.refused, scorer._store.corrupt = 1, 2
        await scorer.check_health()
        await shard.check_health()
        scorer._follower.stop()
        scorer._engine.close()
        shard._tail.stop()

    asyncio.run(scenario())
    told = out[Part.SCORER].values
    assert told["grstream_engine_steps",] == 4
    assert [told["grstream_engine_requests", reuse] for reuse in ("hit", "extend", "miss")] == [3, 0, 2]
    assert told["grstream_engine_candidates",] == 90
    assert [told["grstream_engine_tokens", source] for source in ("encoded", "cached")] == [50, 20]
    assert [told["grstream_weights_refused", why] for why in ("corrupt", "unusable")] == [2, 1]
    assert told["grstream_served_version",] == told["grstream_engine_waiting_requests",] == 0
    absent = {"grstream_served_version_age_seconds", "grstream_served_event_age_seconds"}  # no version yet
    absent |= {"grstream_items_lag_offsets"}  # nor a topic of items
    assert {name for name, *_ in told} == {m.name for m in BY_PART[Part.SCORER]} - absent
    told = out[Part.SHARD].values
    assert told["grstream_history_connected", "0"] == told["grstream_history_caught_up", "0"] == 0
    assert told["grstream_history_lost_offsets",] == told["grstream_history_rejected_records",] == 0


def test_the_version_served_is_told_with_its_age_and_that_of_what_it_learned() -> None:
    out, now_ms = Exported(), time.time_ns() // 1_000_000
    recipe = Recipe(model=ModelConfig(), actions=["click"], features=[], vocabulary_seed=0)
    manifest = Manifest(
        number=7, step=1, created_ms=now_ms - 5_000, positions={}, newest_event_ms=now_ms - 60_000,
        recipe=recipe, files={},
    )  # fmt: skip
    export_served(out, manifest)
    assert out.values["grstream_served_version",] == 7
    assert out.values["grstream_served_version_age_seconds",] == pytest.approx(5, abs=3)
    assert out.values["grstream_served_event_age_seconds",] == pytest.approx(60, abs=3)


def test_a_scorer_without_weights_says_so_and_one_whose_follower_died_is_unhealthy(
    tmp_path: pathlib.Path,
) -> None:
    async def scenario() -> None:
        scorer = Scorer(config(tmp_path, queue=3))
        for call in (scorer.manifest(), scorer.rank(SCHEMA, to_rank())):
            with pytest.raises(EngineNotReady):
                await call
        await scorer.check_health()
        scorer._follower.stop()
        with pytest.raises(RuntimeError, match="follows the weights"):
            await scorer.check_health()
        other = Scorer(config(tmp_path, queue=3))
        other._engine.close()
        with pytest.raises(RuntimeError, match="engine's thread"):
            await other.check_health()
        other._follower.stop()

    asyncio.run(scenario())


@pytest.mark.kafka
def test_a_scorer_retrieves_nothing_before_it_has_read_what_was_withdrawn(
    tmp_path: pathlib.Path, kafka_bootstrap: str
) -> None:
    async def scenario() -> None:
        topic = f"items-{uuid.uuid4().hex[:8]}"
        kafka = {"bootstrap_servers": [kafka_bootstrap], "items_topic": topic}
        scorer = Scorer(config(tmp_path, 3, kafka))
        best = Recommend(history=HISTORY, at_ms=0, k=1, weights=())
        for call in (scorer.retrieve(SCHEMA, TO_FIND), scorer.recommend(SCHEMA, best)):
            with pytest.raises(EngineNotReady, match="items are being read"):
                await call
        with pytest.raises(EngineNotReady, match="weights"):
            await scorer.rank(SCHEMA, to_rank())
        create_topic(config(tmp_path, 3, kafka).kafka, 1, topic)
        with contextlib.closing(producer(config(tmp_path, 3, kafka).kafka)) as log:
            log.send(topic, b'{"item_id": 7, "available": false}', key=b"7").get(10)
        deadline = time.monotonic() + 30
        while scorer._engine._catalogue is None or not len(scorer._engine._catalogue):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        with pytest.raises(EngineNotReady, match="weights"):
            await scorer.retrieve(SCHEMA, TO_FIND)
        assert scorer._items is not None
        await scorer.check_health()
        scorer._items.stop()
        with pytest.raises(RuntimeError, match="follows the items"):
            await scorer.check_health()
        scorer._follower.stop()

    asyncio.run(scenario())


def test_a_replica_answers_nobody_whose_columns_and_bits_mean_something_else(tmp_path: pathlib.Path) -> None:
    """While an application is updated, old and new replicas call each other."""

    async def scenario() -> None:
        other = config(tmp_path, queue=3)
        scorer, shard = Scorer(other), HistoryShard(other, 0)
        grown = Schema(("click",), ("context.device",))
        for call in (
            scorer.rank(grown, to_rank()),
            scorer.retrieve(grown, TO_FIND),
            shard.history(grown, 1, 0),
        ):
            with pytest.raises(
                OtherSchema, match=r"features context\.device: the application is being updated"
            ):
                await call
        scorer._follower.stop()
        shard._tail.stop()

    asyncio.run(scenario())
