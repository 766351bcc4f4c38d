"""What replicas raise, as the gateway answers it."""

import asyncio
import types
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from grstream.config import parse
from grstream.tail import TailBehind, TailNotReady, TailStatus
from serve.backend import RayBackend, _reaching
from serve.errors import OtherSchema, QueueFull, Unavailable
from serve.gateway import UserHistory
from tests.serve.test_last_seen import seen


@pytest.mark.parametrize(
    ("cause", "kind"), [(OtherSchema("it was started"), "schema_changing"), (QueueFull("it"), "queue_full")]
)
def test_what_passes_by_itself_is_a_503_that_says_who_refused(cause: Exception, kind: str) -> None:
    with pytest.raises(Unavailable) as caught, _reaching("history shard"):
        raise RayTaskError("history", "a traceback", cause)
    assert caught.value.status == 503
    assert caught.value.problem.type == kind
    assert caught.value.problem.message == f"history shard: {cause}"


def test_any_other_error_of_a_replica_is_raised_as_itself() -> None:
    with pytest.raises(KeyError), _reaching("scorer"):
        raise RayTaskError("rank", "a traceback", KeyError("a bug"))


class Shard:
    """The handle of a history shard that does what it is told."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.hangs = False
        self.asked: list[tuple[Any, ...]] = []
        self.position = 1
        self.history = types.SimpleNamespace(remote=self._history)
        self.status = types.SimpleNamespace(remote=self._status)

    async def _history(self, *asked: Any) -> UserHistory:
        self.asked.append(asked)
        if self.hangs:
            await asyncio.sleep(60)
        if self.error is not None:
            raise RayTaskError("history", "a traceback", self.error)
        return seen(1, self.position)

    async def _status(self) -> TailStatus:
        return TailStatus(True, True, 1, {0: 1}, 0, 0, 0, None)


def backend(shard: Shard, **serve: Any) -> RayBackend:
    config = parse({"storage": "unused", "events": {"actions": ["click"]}, "serve": serve})
    return RayBackend(config, None, [shard])  # type: ignore[list-item, arg-type]


CACHED = {"when_histories_are_away": "cached", "histories_away_after_ms": 20, "read_your_writes_ms": 30}


def test_an_offset_and_how_long_to_wait_go_to_the_shard_and_what_it_lacks_comes_back() -> None:
    shard = Shard()
    behind = backend(shard, read_your_writes_ms=30)
    asyncio.run(behind.history(7, 5))
    assert shard.asked[-1][2:] == (0, 5, 0.03)
    shard.error = TailBehind("not read")
    for live in (behind, backend(shard, **CACHED)):
        with pytest.raises(TailBehind):
            asyncio.run(live.history(7, 5))


def test_the_last_history_seen_answers_for_a_shard_that_is_away_and_says_so() -> None:
    shard = Shard()

    async def script() -> None:
        cached = backend(shard, **CACHED)
        assert not getattr(await cached.history(7), "stale", False)
        for error, hangs in ((TailNotReady("reading"), False), (None, True)):
            shard.error, shard.hangs, shard.position = error, hangs, 9
            held = await cached.history(7)
            assert held.stale
            assert (held.stale, held.position) == (True, 1)
            assert (await cached.history(7, 0)).stale
        shard.hangs, shard.error = False, TailNotReady("reading")
        for user, offset in ((8, None), (7, 1)):  # never seen, and not as far as was asked
            with pytest.raises(Unavailable):
                await cached.history(user, offset)
        shard.error = QueueFull("it")
        with pytest.raises(Unavailable, match="queue_full"):
            await cached.history(7)
        shard.error = None
        assert (await cached.history(7)).position == 9

    asyncio.run(script())


def test_by_default_a_shard_that_is_away_is_a_503() -> None:
    shard = Shard()

    async def script() -> None:
        waiting = backend(shard)
        await waiting.history(7)
        shard.error = TailNotReady("reading")
        with pytest.raises(Unavailable):
            await waiting.history(7)

    asyncio.run(script())
