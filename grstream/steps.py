"""The steps of an engine: what each does for the requests that are waiting. See `grstream.engine`."""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grstream.config import ServeConfig
from grstream.cost import Cost
from grstream.history_tokens import HistoryTokens, memory_tokens
from grstream.keys import ABSENT
from grstream.kv_cache import CacheFull, KVCache
from grstream.pages import page_bytes
from grstream.scores import (
    Arm,
    DeadlineExceeded,
    Encoded,
    EngineNotReady,
    NonFiniteScores,
    Rank,
    Retrieve,
    Reuse,
    WrongFeatures,
)
from grstream.sequences import Part, Sequence, encode, held, room_for
from grstream.served import Served
from grstream.tokens import Tokens
from grstream.versions import Versions
from grstream.work import Work, work_for

Future = concurrent.futures.Future


@dataclasses.dataclass(eq=False)
class Request:
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


class Steps:
    """Requests under way, over one cache. Not thread-safe."""

    def __init__(self, config: ServeConfig, device: torch.device, versions: Versions) -> None:
        self._config, self.device = config, device
        self.cost = Cost.assumed(config.step_ms / 1000, config.micro_batch)
        self.versions = versions
        self.cache: KVCache | None = None  # from the first version on
        self.active: collections.deque[Request] = collections.deque()
        self.count: collections.Counter[str] = collections.Counter()
        self._sequences: dict[tuple[Any, ...], Sequence] = {}  # of active requests
        self.rebuilding: tuple[int, Sequence] | None = None

    def step(self) -> bool:
        """Work on what is waiting. Whether there was anything."""
        if not self.active:
            return False
        self.count["steps"] += 1
        now = time.monotonic()
        for request in list(self.active):
            self._admit(request, now)
        self._encode()
        for request in list(self.active):
            self._in_context(request)
        self._score([r for r in self.active if r.sequence is not None and r.ready])
        return True

    def _admit(self, request: Request, now: float) -> None:
        """Begin with a request, or end it where its time is over or it cannot be answered."""
        if request.ask.deadline is not None and now > request.ask.deadline:
            self.count["expired"] += 1
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
        served, arm = self.versions.of(ask.user, now)
        assert served is not None
        work, sequence = self._sequence(ask, served)
        newest = self.versions.newest
        if arm != "b" and newest is not None and served is not newest:
            sequence.locate()
            if not sequence.done:  # nothing is gained by the older version
                sequence.release()
                served = newest
                work, sequence = self._sequence(ask, served)
        if ask.user is not None and not ask.brought and arm != "b":
            self.versions.answered(ask.user, ask.history, served, now)
        return work, sequence, arm

    def _sequence(self, ask: Rank | Retrieve, served: Served) -> tuple[Work, Sequence]:
        assert self.cache is not None
        work = work_for(served, self.versions.shelf(served), ask)
        tokens = HistoryTokens.of(work.history, served.schema.contexts, served.interleaved)
        return work, Sequence(served, self.cache, tokens, None if ask.brought else ask.user)

    def _encode(self) -> None:
        """Encode some of what is missing of active requests' histories."""
        waiting: dict[int, Sequence] = {}
        for request in self.active:
            if request.sequence is not None and not request.sequence.ready:
                waiting.setdefault(id(request.sequence), request.sequence)
        stuck = self._encode_some(waiting.values())
        # Whoever is being scored gives its pages back. If there is no one, there will be no room either.
        if stuck is not None and not any(
            r.sequence.ready and r.sequence.pages and r.sequence.cache is stuck.cache
            for r in self.active
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
            self.count["encoded_tokens"] += sum(part.count for part in batch)
        return stuck

    def _in_context(self, request: Request) -> None:
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

    def _score(self, ready: list[Request]) -> None:
        """Score a micro-batch of each request, as far as a step goes, and answer those that are finished."""
        left = self.cost.step_s
        batches: dict[tuple[int, int], list[tuple[Request, Tensor, int]]] = collections.defaultdict(list)
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
                self.active.remove(request)
                self.active.append(request)

    def _score_together(self, batch: list[tuple[Request, Tensor, int]]) -> None:
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
        self.count["candidates"] += len(outputs)
        for (request, _, _), own_outputs in zip(batch, outputs.split(counts), strict=True):
            assert request.work is not None
            assert request.sequence is not None
            try:
                request.work.take(own_outputs, request.sequence)
            except NonFiniteScores as error:
                self._fail(request, error)

    def _answer(self, request: Request) -> None:
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
        self.count["requests"] += 1
        self.count["found_tokens"] += sequence.cached
        self.count[{Reuse.HIT: "hits", Reuse.EXTEND: "extends", Reuse.MISS: "misses"}[sequence.reuse]] += 1
        self._leave(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(answer)

    def _fail(self, request: Request, error: Exception) -> None:
        self._leave(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)

    def _leave(self, request: Request) -> None:
        """A request holds nothing any more."""
        self.active.remove(request)
        request.work = None
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
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
        asking = [r for r in self.active if r.sequence is sequence]
        page, dtype = sequence.cache.page_tokens, self._config.page_dtype
        contexts = sum(-(-(page + len(r.context)) // page) for r in asking if r.context is not None)
        model, pages = sequence.served.model, -(-len(sequence) // page) + contexts
        own = KVCache(model, pages * page_bytes(model, page, dtype), page, dtype)
        alone = Sequence(sequence.served, own, sequence.tokens, None)
        for request in asking:
            self._let_go(request)
            request.sequence = alone
            alone.holders += 1

    def rebuild(self) -> bool:
        """Encode some of a history under the newest version. Whether there was one to."""
        now = time.monotonic()
        if self.rebuilding is None:
            found, newest = self.versions.to_rebuild(now), self.versions.newest
            if found is None or newest is None:
                return False
            user, history = found
            ask = Rank(history=history, at_ms=0, user=user, items=np.zeros(0, np.int64))
            self.rebuilding = user, self._sequence(ask, newest)[1]
        user, sequence = self.rebuilding
        if not sequence.ready and self._encode_some([sequence]) is not None:
            self.drop_rebuilding()  # there is no room
            return False
        if sequence.ready:
            self.versions.rebuilt(user, sequence.served)
            self.count["rebuilt"] += 1
            self.drop_rebuilding()
        return True

    def drop_rebuilding(self) -> None:
        if self.rebuilding is not None:
            self.rebuilding[1].release()
            self.rebuilding = None
