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
import hashlib
import logging
import threading
import time
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from grstream.catalogue import Catalogue
from grstream.config import ServeConfig
from grstream.cost import Cost
from grstream.histories import History
from grstream.history_tokens import HistoryTokens, memory_tokens
from grstream.keys import ABSENT, Keys
from grstream.kv_cache import CacheFull, KVCache
from grstream.pages import page_bytes
from grstream.schema import Schema
from grstream.scores import (
    Arm,
    DeadlineExceeded,
    Encoded,
    EngineNotReady,
    EngineStopped,
    NonFiniteScores,
    Rank,
    Ranked,
    Recommend,
    Recommended,
    Retrieve,
    Retrieved,
    Reuse,
    UnusableWeights,
    WrongFeatures,
)
from grstream.sequences import Part, Sequence, encode, held, room_for
from grstream.served import Served, build
from grstream.shelf import Shelf
from grstream.tokens import Tokens
from grstream.versions import Versions
from grstream.weights import Manifest, WeightsVersion
from grstream.work import Work, work_for

logger = logging.getLogger(__name__)

Future = concurrent.futures.Future
HISTORIES_SHARE = 0.125  # of the cache's budget, beside it, for histories that may have to be encoded anew


@dataclasses.dataclass(eq=False)
class _Request:
    ask: Rank | Retrieve
    future: Future[Any]
    asked_at: float
    begun_at: float | None = None
    work: Work | None = None
    sequence: Sequence | None = None
    # Behind the history, for this request alone: what its context changes.
    context: HistoryTokens | None = None
    own_pages: list[int] = dataclasses.field(default_factory=list)
    arm: Arm | None = None

    @property
    def ready(self) -> bool:
        """Whether all that its rows see is encoded."""
        encoded = self.sequence is not None and self.sequence.ready
        return encoded and (self.context is None or bool(self.own_pages))


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
        self.cost = Cost.assumed(config.step_ms / 1000, config.micro_batch)
        self._turn = threading.Lock()  # over all that a step touches
        self._wake = threading.Condition()  # over what is incoming
        self._incoming: collections.deque[_Request] = collections.deque()
        self._active: collections.deque[_Request] = collections.deque()
        self._sequences: dict[tuple[Any, ...], Sequence] = {}  # of active requests
        self._rebuilding: tuple[int, Sequence] | None = None
        self._versions = self._no_versions()
        self._beside: tuple[Served, float] | None = None  # of an A/B test, and its share of users
        self._catalogue: Catalogue | None = None
        self._shelves: dict[int, Shelf] = {}  # by the version's identity
        self.cache: KVCache | None = None  # from the first version on
        self._count: collections.Counter[str] = collections.Counter()
        self._stopped = False
        self._thread: threading.Thread | None = None

    # -- from outside -----------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest | None:
        """Of the newest version."""
        newest = self._versions.newest
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
        before = self._versions.newest
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
            self.cost = Cost.measured(served.model, config.step_ms / 1000, config.micro_batch, *pages)
            logger.info("measured: %s", self.cost)
        shelf = Shelf.of(served, self._catalogue)
        with self._turn:
            if new_shape:
                if self._beside is not None:
                    logger.warning(
                        "the A/B test has ended here: version %d is of another shape", version.number
                    )
                self._beside = None
                config = self._config
                self.cache = KVCache(served.model, config.cache_bytes, config.page_tokens, config.page_dtype)
                self._versions = self._no_versions()
            self._drop_rebuilding()
            self._versions.add(served, time.monotonic())
            self._put(served, shelf)
        with self._wake:
            self._wake.notify_all()

    def serve_beside(self, version: WeightsVersion | None, share: float = 0.0) -> None:
        """Have a version answer a share of the users, chosen by a hash, in place of all others; None: no one.

        Raises UnusableWeights, and goes on as before, also where its pages are not those of the version that
        serves the others.
        """
        newest = self._versions.newest
        beside = None
        if version is not None:
            served = build(version, self.device, self._schema, None, self._config.index == "faiss")
            if newest is None or _shape(newest) != _shape(served):
                raise UnusableWeights(
                    f"weights version {version.number} cannot serve beside another one whose layers differ"
                )
            beside = served, share
        with self._turn:
            self._beside = beside
            if beside is not None:
                self._put(beside[0], Shelf.of(beside[0], self._catalogue))

    @property
    def beside(self) -> tuple[int, float] | None:
        """Number and share of the version that some of the users are served by."""
        return None if self._beside is None else (self._beside[0].number, self._beside[1])

    def announce(self, catalogue: Catalogue) -> None:
        """Retrieve by another catalogue from now on: without what it withdraws, with what it announces."""
        versions = self._live()
        shelves = [Shelf.of(served, catalogue) for served in versions]
        with self._turn:
            self._catalogue = catalogue
            for served, shelf in zip(versions, shelves, strict=True):
                self._put(served, shelf)

    def _live(self) -> list[Served]:
        return [*self._versions.all(), *([self._beside[0]] if self._beside else [])]

    def _put(self, served: Served, shelf: Shelf) -> None:
        if shelf.catalogue is not self._catalogue:  # another one came while this was made
            shelf = Shelf.of(served, self._catalogue)
        live = {id(version) for version in self._live()}
        self._shelves = {key: held for key, held in self._shelves.items() if key in live}
        if id(served) in live:
            self._shelves[id(served)] = shelf

    def ask(self, ask: Rank | Retrieve) -> Future[Any]:
        """The answer to come: Ranked, Retrieved or Recommended.

        It may end in EngineNotReady, WrongFeatures, NonFiniteScores, DeadlineExceeded or EngineStopped.
        Cancelled, it costs no more work.
        """
        request = _Request(ask, Future(), time.monotonic())
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
        counted = {name: self._count[name] for name in names}
        cache = self.cache
        if cache is not None:
            counted |= {"pages": len(cache), "cache_bytes": cache.nbytes, "evicted_pages": cache.evicted}
        return Counts(**counted | {"waiting": len(self._incoming) + len(self._active)})

    def rebuild(self) -> bool:
        """An idle step: encode some of a history under the newest version. Whether there was one to."""
        with self._turn, torch.inference_mode():
            return self._rebuild()

    # -- the steps --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                with self._turn, torch.inference_mode():
                    worked = self._step() or self._rebuild()
                if not worked:
                    with self._wake:
                        if not self._incoming and not self._stopped:
                            self._wake.wait()
        finally:
            self._stopped = True
            self._end()

    def _end(self) -> None:
        for request in [*self._active, *self._incoming]:
            if not request.future.done():
                request.future.set_exception(EngineStopped("the engine ended while it held this request"))

    def _wait(self, future: Future[Any]) -> Any:
        while not future.done() and self._thread is None:
            with self._turn, torch.inference_mode():
                if not future.done():
                    self._step()
        return future.result()

    def _step(self) -> bool:
        """Work on what is waiting. Whether there was anything."""
        with self._wake:
            while self._incoming:
                self._active.append(self._incoming.popleft())
        if not self._active:
            return False
        self._count["steps"] += 1
        now = time.monotonic()
        for request in list(self._active):
            self._admit(request, now)
        self._encode()
        for request in list(self._active):
            self._in_context(request)
        self._score([r for r in self._active if r.sequence is not None and r.ready])
        return True

    def _admit(self, request: _Request, now: float) -> None:
        """Begin with a request, or end it where its time is over or it cannot be answered."""
        if request.ask.deadline is not None and now > request.ask.deadline:
            self._count["expired"] += 1
            self._fail(request, DeadlineExceeded("the time for this request was over before its turn came"))
            return
        if request.future.cancelled():
            self._leave(request)
            return
        if request.work is not None:
            return
        ask = request.ask
        if self.cache is None:
            self._fail(
                request,
                EngineNotReady("no weights version is loaded yet: the trainer has to publish one first"),
            )
            return
        try:
            work, sequence, request.arm = self._begin(ask, now)
        except WrongFeatures as error:
            self._fail(request, error)
            return
        request.begun_at, request.work = now, work
        request.sequence = self._sequences.setdefault(sequence.identity, sequence)
        if request.sequence is not sequence:  # another request is at the same history
            sequence.release()
        request.sequence.holders += 1
        last = work.history.features[-1] if len(work.history.items) else None
        contexts = work.served.schema.contexts
        context = HistoryTokens.of_context(
            work.context,
            np.full(contexts, ABSENT, np.int64) if last is None else last[:contexts],
            ask.at_ms - sequence.tokens.begin_ms,
            work.history.features.shape[1] - contexts,
        )
        request.context = context if len(context) else None

    def _begin(self, ask: Rank | Retrieve, now: float) -> tuple[Work, Sequence, Arm | None]:
        arm: Arm | None = None if self._beside is None else "a"
        if self._beside is not None and ask.user is not None and _within(ask.user, *self._beside):
            return *self._sequence(ask, self._beside[0]), "b"
        served = self._versions.of(ask.user, now)
        assert served is not None
        work, sequence = self._sequence(ask, served)
        newest = self._versions.newest
        if newest is not None and served is not newest:
            sequence.locate()
            if not sequence.done:  # nothing is gained by the older version
                sequence.release()
                served = newest
                work, sequence = self._sequence(ask, served)
        if ask.user is not None:
            self._versions.answered(ask.user, ask.history, served, now)
        return work, sequence, arm

    def _sequence(self, ask: Rank | Retrieve, served: Served) -> tuple[Work, Sequence]:
        assert self.cache is not None
        work = work_for(served, self._shelves[id(served)], ask)
        tokens = HistoryTokens.of(work.history, served.schema.contexts, served.interleaved)
        return work, Sequence(served, self.cache, tokens, ask.user)

    def _encode(self) -> None:
        """Encode some of what is missing of active requests' histories."""
        waiting: dict[int, Sequence] = {}
        for request in self._active:
            if request.sequence is not None and not request.sequence.ready:
                waiting.setdefault(id(request.sequence), request.sequence)
        stuck = self._encode_some(waiting.values())
        # Whoever is being scored gives its pages back. If there is no one, there will be no room either.
        if stuck is not None and not any(
            r.sequence.ready and r.sequence.pages and r.sequence.cache is stuck.cache
            for r in self._active
            if r.sequence is not None
        ):
            self._apart(stuck)

    def _encode_some(self, waiting: Iterable[Sequence]) -> Sequence | None:
        """Encode what a step has time for. The first one for which there is no room, before all after it."""
        batches: dict[tuple[int, int, bool], list[Part]] = collections.defaultdict(list)
        under_way: set[bytes] = set()
        users: set[tuple[int, int]] = set()
        left = self.cost.step_s
        stuck = None
        for sequence in waiting:
            if left <= 0:
                break
            sequence.locate()
            if sequence.ready:
                continue
            # What another one of this step encodes is found in the cache in the next.
            user = None if sequence.user is None else (sequence.user, id(sequence.served))
            if sequence.missing in under_way or user in users:
                sequence.look_again()
                continue
            count = min(len(sequence) - sequence.done, self.cost.tokens(left, sequence.done))
            if not room_for(sequence, count):
                stuck = sequence
                break
            if sequence.missing is not None:
                under_way.add(sequence.missing)
            if user is not None:
                users.add(user)
            left -= self.cost.encoding.seconds(count, sequence.done)
            group = (id(sequence.served), id(sequence.cache), not sequence.done)
            batches[group].append(Part(sequence, count))
        for batch in batches.values():
            encode(batch)
            self._count["encoded_tokens"] += sum(part.count for part in batch)
        return stuck

    def _in_context(self, request: _Request) -> None:
        """Encode what a request's context changes, in pages of its own."""
        sequence, context = request.sequence, request.context
        if sequence is None or not sequence.ready or context is None or request.own_pages:
            return
        cache, length = sequence.cache, len(sequence)
        page = cache.page_tokens
        full, filled = length // page, length % page
        try:
            own = cache.take(-(-(filled + len(context)) // page))
        except CacheFull:
            self._apart(sequence)
            return
        request.own_pages = own
        if filled:
            cache.copy(sequence.pages[full], own[0])
        tokens = memory_tokens([context.content], sequence.served.table)
        paged = cache.cache([length + len(context)], [[*sequence.pages[:full], *own]])
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        sequence.served.model.grow(paged, tokens, nothing)

    def _score(self, ready: list[_Request]) -> None:
        """Score a micro-batch of each request, as far as a step goes, and answer those that are finished."""
        left = self.cost.step_s
        batches: dict[tuple[int, int], list[tuple[_Request, Tensor, int]]] = collections.defaultdict(list)
        for request in ready:
            assert request.work is not None
            assert request.sequence is not None
            if left <= 0:
                break
            n = len(request.sequence)
            wanted = min(request.work.left, self.cost.micro_batch(n), self.cost.scoring.rows(left, n))
            if wanted:
                rows = request.work.rows(wanted)
                kind = int(rows.kind)
                batches[id(request.work.served), id(request.sequence.cache)].append(
                    (request, rows.vectors, kind)
                )
                left -= self.cost.scoring.seconds(wanted, n)
        for batch in batches.values():
            self._score_together(batch)
        scored = {id(request) for batch in batches.values() for request, _, _ in batch}
        for request in ready:
            if request.work is None:  # it failed
                continue
            if not request.work.left:
                self._answer(request)
            elif id(request) in scored:  # it goes behind those that have had nothing yet
                self._active.remove(request)
                self._active.append(request)

    def _score_together(self, batch: list[tuple[_Request, Tensor, int]]) -> None:
        lengths, pages, counts, times, kinds = [], [], [], [], []
        for request, vectors, kind in batch:
            sequence = request.sequence
            assert sequence is not None
            own, context = request.own_pages, request.context
            length = len(sequence)
            if context is None:
                pages.append(held(sequence, length))
            else:
                pages.append([*sequence.pages[: length // sequence.cache.page_tokens], *own])
            lengths.append(length + (0 if context is None else len(context)))
            counts.append(len(vectors))
            times.append(request.ask.at_ms - sequence.tokens.begin_ms)
            kinds.append(kind)
        first = batch[0][0].sequence
        assert first is not None
        rows = torch.tensor([counts, lengths, times, kinds], device=self.device)
        each = rows[1:].repeat_interleave(rows[0], 1)
        of = Tokens.of_candidates(rows[0], torch.cat([v for _, v, _ in batch]), each[0], each[1])
        outputs = first.served.model.score(
            first.cache.cache(lengths, pages), dataclasses.replace(of, query_kinds=each[2])
        )
        self._count["candidates"] += len(outputs)
        for (request, _, _), own_outputs in zip(batch, outputs.split(counts), strict=True):
            assert request.work is not None
            assert request.sequence is not None
            try:
                request.work.take(own_outputs, request.sequence)
            except NonFiniteScores as error:
                self._fail(request, error)

    def _answer(self, request: _Request) -> None:
        work, sequence, begun = request.work, request.sequence, request.begun_at
        assert work is not None
        assert sequence is not None
        assert begun is not None
        took = time.monotonic() - request.asked_at
        encoded = Encoded(
            tokens=len(sequence),
            cached=sequence.cached,
            waited_ms=1e3 * (begun - request.asked_at),
            took_ms=1e3 * took,
        )
        try:
            answer = dataclasses.replace(work.answer(sequence, encoded), arm=request.arm)
        except NonFiniteScores as error:
            self._fail(request, error)
            return
        self._count["requests"] += 1
        self._count["found_tokens"] += sequence.cached
        self._count[{Reuse.HIT: "hits", Reuse.EXTEND: "extends", Reuse.MISS: "misses"}[sequence.reuse]] += 1
        self._leave(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(answer)

    def _fail(self, request: _Request, error: Exception) -> None:
        self._leave(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)

    def _leave(self, request: _Request) -> None:
        """A request holds nothing any more."""
        self._active.remove(request)
        request.work = None
        self._let_go(request)

    def _let_go(self, request: _Request) -> None:
        sequence, request.sequence = request.sequence, None
        if sequence is None:
            return
        sequence.cache.release(request.own_pages)
        request.own_pages = []
        sequence.holders -= 1
        if not sequence.holders:
            if self._sequences.get(sequence.identity) is sequence:
                del self._sequences[sequence.identity]
            sequence.release()

    def _apart(self, sequence: Sequence) -> None:
        """Encode a history outside the cache, in pages for those alone that ask about it now.

        So is one that is larger than the whole cache, and every one without a cache.
        """
        asking = [r for r in self._active if r.sequence is sequence]
        page, dtype = sequence.cache.page_tokens, self._config.page_dtype
        contexts = sum(-(-(page + len(r.context)) // page) for r in asking if r.context is not None)
        model, pages = sequence.served.model, -(-len(sequence) // page) + contexts
        own = KVCache(model, pages * page_bytes(model, page, dtype), page, dtype)
        alone = Sequence(sequence.served, own, sequence.tokens, None)
        for request in asking:
            self._let_go(request)
            request.sequence = alone
            alone.holders += 1

    def _rebuild(self) -> bool:
        now = time.monotonic()
        if self._rebuilding is None:
            found, newest = self._versions.to_rebuild(now), self._versions.newest
            if found is None or newest is None:
                return False
            user, history = found
            ask = Rank(history=history, at_ms=0, user=user, items=np.zeros(0, np.int64))
            self._rebuilding = user, self._sequence(ask, newest)[1]
        user, sequence = self._rebuilding
        if not sequence.ready and self._encode_some([sequence]) is not None:
            self._drop_rebuilding()  # there is no room
            return False
        if sequence.ready:
            self._versions.rebuilt(user, sequence.served)
            self._count["rebuilt"] += 1
            self._drop_rebuilding()
        return True

    def _no_versions(self) -> Versions:
        config = self._config
        budget = int(config.cache_bytes * HISTORIES_SHARE)
        return Versions(config.versions, config.max_version_age_s, budget)

    def _drop_rebuilding(self) -> None:
        if self._rebuilding is not None:
            self._rebuilding[1].release()
            self._rebuilding = None


def _within(user: int, served: Served, share: float) -> bool:
    """Whether a user belongs to arm b of the test of this version: others in the test of another one."""
    told = f"{served.number} {user}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") < share * 2**64


def _shape(served: Served) -> tuple[Any, ...]:
    """What cache pages of a version's model look like."""
    model = served.model
    return (len(model.start), *((layer.heads, layer.qk, layer.v) for layer in model.layers))
