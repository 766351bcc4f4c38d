"""The scorer deployment: an engine behind a queue, following the weights."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from grstream.config import Config
from grstream.exchange import Exchange
from grstream.histories import History
from grstream.keys import Keys
from grstream.schema import Schema
from grstream.scores import EngineNotReady, Ranked, Retrieved
from grstream.weight_store import WeightStore
from grstream.weights import Manifest
from serve.errors import QueueFull, require_schema
from serve.follower import WeightsFollower

P = ParamSpec("P")
T = TypeVar("T")


class Scorer:
    """One replica. Requests wait in line for the engine, at most `queue` of them, off the event loop."""

    def __init__(self, config: Config) -> None:
        # Torch takes seconds to import: replicas pay for it, not whoever builds the application.
        from grstream.engine import Engine

        self._schema = Schema.of(config.events)
        self._engine = Engine(config.serve, "cuda" if config.serve.gpu else "cpu", self._schema)
        self._queue = config.serve.queue
        self._waiting = 0
        self._turns = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine")
        store = WeightStore(config.storage / "weights", Exchange(config.storage))
        self._follower = WeightsFollower(store, self._engine, config.serve.poll_weights_s)
        self._follower.start()

    async def rank(
        self, schema: Schema, user: int, history: History, items: Keys, features: Keys, at_ms: int
    ) -> Ranked:
        """`schema`, here and below, is the caller's; raises OtherSchema where it is not this replica's."""
        require_schema(self._schema, schema)
        return await self._in_turn(self._engine.rank, history, items, at_ms, features=features, user=user)

    async def retrieve(
        self, schema: Schema, user: int, history: History, k: int, context: Keys, at_ms: int, exclude: Keys
    ) -> Retrieved:
        require_schema(self._schema, schema)
        return await self._in_turn(
            self._engine.retrieve, history, k, at_ms, context=context, exclude=exclude, user=user
        )

    async def manifest(self) -> Manifest:
        """Of the version being served. Raises EngineNotReady before the first one."""
        manifest = self._engine.manifest
        if manifest is None:
            raise EngineNotReady("no weights version is loaded yet: the trainer has to publish one first")
        return manifest

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not self._follower.is_alive():
            raise RuntimeError("the thread that follows the weights has ended")

    async def _in_turn(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._waiting >= self._queue:
            raise QueueFull(f"{self._waiting} requests wait for this scorer, as many as it may hold")
        self._waiting += 1
        try:
            turn = self._turns.submit(work, *args, **kwargs)
            return await asyncio.wrap_future(turn)  # a cancelled request leaves the line
        finally:
            self._waiting -= 1
