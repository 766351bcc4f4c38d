"""The scorer deployment: an engine behind a queue, following the weights."""

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from grstream import telemetry
from grstream.catalogue_tail import CatalogueStatus, CatalogueTail
from grstream.config import Config
from grstream.exchange import Exchange
from grstream.exporter import Exporter
from grstream.schema import Schema
from grstream.scores import EngineNotReady, Rank, Ranked, Recommend, Recommended, Retrieve, Retrieved
from grstream.telemetry import Part
from grstream.weight_store import WeightStore
from grstream.weights import Manifest
from serve.errors import QueueFull, require_schema
from serve.follower import WeightsFollower
from serve.instruments import TRACER, engine_spans

if TYPE_CHECKING:
    from grstream.engine import Counts


class Scorer:
    """One replica. Its engine, in a thread of its own, holds at most `queue` requests.

    It is made once the newest version is loaded and the machine measured with it, so that Serve sends
    requests to none that is cold; where no version was published yet it answers EngineNotReady.
    """

    def __init__(self, config: Config) -> None:
        # Torch takes seconds to import: replicas pay for it, not whoever builds the application.
        from grstream.engine import Engine

        self._schema = Schema.of(config.events)
        self._engine = Engine(config.serve, "cuda" if config.serve.gpu else "cpu", self._schema, measure=True)
        self._engine.start()
        self._queue = config.serve.queue
        self._timeout_s = config.serve.request_timeout_ms / 1000
        self._waiting = 0
        self._tracer = trace.get_tracer(TRACER)
        self._exporter = Exporter()
        self._exporter.begin(Part.SCORER)
        self._budget = config.serve.cache_bytes
        self._items = CatalogueTail.of(config, self._engine.announce)
        if self._items is not None:
            self._items.start()
        self._store = WeightStore(config.storage / "weights", Exchange(config.storage))
        self._follower = WeightsFollower(self._store, self._engine, config.serve.poll_weights_s)
        self._follower.start()

    async def rank(self, schema: Schema, ask: Rank) -> Ranked:
        """`schema`, here and below, is the caller's; raises OtherSchema where it is not this replica's."""
        require_schema(self._schema, schema)
        ranked: Ranked = await self._ask(ask)
        return ranked

    async def retrieve(self, schema: Schema, ask: Retrieve) -> Retrieved:
        require_schema(self._schema, schema)
        self._require_items()
        found: Retrieved = await self._ask(ask)
        return found

    async def recommend(self, schema: Schema, ask: Recommend) -> Recommended:
        require_schema(self._schema, schema)
        self._require_items()
        found: Recommended = await self._ask(ask)
        return found

    async def manifest(self) -> Manifest:
        """Of the version being served. Raises EngineNotReady before the first one."""
        manifest = self._engine.manifest
        if manifest is None:
            raise EngineNotReady("no weights version is loaded yet: the trainer has to publish one first")
        return manifest

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises. It asks every few seconds: metrics go out then."""
        self._export()
        if not self._follower.is_alive():
            raise RuntimeError("the thread that follows the weights has ended")
        if self._items is not None and not self._items.is_alive():
            raise RuntimeError("the thread that follows the items has ended")
        if not self._engine.is_alive():
            raise RuntimeError("the engine's thread has ended")

    def _export(self) -> None:
        out = self._exporter
        out.set(telemetry.CACHE_BUDGET, self._budget)
        export_counts(out, self._engine.counts())
        export_served(out, self._engine.manifest)
        if self._items is not None:
            export_items(out, self._items.status())
        out.count_to(telemetry.VERSIONS_REFUSED, self._store.corrupt, reason="corrupt")
        out.count_to(telemetry.VERSIONS_REFUSED, self._follower.refused, reason="unusable")
        out.count_to(telemetry.WEIGHTS_ERRORS, self._follower.errors)

    def _require_items(self) -> None:
        """Before it has read which items were withdrawn, a replica retrieves none. Raises EngineNotReady."""
        status = None if self._items is None else self._items.status()
        if status is not None and not status.caught_up:
            raise EngineNotReady(
                f"the items are being read from their topic: {status.reason or 'not at its end'}"
            )

    async def _ask(self, ask: Rank | Retrieve) -> Any:
        if self._waiting >= self._queue:
            raise QueueFull(f"{self._waiting} requests wait for this scorer, as many as it may hold")
        self._waiting += 1
        try:
            # A clock of this machine's: after it whoever asked no longer waits.
            ask = dataclasses.replace(ask, deadline=time.monotonic() + self._timeout_s)
            answer = await asyncio.wrap_future(self._engine.ask(ask))  # cancelled, it leaves the engine
            if trace.get_current_span().is_recording():
                engine_spans(self._tracer, answer.encoded, time.time_ns())
            return answer
        finally:
            self._waiting -= 1


def export_counts(out: Exporter, counts: "Counts") -> None:
    """What an engine has done, read from its counts: nothing is added to its work."""
    out.set(telemetry.ENGINE_WAITING, counts.waiting)
    out.set(telemetry.CACHE_PAGES, counts.pages)
    out.set(telemetry.CACHE_BYTES, counts.cache_bytes)
    out.count_to(telemetry.ENGINE_STEPS, counts.steps)
    out.count_to(telemetry.ENGINE_CANDIDATES, counts.candidates)
    out.count_to(telemetry.ENGINE_EXPIRED, counts.expired)
    out.count_to(telemetry.ENGINE_REBUILT, counts.rebuilt)
    out.count_to(telemetry.CACHE_EVICTED, counts.evicted_pages)
    for reuse, total in (("hit", counts.hits), ("extend", counts.extends), ("miss", counts.misses)):
        out.count_to(telemetry.ENGINE_REQUESTS, total, reuse=reuse)
    for source, total in (("encoded", counts.encoded_tokens), ("cached", counts.found_tokens)):
        out.count_to(telemetry.ENGINE_TOKENS, total, source=source)


def export_served(out: Exporter, manifest: Manifest | None) -> None:
    out.set(telemetry.SERVED_VERSION, 0 if manifest is None else manifest.number)
    if manifest is not None:
        now_ms = time.time() * 1000
        out.set(telemetry.SERVED_AGE, max(0.0, now_ms - manifest.created_ms) / 1000)
        out.set(telemetry.SERVED_EVENT_AGE, max(0.0, now_ms - manifest.newest_event_ms) / 1000)


def export_items(out: Exporter, status: CatalogueStatus) -> None:
    if status.lag is not None:
        out.set(telemetry.ITEMS_LAG, status.lag)
