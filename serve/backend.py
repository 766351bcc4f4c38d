"""What stands behind the gateway, on Ray Serve: history shards, scorers and the log."""

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from grstream.api import Appended, ReadyAnswer, ShardState
from grstream.config import Config
from grstream.events import ActionEvent
from grstream.kafka import partition_of
from grstream.keys import Id, Namespace, key_of
from grstream.schema import Schema
from grstream.scores import EngineNotReady, Rank, Ranked, Recommend, Recommended, Retrieve, Retrieved
from grstream.tail import TailNotReady, TailStatus
from grstream.weights import Manifest
from serve.errors import OtherSchema, QueueFull, Unavailable
from serve.gateway import UserHistory
from serve.last_seen import LastSeen, stale
from serve.writer import ActionWriter

P = TypeVar("P")
T = TypeVar("T")

WRITERS = 16  # posts that wait for acknowledgements at once, each a few milliseconds
PARTITIONS_S = 10.0  # between questions for the number of partitions
# What Ray and Serve raise where a replica has died, is starting, or is not to be had.
AWAY = (
    RayActorError,
    WorkerCrashedError,
    ObjectLostError,
    GetTimeoutError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
# The kinds of Unavailable at which the last history seen may answer instead.
SHARD_AWAY = ("history_shard_unavailable", "not_ready")


class RayBackend:
    """A `serve.gateway.Backend` over deployment handles."""

    def __init__(self, config: Config, scorers: DeploymentHandle, shards: Sequence[DeploymentHandle]) -> None:
        self._scorers, self._shards = scorers, shards
        self._schema = Schema.of(config.events)
        self._partitions: int | None = None  # of the topic
        self._ask_again = 0.0
        self._read_wait_s = config.serve.read_your_writes_ms / 1000
        self._away_after_s = config.serve.histories_away_after_ms / 1000
        self._seen: LastSeen | None = None
        if config.serve.when_histories_are_away == "cached":
            self._seen = LastSeen(
                config.serve.cached_histories, config.serve.cached_histories_bytes, config.forget_within_s
            )
        self._queue = config.serve.queue
        self._posting = 0
        self._writer = ActionWriter(config)
        self._writers = concurrent.futures.ThreadPoolExecutor(WRITERS, thread_name_prefix="writer")

    async def partition(self, user: Id) -> int:
        return partition_of(user, await self._partition_count())

    async def history(self, user: Id, min_offset: int | None = None) -> UserHistory:
        """The user's history; a stale one where its shard is away and the configuration says so.

        With `min_offset` it includes the record at that offset of the user's partition, or TailBehind.
        """
        if self._seen is None:
            return await self._live(user, min_offset)
        last = self._seen.get(user)
        if last is None or (min_offset is not None and last.position <= min_offset):
            last = None
        try:
            # Serve holds a call to a replica that is being started again until it is there.
            waiting_s = 0 if min_offset is None else self._read_wait_s
            async with asyncio.timeout(None if last is None else self._away_after_s + waiting_s):
                held = await self._live(user, min_offset)
        except TimeoutError:
            if last is None:  # somebody else's
                raise
            return stale(last)
        except Unavailable as error:
            if last is None or error.problem.type not in SHARD_AWAY:
                raise
            return stale(last)
        self._seen.put(user, held)
        return held

    async def _live(self, user: Id, min_offset: int | None) -> UserHistory:
        partition = await self.partition(user)
        shard = self._shards[partition % len(self._shards)]
        with _reaching("history shard"):
            held: UserHistory = await shard.history.remote(
                self._schema, key_of(Namespace.USER, user), partition, min_offset, self._read_wait_s
            )
            return held

    async def rank(self, user: Id, ask: Rank) -> Ranked:
        with _reaching("scorer"):
            ranked: Ranked = await self._scorer(user).rank.remote(self._schema, ask)
            return ranked

    async def retrieve(self, user: Id, ask: Retrieve) -> Retrieved:
        with _reaching("scorer"):
            found: Retrieved = await self._scorer(user).retrieve.remote(self._schema, ask)
            return found

    async def recommend(self, user: Id, ask: Recommend) -> Recommended:
        with _reaching("scorer"):
            best: Recommended = await self._scorer(user).recommend.remote(self._schema, ask)
            return best

    def _scorer(self, user: Id) -> DeploymentHandle:
        """The scorers, for a call that goes to the one whose cache has the user."""
        return self._scorers.options(session_id=str(user))

    async def append(self, events: Sequence[ActionEvent]) -> list[Appended]:
        return await self._post(self._writer.append, events)

    async def forget(self, user: Id) -> Appended:
        if self._seen is not None:
            self._seen.drop(user)
        return await self._post(self._writer.forget, user)

    async def _post(self, write: Callable[[P], T], what: P) -> T:
        if self._posting >= self._queue:
            raise Unavailable("queue_full", f"{self._posting} posts wait for the log already")
        self._posting += 1
        try:
            posted = self._writers.submit(write, what)
            return await asyncio.wrap_future(posted)
        finally:
            self._posting -= 1

    async def manifest(self) -> Manifest:
        with _reaching("scorer"):
            manifest: Manifest = await self._scorers.manifest.remote()
            return manifest

    async def readiness(self) -> ReadyAnswer:
        statuses = [await self._status(i) for i in range(len(self._shards))]
        version, reason = None, None
        try:
            version = (await self.manifest()).number
        except EngineNotReady as error:
            reason = str(error)
        for i, status in enumerate(statuses):
            if not status.caught_up:
                lag = "" if status.lag is None else f", {status.lag} events to go"
                reason = f"history shard {i} is catching up with the log{lag}; {status.reason or 'reading'}"
        shards = [
            ShardState(
                connected=s.connected,
                caught_up=s.caught_up,
                positions=s.positions,
                lag=s.lag,
                gaps=s.gaps,
            )
            for s in statuses
        ]
        return ReadyAnswer(ready=reason is None, reason=reason, version=version, shards=shards)

    async def _partition_count(self) -> int:
        """Of the topic, as a shard knew it a little while ago: it rarely changes, and only grows."""
        if self._partitions is None or time.monotonic() >= self._ask_again:
            status = await self._status(0)
            if status.partitions is None:
                raise Unavailable("not_ready", status.reason or "the log has not been reached yet")
            self._partitions = status.partitions
            self._ask_again = time.monotonic() + PARTITIONS_S
        return self._partitions

    async def _status(self, shard: int) -> TailStatus:
        with _reaching("history shard"):
            status: TailStatus = await self._shards[shard].status.remote()
            return status


@contextlib.contextmanager
def _reaching(what: str) -> Iterator[None]:
    """Turns what Ray and Serve raise within, where `what` is away, into Unavailable."""
    kind = what.replace(" ", "_")
    try:
        yield
    except BackPressureError as error:
        raise Unavailable("queue_full", f"{what}: {error}") from error
    except RayTaskError as error:
        # Ray raises the replica's own error under a text that tells of processes and files.
        cause = error.cause
        if isinstance(cause, QueueFull):
            raise Unavailable("queue_full", f"{what}: {cause}") from error
        if isinstance(cause, TailNotReady):
            raise Unavailable("not_ready", str(cause)) from error
        if isinstance(cause, OtherSchema):
            raise Unavailable("schema_changing", f"{what}: {cause}") from error
        raise cause from error
    except AWAY as error:
        message = f"the {what} is away ({type(error).__name__}); it is being started again"
        raise Unavailable(f"{kind}_unavailable", message) from error
