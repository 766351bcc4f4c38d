"""Histories and candidates to scores, in steps that many requests share.

Ranking is M-FALCON (paper section 3.4): a user's history is encoded once, its keys and values are kept, and
candidates are scored against them in micro-batches of b_m. A step takes what is waiting: it encodes the
missing tokens of some histories as one ragged batch, scores candidates of several requests as another, at
most b_m of each, and answers those that are finished (continuous batching). So a request for ten thousand
candidates does not hold up one for fifty. No score depends on the micro-batch, on the order of the
candidates, on the company in a step or on what the cache held (law 2). An answer comes from one version and
names it. Imports neither Ray nor Kafka.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from typing import Any, cast

import torch

from grstream.catalogue import Catalogue
from grstream.config import ServeConfig
from grstream.cost import Cost
from grstream.histories import History
from grstream.keys import Keys
from grstream.kv_cache import KVCache
from grstream.schema import Schema
from grstream.scores import (
    EngineStopped,
    Rank,
    Ranked,
    Recommend,
    Recommended,
    Retrieve,
    Retrieved,
    UnusableWeights,
)
from grstream.served import Served, build
from grstream.shelf import Shelf
from grstream.steps import Request, Steps
from grstream.versions import Versions
from grstream.weights import Manifest, WeightsVersion

logger = logging.getLogger(__name__)

Future = concurrent.futures.Future
HISTORIES_SHARE = 0.125  # of the cache's budget, beside it, for histories that may have to be encoded anew


@dataclasses.dataclass(frozen=True)
class Counts:
    """What an engine has done since it was made."""

    steps: int
    requests: int  # answered
    candidates: int  # scored
    encoded_tokens: int
    found_tokens: int  # of histories, in the cache
    hits: int  # requests whose whole history was in the cache, or was empty
    extends: int
    misses: int
    expired: int
    rebuilt: int  # histories, under a new version in idle steps
    evicted_pages: int
    pages: int  # in use
    cache_bytes: int
    waiting: int


class Engine:
    """Scores by the newest version it was given, over a cache of keys and values.

    Histories and requests come with the actions and feature columns of `schema`, by default each version's
    own. One of the two schemas may have grown from the other: a version is told of the features that it was
    trained with and that are given, the others are absent to it, and it scores the actions that it knows.

    Thread-safe. Steps run in a thread of the engine's own after `start`; without it, in the threads that ask
    and wait, by turns.
    """

    def __init__(
        self,
        config: ServeConfig,
        device: torch.device | str = "cpu",
        schema: Schema | None = None,
        *,
        measure: bool = False,
    ) -> None:
        """With `measure` the first version is served once the machine has been measured with it."""
        self.device = torch.device(device)
        self._config, self._schema, self._measure = config, schema, measure
        self._turn = threading.Lock()  # over the steps and the versions
        self._wake = threading.Condition()  # over what is incoming
        self._incoming: collections.deque[Request] = collections.deque()
        self.steps = Steps(config, self.device, self._no_versions())
        self._catalogue: Catalogue | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None

    # -- from outside -----------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest | None:
        """Of the newest version."""
        newest = self.steps.versions.newest
        return None if newest is None else newest.manifest

    def start(self) -> None:
        """Run steps in a thread of its own from now on."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; requests that it holds get EngineStopped."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._end()

    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def swap(self, version: WeightsVersion) -> None:
        """Serve another version. Requests under way end with the one they began with.

        Users whose histories are cached go over when they have been encoded anew, or when the version that
        they were served by is older than `max_version_age_s`. One that says where it differs from the
        version being served is built from it: what did not change is copied. Raises UnusableWeights, and
        goes on with the version it had.
        """
        before = self.steps.versions.newest
        served = build(version, self.device, self._schema, before, self._config.index == "faiss")
        if served.given != served.schema and (before is None or before.schema != served.schema):
            logger.warning(
                "weights version %d was trained with %s, and is asked with %s: what only one of the two "
                "names has no part in its answers",
                *(version.number, served.schema, served.given),
            )
        new_shape = before is None or _shape(before) != _shape(served)
        if self._measure and new_shape:
            config = self._config
            pages = (config.page_tokens, config.page_dtype)
            self.steps.cost = Cost.measured(served.model, config.step_ms / 1000, config.micro_batch, *pages)
            logger.info("measured: %s", self.steps.cost)
        shelf = Shelf.of(served, self._catalogue)
        with self._turn:
            steps = self.steps
            if new_shape:
                if steps.versions.beside is not None:
                    logger.warning("the A/B test ends: version %d is of another shape", version.number)
                config = self._config
                steps.cache = KVCache(served.model, config.cache_bytes, config.page_tokens, config.page_dtype)
                steps.versions = self._no_versions()
            steps.drop_rebuilding()
            steps.versions.add(served, self._current(served, shelf), time.monotonic())
        with self._wake:
            self._wake.notify_all()

    def serve_beside(self, version: WeightsVersion | None, share: float = 0.0) -> None:
        """Have a version answer a share of the users, chosen by a hash, in place of all others; None: no one.

        Raises UnusableWeights, and goes on as before, also where its pages are not those of the version that
        serves the others.
        """
        if version is None:
            with self._turn:
                self.steps.versions.end_ab()
            return
        newest = self.steps.versions.newest
        served = build(version, self.device, self._schema, None, self._config.index == "faiss")
        if newest is None or _shape(newest) != _shape(served):
            raise UnusableWeights(
                f"weights version {version.number} cannot serve beside another one whose layers differ"
            )
        shelf = Shelf.of(served, self._catalogue)
        with self._turn:
            self.steps.versions.begin_ab(served, share, self._current(served, shelf))

    @property
    def beside(self) -> tuple[int, float] | None:
        """Number and share of the version that some of the users are served by."""
        beside = self.steps.versions.beside
        return None if beside is None else (beside[0].number, beside[1])

    def announce(self, catalogue: Catalogue) -> None:
        """Retrieve by another catalogue from now on: without what it withdraws, with what it announces."""
        shelves = [(served, Shelf.of(served, catalogue)) for served in self.steps.versions.all()]
        with self._turn:
            self._catalogue = catalogue
            made = {id(served): shelf for served, shelf in shelves}
            for served in self.steps.versions.all():
                shelf = made.get(id(served)) or Shelf.of(served, catalogue)
                self.steps.versions.put(served, shelf)

    def _current(self, served: Served, shelf: Shelf) -> Shelf:
        """The shelf, or another one where the catalogue has changed while it was made."""
        return shelf if shelf.catalogue is self._catalogue else Shelf.of(served, self._catalogue)

    def ask(self, ask: Rank | Retrieve) -> Future[Any]:
        """The answer to come: Ranked, Retrieved or Recommended.

        It may end in EngineNotReady, WrongFeatures, NonFiniteScores, DeadlineExceeded or EngineStopped.
        Cancelled, it costs no more work.
        """
        request = Request(ask, Future(), time.monotonic())
        with self._wake:
            if self._stopped:
                raise EngineStopped("the engine was closed")
            self._incoming.append(request)
            self._wake.notify()
        return request.future

    def rank(
        self,
        history: History,
        candidates: Keys,  # (C,) item keys
        at_ms: int,
        *,
        features: Keys | None = None,
        user: int | None = None,
    ) -> Ranked:
        """`Rank`, waited for."""
        ask = Rank(history=history, at_ms=at_ms, user=user, items=candidates, features=features)
        return cast(Ranked, self._wait(self.ask(ask)))

    def retrieve(
        self,
        history: History,
        k: int,
        at_ms: int,
        *,
        context: Keys | None = None,
        exclude: Keys | None = None,
        allow: Keys | None = None,
        user: int | None = None,
    ) -> Retrieved:
        """`Retrieve`, waited for."""
        of = Retrieve(history=history, at_ms=at_ms, user=user, k=k)
        ask = dataclasses.replace(of, context=context, exclude=exclude, allow=allow)
        return cast(Retrieved, self._wait(self.ask(ask)))

    def recommend(self, ask: Recommend) -> Recommended:
        """`Recommend`, waited for."""
        return cast(Recommended, self._wait(self.ask(ask)))

    def counts(self) -> Counts:
        names = {field.name for field in dataclasses.fields(Counts)}
        counted = {name: self.steps.count[name] for name in names}
        cache = self.steps.cache
        if cache is not None:
            counted |= {"pages": len(cache), "cache_bytes": cache.nbytes, "evicted_pages": cache.evicted}
        return Counts(**counted | {"waiting": len(self._incoming) + len(self.steps.active)})

    def rebuild(self) -> bool:
        """An idle step: encode some of a history under the newest version. Whether there was one to."""
        with self._turn, torch.inference_mode():
            return self.steps.rebuild()

    # -- the steps --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                with self._turn, torch.inference_mode():
                    worked = self._step() or self.steps.rebuild()
                if not worked:
                    with self._wake:
                        if not self._incoming and not self._stopped:
                            self._wake.wait()
        finally:
            self._stopped = True
            self._end()

    def _end(self) -> None:
        for request in [*self.steps.active, *self._incoming]:
            if not request.future.done():
                request.future.set_exception(EngineStopped("the engine ended while it held this request"))

    def _wait(self, future: Future[Any]) -> Any:
        while not future.done() and self._thread is None:
            with self._turn, torch.inference_mode():
                if not future.done():
                    self._step()
        return future.result()

    def _step(self) -> bool:
        with self._wake:
            self.steps.active.extend(self._incoming)
            self._incoming.clear()
        return self.steps.step()

    def _no_versions(self) -> Versions:
        config = self._config
        budget = int(config.cache_bytes * HISTORIES_SHARE)
        return Versions(config.versions, config.max_version_age_s, budget)


def _shape(served: Served) -> tuple[Any, ...]:
    """What cache pages of a version's model look like."""
    model = served.model
    return (len(model.start), *((layer.heads, layer.qk, layer.v) for layer in model.layers))
