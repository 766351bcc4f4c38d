import dataclasses
import pathlib
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from grstream.catalogue import Catalogue, CatalogueFold, ItemBatch
from grstream.config import ModelConfig, ServeConfig
from grstream.cost import Line
from grstream.engine import Engine
from grstream.histories import History
from grstream.history_tokens import HistoryTokens, memory_tokens
from grstream.keys import ABSENT, Keys, Namespace, ints_of_keys, keys_of_ints
from grstream.kv_cache import CacheFull, KVCache
from grstream.model import HSTU
from grstream.pages import page_bytes
from grstream.schema import Schema, placed
from grstream.scores import (
    DeadlineExceeded,
    EngineNotReady,
    EngineStopped,
    NonFiniteScores,
    Rank,
    Ranked,
    Recommend,
    Retrieve,
    Reuse,
    UnusableWeights,
    WrongFeatures,
)
from grstream.served import build
from grstream.tokens import Kind, Tokens
from grstream.vocabulary import vectors_of
from grstream.weight_store import WeightStore
from grstream.weights import PRIOR, Manifest, Recipe, Weights, WeightsVersion

MODEL = ModelConfig(layers=2, dim=16, heads=2)
FEATURES = ["context.place", "context.device", "item.genre"]
RECIPE = Recipe(model=MODEL, actions=["click", "like"], features=FEATURES, vocabulary_seed=3)
ITEMS = keys_of_ints(Namespace.ITEM, np.arange(40))  # the first 30 are known
PLACES = keys_of_ints(Namespace.FEATURE, np.arange(5))
NOW = 1_700_000_000_000
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def version(number: int, layout: str = "fused", model: ModelConfig = MODEL) -> WeightsVersion:
    """Random weights with biases that matter; each number its own."""
    torch.manual_seed(number)
    recipe = RECIPE.model_copy(update={"model": model.model_copy(update={"layout": layout})})
    made = HSTU(recipe.model, actions=2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    draw = np.random.default_rng(number)
    keys = np.concatenate([ITEMS[:30], PLACES[:3]])
    weights = Weights(
        dense={name: tensor.numpy().copy() for name, tensor in made.state_dict().items()},
        keys=keys,
        rows=draw.normal(size=(len(keys), MODEL.dim)).astype(np.float32),
        items=np.arange(len(keys)) < 30,
        item_names={int(ITEMS[0]): "zero"},
    )
    manifest = Manifest(
        number=number, step=0, created_ms=0, positions={}, newest_event_ms=0, recipe=recipe, files={}
    )
    return WeightsVersion(manifest, weights)


PAGE_BYTES = page_bytes(HSTU(MODEL, actions=2), 16, "float32")
VERSIONS = {number: version(number, "interleaved" if number == 2 else "fused") for number in (1, 2, 3)}


def history(seed: int, n: int) -> History:
    draw = np.random.default_rng(seed)
    return History(
        items=draw.choice(ITEMS, n),
        actions=draw.integers(0, 4, n).astype(np.int32),
        times=NOW - np.sort(draw.integers(0, 10**9, n))[::-1],
        features=draw.choice([ABSENT, *PLACES], (n, 3)),
        epoch=0,
        appended=n,
    )


def plain_history(seed: int, n: int) -> History:
    """Without features, so that every event is one token."""
    return dataclasses.replace(history(seed, n), features=np.full((n, 3), ABSENT, np.int64))


def model_of(held: WeightsVersion) -> HSTU:
    model = HSTU(held.manifest.recipe.model, actions=2).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in held.weights.dense.items()})
    return model


def plain_tokens(held: WeightsVersion, past: History, context: Keys, at_ms: int, item: Keys) -> Tokens:
    """Token by token: the history, what a request's context changes, and one candidate with its genre."""
    row_of = {key: row for row, key in enumerate(held.weights.keys.tolist())}
    table = torch.from_numpy(held.weights.rows)
    interleaved = held.manifest.recipe.model.layout == "interleaved"
    memory: list[tuple[torch.Tensor, Kind, int, int]] = []
    known = np.full(2, ABSENT, np.int64)

    def vector(*keys: int) -> torch.Tensor:
        present = np.array([k for k in keys if k != ABSENT], np.int64)
        rows = np.array([row_of.get(k, -1) for k in present.tolist()], np.int64)
        found, _ = vectors_of(present, rows, table, 3)
        return sum(found, torch.zeros(MODEL.dim))

    def told(context: Keys, time: int) -> None:
        for before, now in zip(known.tolist(), context.tolist(), strict=True):
            if now not in (ABSENT, before):
                memory.append((vector(now), Kind.CONTEXT, 0, time))
        known[:] = context

    for i in range(len(past.items)):
        time, bits = int(past.times[i]), int(past.actions[i])
        told(past.features[i, :2], time)
        shown = vector(past.items[i], past.features[i, 2])
        if interleaved:
            memory += [(shown, Kind.ITEM, 0, time), (torch.zeros(MODEL.dim), Kind.ACTION, bits, time)]
        else:
            memory.append((shown, Kind.EVENT, bits, time))
    told(context, at_ms)
    return Tokens(
        memory_lengths=torch.tensor([len(memory)]),
        memory_vectors=torch.stack([m[0] for m in memory]) if memory else torch.zeros(0, MODEL.dim),
        **{
            name: torch.tensor([m[i] for m in memory], dtype=torch.int64)
            for i, name in ((1, "memory_kinds"), (2, "memory_actions"), (3, "memory_times"))
        },
        query_lengths=torch.tensor([1]),
        query_vectors=vector(*item)[None],
        query_kinds=torch.tensor([Kind.ITEM if interleaved else Kind.CANDIDATE]),
        query_prefix=torch.tensor([len(memory)]),
        query_times=torch.tensor([at_ms]),
    )


@torch.inference_mode()
def from_scratch(held: WeightsVersion, past: History, items: Keys, features: Keys, at_ms: int) -> np.ndarray:
    """Probabilities by `HSTU.forward` over whole sequences, one candidate at a time."""
    model = model_of(held)
    scores = []
    for item, columns in zip(items, features, strict=True):
        tokens = plain_tokens(held, past, columns[:2], at_ms, np.array([item, columns[2]]))
        scores.append(torch.sigmoid(model.action_logits(model(tokens).query))[0])
    return torch.stack(scores).numpy()


@torch.inference_mode()
def nearest(held: WeightsVersion, past: History, context: Keys, at_ms: int) -> dict[int, float]:
    """Each known item's score in retrieval."""
    model, none = model_of(held), np.full(2, ABSENT, np.int64)
    last = past.features[-1, :2] if len(past.items) else none
    before = plain_tokens(held, past, last, at_ms, none)  # the same context: no token for it
    tokens = plain_tokens(held, past, context, at_ms, none)
    tokens = dataclasses.replace(tokens, query_kinds=torch.tensor([Kind.REQUEST]))
    table = model.item_vectors(torch.from_numpy(held.weights.rows[:30]))
    newest = model(before).memory[-1:] if len(past.items) else model.start[None]
    user = model.user_vectors(newest + model(tokens).query)
    return dict(zip(ITEMS[:30].tolist(), (user @ table.T)[0].tolist(), strict=True))


def engine(number: int | None = 1, micro_batch: int = 512, cache_bytes: int = 1 << 20, **options) -> Engine:
    defaults = {"max_version_age_s": 0, "page_tokens": 16}
    made = Engine(ServeConfig(micro_batch=micro_batch, cache_bytes=cache_bytes, **{**defaults, **options}))
    if number is not None:
        made.swap(VERSIONS[number])
    return made


def ragged(seed: int, count: int) -> tuple[Keys, Keys]:
    draw = np.random.default_rng(seed)
    features = draw.choice([ABSENT, *PLACES], (count, 3))
    features[:, :2] = features[:1, :2]  # the request's context
    return draw.permutation(ITEMS)[:count], features


def grown(past: History, more: History) -> History:
    columns = {
        f: np.concatenate([getattr(past, f), getattr(more, f)]) for f in ("items", "actions", "features")
    }
    times = np.concatenate([past.times, np.maximum(more.times, past.times[-1] if len(past.times) else 0)])
    return dataclasses.replace(past, times=times, **columns)


def cut(past: History, rows: slice | np.ndarray) -> History:
    return dataclasses.replace(
        past, **{f: getattr(past, f)[rows] for f in ("items", "actions", "times", "features")}
    )


@settings(max_examples=25)
@given(
    number=st.integers(1, 2),
    n=st.integers(0, 20),
    count=st.integers(1, 12),
    micro_batch=st.integers(1, 13),
    seed=st.integers(0, 99),
)
def test_scores_are_those_of_each_candidate_alone_in_any_order_and_any_micro_batch(
    number: int, n: int, count: int, micro_batch: int, seed: int
) -> None:
    past, (items, features) = history(seed, n), ragged(seed, count)
    expected = from_scratch(VERSIONS[number], past, items, features, NOW)
    ranked = engine(number, micro_batch).rank(past, items, NOW, features=features)
    np.testing.assert_allclose(ranked.probabilities, expected, **TOLERANCE)
    order = np.random.default_rng(seed).permutation(count)
    other = engine(number, 512).rank(past, items[order], NOW, features=features[order])
    np.testing.assert_allclose(other.probabilities, expected[order], **TOLERANCE)
    assert ranked.probabilities.std() > 1e-4, "equal scores for all would prove nothing"


class AnyInterleaving(RuleBasedStateMachine):
    """Users whose histories grow, roll, and take late events, under swaps, evictions and small caches."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, History] = {}

    @initialize(
        pages=st.sampled_from([0, 1, 3, 9, 40]),
        micro_batch=st.integers(1, 5),
        age=st.sampled_from([0, 1000]),
        tokens=st.sampled_from([3, 20, 2048]),
    )
    def start(self, pages: int, micro_batch: int, age: float, tokens: int) -> None:
        self.budget = pages * PAGE_BYTES
        self.engine = engine(1, micro_batch, self.budget, max_version_age_s=age)
        self.engine.steps.cost = dataclasses.replace(self.engine.steps.cost, most_tokens=tokens)
        self.numbers = {1}  # of versions that may answer
        self.newest = 1

    @rule(user=st.integers(0, 3), count=st.integers(1, 12), seed=st.integers(0, 1000))
    def append(self, user: int, count: int, seed: int) -> None:
        self.users[user] = grown(self.users.get(user, history(0, 0)), history(seed, count))

    @rule(user=st.integers(0, 3), other=st.integers(0, 3))
    def begin_as_another(self, user: int, other: int) -> None:
        if other in self.users:
            past = self.users[other]
            self.users[user] = dataclasses.replace(past, times=past.times + 3_600_000)

    @rule(user=st.integers(0, 3), count=st.integers(1, 3))
    def roll(self, user: int, count: int) -> None:
        if user in self.users:
            self.users[user] = cut(self.users[user], slice(count, None))

    @rule(user=st.integers(0, 3), place=st.floats(0, 1), seed=st.integers(0, 1000))
    def late_event(self, user: int, place: float, seed: int) -> None:
        past = self.users.get(user)
        if past is not None and len(past.items):
            at = int(place * len(past.items))
            late = cut(history(seed, 1), slice(None))
            late = dataclasses.replace(late, times=past.times[min(at, len(past.times) - 1)][None])
            parts = (cut(past, slice(at)), late, cut(past, slice(at, None)))
            self.users[user] = dataclasses.replace(
                past,
                **{
                    f: np.concatenate([getattr(p, f) for p in parts])
                    for f in ("items", "actions", "times", "features")
                },
            )

    @rule(user=st.integers(0, 3))
    def forget(self, user: int) -> None:
        self.users.pop(user, None)

    @rule(number=st.sampled_from([1, 2, 3]))
    def swap(self, number: int) -> None:
        self.engine.swap(VERSIONS[number])
        self.newest = number
        self.numbers.add(number)

    @rule(steps=st.integers(1, 6))
    def idle(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.rebuild()

    @rule(user=st.integers(0, 3), count=st.integers(1, 6), seed=st.integers(0, 99), known=st.booleans())
    def rank(self, user: int, count: int, seed: int, known: bool) -> None:
        past, (items, features) = self.users.get(user, history(0, 0)), ragged(seed, count)
        asked = user if known else None
        self.check(
            self.engine.rank(past, items, NOW + seed, features=features, user=asked), past, seed, count
        )

    @rule(asked=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 99)), max_size=5))
    def together(self, asked: list[tuple[int, int, int]]) -> None:
        futures = []
        for user, count, seed in asked:
            past, (items, features) = self.users.get(user, history(0, 0)), ragged(seed, count)
            ask = Rank(history=past, at_ms=NOW + seed, user=user, items=items, features=features)
            futures.append((self.engine.ask(ask), past, seed, count))
        self.engine.rank(history(0, 0), ITEMS[:1], NOW)  # the others are in its steps
        for future, past, seed, count in futures:
            while not future.done():
                self.engine.rank(history(0, 0), ITEMS[:1], NOW)
            self.check(future.result(), past, seed, count)

    @rule(user=st.integers(0, 3), seed=st.integers(0, 99))
    def recommend(self, user: int, seed: int) -> None:
        past = self.users.get(user, history(0, 0))
        context = ragged(seed, 1)[1][0, :2]
        ask = Recommend(
            history=past,
            at_ms=NOW + seed,
            user=user,
            k=4,
            context=context,
            weights=(("click", 1), ("like", 2)),
        )
        found = self.engine.recommend(ask)
        features = np.full((len(found.items), 3), ABSENT, np.int64)
        features[:, :2] = context
        held = VERSIONS[found.version]
        expected = from_scratch(held, past, found.items, features, NOW + seed)
        np.testing.assert_allclose(found.probabilities, expected, **TOLERANCE)
        np.testing.assert_allclose(found.scores, expected @ [1, 2], rtol=0, atol=4e-5)
        best = nearest(held, past, context, NOW + seed)
        worst = min(best[key] for key in found.items.tolist())
        assert sum(score > worst + 1e-5 for score in best.values()) < 4

    def check(self, ranked: Ranked, past: History, seed: int, count: int) -> None:
        items, features = ragged(seed, count)
        assert ranked.version in self.numbers
        if self.engine._config.max_version_age_s == 0:
            assert ranked.version == self.newest
        held = VERSIONS[ranked.version]
        expected = from_scratch(held, past, items, features, NOW + seed)
        np.testing.assert_allclose(ranked.probabilities, expected, **TOLERANCE)
        np.testing.assert_array_equal(ranked.known, np.isin(items, ITEMS[:30]))

    @invariant()
    def holds_nothing_between_requests_and_keeps_within_its_budget(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.steps.cache is not None
            assert 0 <= self.engine.steps.cache.nbytes <= self.budget
            held = {page for _, s in [self.engine.steps.rebuilding or (0, None)] if s for page in s.pages}
            for page in range(self.engine.steps.cache.capacity):
                assert self.engine.steps.cache.holders(page) == (page in held)


def test_no_interleaving_of_change_and_request_shows_in_a_score() -> None:
    run_state_machine_as_test(AnyInterleaving, settings=settings(max_examples=25, stateful_step_count=20))


def test_the_cache_spares_what_it_can_and_nothing_that_changed() -> None:
    served, long = engine(), dataclasses.replace(history(1, 40), features=np.full((40, 3), ABSENT, np.int64))

    def reuse(past: History, user: int | None = 7) -> tuple[Reuse, int]:
        ranked = served.rank(past, ITEMS[:1], NOW, user=user)
        assert ranked.encoded is not None
        return ranked.reuse, ranked.encoded.cached

    assert reuse(cut(long, slice(6))) == (Reuse.MISS, 0)
    assert reuse(cut(long, slice(6))) == (Reuse.HIT, 6)
    assert reuse(long) == (Reuse.EXTEND, 6)
    assert reuse(long) == (Reuse.HIT, 40)
    full = 32
    assert reuse(long, user=8) == (Reuse.EXTEND, full), "whole pages are anybody's"
    assert reuse(dataclasses.replace(long, times=long.times + 5), user=None) == (Reuse.EXTEND, full)
    assert reuse(cut(long, slice(2, None))) == (Reuse.MISS, 0)
    assert reuse(long)[1] == full
    for field in ("items", "actions", "times", "features"):
        changed = getattr(long, field).copy()
        changed[-1] += 1
        assert reuse(dataclasses.replace(long, **{field: changed})) == (Reuse.EXTEND, full)
        changed[0] -= 1
        assert reuse(dataclasses.replace(long, **{field: changed})) == (Reuse.MISS, 0)
        assert reuse(long)[1] == full
    served.swap(VERSIONS[3])
    assert reuse(long) == (Reuse.MISS, 0)
    assert served.retrieve(long, 3, NOW, user=7).reuse is Reuse.HIT


def test_the_history_used_least_recently_is_evicted_first_and_loses_its_end_first() -> None:
    def past(user: int) -> History:  # 3 pages for every user: context would add some
        return dataclasses.replace(history(user, 48), features=np.full((48, 3), ABSENT, np.int64))

    served = engine(cache_bytes=7 * PAGE_BYTES)

    def cached(user: int) -> int:
        encoded = served.rank(past(user), ITEMS[:1], NOW, user=user).encoded
        assert encoded is not None
        return encoded.cached

    assert [cached(user) for user in (1, 2, 1)] == [0, 0, 48]
    assert cached(3) == 0  # for which two pages of user 2 went
    assert (cached(3), cached(1), cached(2)) == (48, 48, 16)


def test_requests_at_once_compute_what_they_share_once() -> None:
    served, past = engine(), history(1, 40)
    tokens = len(HistoryTokens.of(past, 2, False))
    longer = grown(past, history(2, 3))
    asks = [
        Rank(history=h, at_ms=NOW, user=user, items=ITEMS[:3])
        for h, user in [(past, 1), (past, 1), (longer, 1), (past, 2), (past, None)]
    ]
    futures = [served.ask(ask) for ask in asks]
    served.rank(history(0, 0), ITEMS[:1], NOW)
    while not all(future.done() for future in futures):
        served.rank(history(0, 0), ITEMS[:1], NOW)
    rest = tokens % 16
    new = len(HistoryTokens.of(longer, 2, False)) - tokens
    assert served.counts().encoded_tokens == tokens + new + 2 * rest
    for future, ask in zip(futures, asks, strict=True):
        none = np.full((3, 3), ABSENT, np.int64)
        expected = from_scratch(VERSIONS[1], ask.history, ask.items, none, NOW)
        np.testing.assert_allclose(future.result().probabilities, expected, **TOLERANCE)


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    served, past = engine(micro_batch=16), history(1, 5)
    many = np.resize(ITEMS, 4000)
    large = served.ask(Rank(history=past, at_ms=NOW, user=1, items=many))
    small = [served.ask(Rank(history=past, at_ms=NOW, user=u, items=ITEMS[:20])) for u in range(3)]
    while not all(future.done() for future in small):
        served.rank(history(0, 0), ITEMS[:1], NOW)
    assert not large.done()
    assert served.counts().candidates < 400
    while not large.done():
        served.rank(history(0, 0), ITEMS[:1], NOW)
    alone = engine().rank(past, ITEMS, NOW)
    np.testing.assert_allclose(large.result().probabilities[:40], alone.probabilities, **TOLERANCE)


def test_a_request_that_waits_sees_nothing_of_what_its_user_does_meanwhile() -> None:
    """Its last page is extended by a later request before it is scored."""
    served, past = engine(micro_batch=1), plain_history(1, 20)
    longer = grown(past, plain_history(2, 2))
    cost = served.steps.cost
    served.steps.cost = dataclasses.replace(cost, scoring=Line(1.0, 1.0, 1.0), encoding=Line(0, 1e-9, 1e-12))
    asks = [
        Rank(history=history(3, 4), at_ms=NOW, items=ITEMS[:3]),
        Retrieve(history=past, at_ms=NOW, user=1, k=30),
        Retrieve(history=longer, at_ms=NOW, user=1, k=30),
    ]
    futures = [served.ask(ask) for ask in asks]
    while not all(future.done() for future in futures):
        served.rank(history(0, 0), ITEMS[:1], NOW)
    for future, then in ((futures[1], past), (futures[2], longer)):
        scores = nearest(VERSIONS[1], then, np.full(2, ABSENT, np.int64), NOW)
        found = dict(zip(future.result().items.tolist(), future.result().scores.tolist(), strict=True))
        np.testing.assert_allclose([found[key] for key in scores], list(scores.values()), **TOLERANCE)
    assert futures[2].result().encoded.cached == futures[1].result().encoded.tokens


def test_a_page_that_two_hold_is_nobody_else_s_until_both_let_go() -> None:
    cache = KVCache(HSTU(MODEL, actions=2), 3 * PAGE_BYTES, 16)
    (page,) = cache.take(1)
    assert cache.keep(page, b"x") == page
    assert cache.find([b"x", b"y"]) == [page]
    cache.release([page])
    with pytest.raises(CacheFull):
        cache.take(3)
    assert page not in cache.take(2)
    with pytest.raises(CacheFull):
        cache.take(1)
    cache.release([page])
    assert cache.take(1) == [page]
    assert cache.find([b"x"]) == []


def test_a_long_history_is_encoded_in_parts_between_which_others_are_answered() -> None:
    served, long = engine(), history(3, 300)
    served.steps.cost = dataclasses.replace(served.steps.cost, most_tokens=32)
    slow = served.ask(Rank(history=long, at_ms=NOW, user=1, items=ITEMS[:2]))
    steps = 0
    while not slow.done():
        served.rank(history(0, 0), ITEMS[:1], NOW)
        steps += 1
    assert steps >= len(HistoryTokens.of(long, 2, False)) // 32
    expected = from_scratch(VERSIONS[1], long, ITEMS[:2], np.full((2, 3), ABSENT, np.int64), NOW)
    np.testing.assert_allclose(slow.result().probabilities, expected, **TOLERANCE)
    told = slow.result().encoded
    assert told.took_ms == pytest.approx(told.waited_ms + told.encode_ms + told.score_ms)
    assert told.encode_ms > told.score_ms > 0, "it took many steps to encode, and one to score"


def test_a_request_whose_time_is_over_costs_no_work_and_one_cancelled_neither() -> None:
    served, past = engine(), history(1, 30)
    late = served.ask(Rank(history=past, at_ms=NOW, items=ITEMS, deadline=time.monotonic() - 1))
    gone = served.ask(Rank(history=past, at_ms=NOW, items=ITEMS))
    gone.cancel()
    served.rank(history(0, 0), ITEMS[:1], NOW)
    with pytest.raises(DeadlineExceeded):
        late.result(timeout=0)
    counts = served.counts()
    assert (counts.expired, counts.encoded_tokens, counts.candidates, counts.waiting) == (1, 0, 1, 0)


def test_an_engine_with_a_thread_answers_many_threads_and_ends_what_it_holds_when_closed() -> None:
    served, failures = engine(micro_batch=7, cache_bytes=20 * PAGE_BYTES, max_version_age_s=0.05), []
    served.start()
    none = np.full((4, 3), ABSENT, np.int64)
    pasts = {user: history(user, 6 + 11 * user) for user in range(4)}
    expected = {
        (user, n): from_scratch(v, past, ITEMS[:4], none, NOW)
        for user, past in pasts.items()
        for n, v in VERSIONS.items()
    }
    done = threading.Event()

    def ask(seed: int) -> None:
        draw = np.random.default_rng(seed)
        while not done.is_set():
            user = int(draw.integers(4))
            ranked = served.rank(pasts[user], ITEMS[:4], NOW, user=user)
            if not np.allclose(ranked.probabilities, expected[user, ranked.version], **TOLERANCE):
                failures.append((user, ranked.version))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for i in range(20):
        time.sleep(0.03)
        served.swap(VERSIONS[i % 3 + 1])
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    assert served.is_alive()
    assert served.counts().requests > 40
    served.close()
    assert not served.is_alive()
    with pytest.raises(EngineStopped):
        served.rank(pasts[1], ITEMS[:1], NOW)


def test_after_a_swap_a_cached_user_stays_until_rebuilt_the_hottest_first() -> None:
    served = engine(max_version_age_s=1000)
    pasts = {user: history(user, 20) for user in range(3)}

    def ask(user: int) -> tuple[int, Reuse]:
        ranked = served.rank(pasts[user], ITEMS[:2], NOW, user=user)
        none = np.full((2, 3), ABSENT, np.int64)
        expected = from_scratch(VERSIONS[ranked.version], pasts[user], ITEMS[:2], none, NOW)
        np.testing.assert_allclose(ranked.probabilities, expected, **TOLERANCE)
        return ranked.version, ranked.reuse

    for user in (0, 1, 1, 1, 2, 2):
        ask(user)
    served.swap(VERSIONS[3])
    assert [ask(user) for user in range(3)] == [(1, Reuse.HIT)] * 3
    assert served.rank(history(9, 4), ITEMS[:1], NOW, user=9).version == 3, "nothing of it was cached"
    assert served.rebuild()
    assert [ask(user)[0] for user in range(3)] == [1, 3, 1]
    assert served.rebuild()
    assert [ask(user) for user in range(3)] == [(1, Reuse.HIT), (3, Reuse.HIT), (3, Reuse.HIT)]
    assert served.rebuild()
    assert not served.rebuild()
    assert [ask(user) for user in range(3)] == [(3, Reuse.HIT)] * 3
    assert served.manifest is not None
    assert served.manifest.number == 3


def test_a_history_that_a_request_brought_takes_no_place_of_the_users_own() -> None:
    served = engine(max_version_age_s=1000)
    own, other = history(1, 20), history(2, 20)  # a full page, and one that is not

    def ask(past: History, brought: bool) -> Ranked:
        asked = Rank(history=past, at_ms=NOW, user=1, brought=brought, items=ITEMS[:2])
        ranked: Ranked = served._wait(served.ask(asked))
        return ranked

    ask(own, False)
    assert ask(other, True).reuse is Reuse.MISS
    assert ask(own, False).reuse is Reuse.HIT, "its unfilled last page is still there"
    assert ask(other, True).reuse is Reuse.EXTEND, "of the other's, the full page is"
    served.swap(VERSIONS[3])
    assert served.rebuild()
    assert not served.rebuild(), "the user's own history alone is worth encoding anew"
    assert ask(own, False).reuse is Reuse.HIT


def test_two_versions_side_by_side_share_users_by_a_hash_and_each_answer_says_its_arm() -> None:
    served, past = engine(max_version_age_s=1000), history(1, 20)
    expected = {
        n: from_scratch(VERSIONS[n], past, ITEMS[:2], np.full((2, 3), ABSENT, np.int64), NOW)
        for n in (1, 2, 3)
    }

    def arms(count: int = 200) -> dict[int, tuple[str | None, int]]:
        found = {}
        for user in range(count):
            ranked = served.rank(past, ITEMS[:2], NOW, user=user)
            np.testing.assert_allclose(ranked.probabilities, expected[ranked.version], **TOLERANCE)
            found[user] = (ranked.arm, ranked.version)
        return found

    assert set(arms(5).values()) == {(None, 1)}
    served.serve_beside(VERSIONS[3], 0.25)
    assert served.beside == (3, 0.25)
    split = arms()
    assert set(split.values()) == {("a", 1), ("b", 3)}
    assert 25 < sum(arm == "b" for arm, _ in split.values()) < 75
    assert served.rank(past, ITEMS[:2], NOW).arm == "a", "whoever is not known"
    served.announce(catalogue((35, 0, True)))
    for user in range(20):
        found = served.retrieve(past, 50, NOW, user=user)
        assert (found.arm, found.version) == split[user]
        assert int(keys_of_ints(Namespace.ITEM, np.array([35]))[0]) in found.items
    served.swap(VERSIONS[2])
    while served.rebuild():
        pass
    assert {user: arm for user, (arm, _) in arms().items()} == {user: arm for user, (arm, _) in split.items()}
    assert {version for arm, version in arms().values() if arm == "a"} == {2}
    served.serve_beside(VERSIONS[1], 0.25)
    other = arms()
    assert {u for u, (arm, _) in other.items() if arm == "b"} != {
        u for u, (arm, _) in split.items() if arm == "b"
    }
    served.serve_beside(None)
    assert served.beside is None
    assert set(arms().values()) == {(None, 2)}
    deeper = version(9, model=MODEL.model_copy(update={"layers": 3}))
    with pytest.raises(UnusableWeights, match="layers differ"):
        served.serve_beside(deeper, 0.5)


def test_users_are_remembered_within_a_budget_and_those_forgotten_go_to_the_newest_version() -> None:
    served = engine(cache_bytes=40_000, max_version_age_s=1000)
    pasts = {user: history(user, 20) for user in range(3)}
    for user, past in pasts.items():
        served.rank(past, ITEMS[:1], NOW, user=user)
    assert 0 < served.steps.versions.nbytes <= 5_000
    served.swap(VERSIONS[3])
    versions = [served.rank(pasts[user], ITEMS[:1], NOW, user=user).version for user in (2, 1, 0)]
    assert versions == [1, 1, 3]


def test_a_version_that_is_too_old_serves_nobody() -> None:
    served, past = engine(max_version_age_s=0.2), history(1, 20)
    served.rank(past, ITEMS[:1], NOW, user=1)
    served.swap(VERSIONS[3])
    assert served.rank(past, ITEMS[:1], NOW, user=1).version == 1
    time.sleep(0.25)
    ranked = served.rank(past, ITEMS[:1], NOW, user=1)
    assert (ranked.version, ranked.reuse) == (3, Reuse.MISS)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_smaller_pages_round_within_a_bound(dtype: str, bound: float) -> None:
    past, (items, features) = history(5, 60), ragged(5, 12)
    served = engine(page_dtype=dtype)
    served.rank(cut(past, slice(40)), items[:1], NOW, user=1)
    ranked = served.rank(past, items, NOW, features=features, user=1)
    assert ranked.reuse is Reuse.EXTEND
    expected = from_scratch(VERSIONS[1], past, items, features, NOW)
    error = np.abs(ranked.probabilities - expected).max()
    assert 1e-6 < error < bound
    assert served.steps.cache is not None
    assert engine().steps.cache.nbytes == 0


def test_a_history_s_tokens_are_those_of_training() -> None:
    for number in (1, 2):
        held, past = VERSIONS[number], history(number, 25)
        served = build(held, torch.device("cpu"), None, None)
        tokens = HistoryTokens.of(past, 2, served.interleaved)
        own = memory_tokens([tokens.content], served.table)
        plain = plain_tokens(held, past, past.features[-1, :2], NOW, np.full(2, ABSENT, np.int64))
        for name in ("memory_lengths", "memory_vectors", "memory_kinds", "memory_actions"):
            torch.testing.assert_close(getattr(own, name), getattr(plain, name), rtol=0, atol=1e-6)
        assert torch.equal(own.memory_times + tokens.begin_ms, plain.memory_times)


@pytest.mark.parametrize("n", [0, 9])
def test_retrieval_is_exact_and_ranks_items_alone(n: int) -> None:
    past, served = history(4, n), engine()
    everything = served.retrieve(past, 1000, NOW)
    assert sorted(everything.items.tolist()) == sorted(ITEMS[:30].tolist())
    assert (np.diff(everything.scores) <= 0).all()
    assert everything.names == {int(ITEMS[0]): "zero"}
    assert everything.version == 1
    few = served.retrieve(past, 4, NOW, exclude=everything.items[[0, 2]])
    np.testing.assert_array_equal(few.items, everything.items[[1, 3, 4, 5]])
    assert len(served.retrieve(past, 5, NOW, exclude=ITEMS).items) == 0


@pytest.mark.parametrize("number", [1, 2])
def test_retrieval_scores_are_newest_and_request_token_against_item_vectors(number: int) -> None:
    past, held, context = history(4, 9), VERSIONS[number], PLACES[1:3]
    scores = nearest(held, past, context, NOW)
    found = engine(number).retrieve(past, 30, NOW, context=context)
    by_key = dict(zip(found.items.tolist(), found.scores.tolist(), strict=True))
    np.testing.assert_allclose([by_key[k] for k in scores], list(scores.values()), **TOLERANCE)
    for other in (
        engine(number).retrieve(past, 30, NOW + 86_400_000, context=context),
        engine(number).retrieve(past, 30, NOW),
    ):
        assert not np.allclose(other.scores, found.scores, **TOLERANCE), "time and context count"
    with pytest.raises(WrongFeatures, match="expected 2 features of context, got 1"):
        engine(number).retrieve(past, 30, NOW, context=context[:1])


def test_a_version_s_prior_is_added_to_the_scores_of_its_items_and_to_no_probability() -> None:
    past, plain = history(4, 9), VERSIONS[1]
    prior = np.random.default_rng(0).normal(size=len(plain.weights.keys)).astype(np.float32)
    dense = {**plain.weights.dense, PRIOR: prior}
    served = engine()
    before, ranked = served.retrieve(past, 30, NOW), served.rank(past, ITEMS[:5], NOW)
    served.swap(WeightsVersion(plain.manifest, dataclasses.replace(plain.weights, dense=dense)))
    after = served.retrieve(past, 30, NOW)
    scores = dict(zip(before.items.tolist(), before.scores.tolist(), strict=True))
    of_item = dict(zip(plain.weights.keys.tolist(), prior.tolist(), strict=True))
    expected = [scores[key] + of_item[key] for key in after.items.tolist()]
    np.testing.assert_allclose(after.scores, expected, **TOLERANCE)
    assert (np.diff(after.scores) <= 0).all()
    np.testing.assert_array_equal(served.rank(past, ITEMS[:5], NOW).probabilities, ranked.probabilities)


GENRES = [ABSENT, int(PLACES[1])]


def catalogue(*records: tuple[int, int, bool]) -> Catalogue:
    """Items by their number, each with a genre by its index and whether it is to be had."""
    fold = CatalogueFold(1)
    keys = keys_of_ints(Namespace.ITEM, np.array([number for number, _, _ in records]))
    features = np.array([[GENRES[genre]] for _, genre, _ in records])
    available = np.array([there for _, _, there in records])
    fold.take(ItemBatch(0, keys, features, available, np.arange(len(records)), {int(keys[-1]): "last"}))
    return fold.catalogue()


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_a_withdrawn_item_is_never_retrieved_and_an_announced_one_is_by_its_features(index: str) -> None:
    past, held = history(4, 9), VERSIONS[1]
    served = engine(index=index)
    before = served.retrieve(past, 50, NOW)
    assert len(before.items) == 30
    gone = [int(before.items[0]), int(before.items[7])]
    new = keys_of_ints(Namespace.ITEM, np.array([35, 36]))
    numbers = ints_of_keys(Namespace.ITEM, np.array(gone)).tolist()
    served.announce(
        catalogue(*((n, 0, False) for n in numbers), (35, 0, True), (37, 1, False), (36, 1, True))
    )
    after = served.retrieve(past, 50, NOW)
    assert set(after.items.tolist()) == set(before.items.tolist()) - set(gone) | set(new.tolist())
    assert (np.diff(after.scores) <= 0).all()
    assert after.names[int(new[1])] == "last"
    scores = dict(zip(after.items.tolist(), after.scores.tolist(), strict=True))
    was = dict(zip(before.items.tolist(), before.scores.tolist(), strict=True))
    kept = [key for key in was if key in scores]
    np.testing.assert_allclose([scores[k] for k in kept], [was[k] for k in kept], **TOLERANCE)
    # Nearer to the user when the user's vector is the item's own: its features are in it.
    own = build(held, torch.device("cpu"), None, None).announced_vectors(
        new, np.array([[ABSENT], [GENRES[1]]])
    )
    plain, _ = build(held, torch.device("cpu"), None, None).table.vectors(new)
    expected = torch.nn.functional.normalize(plain[0], dim=-1)
    np.testing.assert_allclose(own[0], expected, **TOLERANCE)
    assert not np.allclose(own[1], torch.nn.functional.normalize(plain[1], dim=-1), atol=1e-3)
    few = served.retrieve(past, 50, NOW, exclude=new[:1], allow=np.array([*new.tolist(), kept[0], gone[0]]))
    assert set(few.items.tolist()) == {int(new[1]), kept[0]}
    served.swap(VERSIONS[3])
    assert set(served.retrieve(past, 50, NOW).items.tolist()) == set(after.items.tolist())
    found = served.recommend(Recommend(history=past, at_ms=NOW, k=40, weights=(("click", 1.0),)))
    assert set(found.items.tolist()) == set(after.items.tolist())
    features = np.full((len(found.items), 3), ABSENT, np.int64)
    features[found.items == new[1], 2] = GENRES[1]
    expected = from_scratch(VERSIONS[3], past, found.items, features, NOW)
    np.testing.assert_allclose(found.probabilities, expected, **TOLERANCE)
    served.announce(catalogue((35, 0, False), *((n, 0, True) for n in numbers)))
    assert set(served.retrieve(past, 50, NOW).items.tolist()) == set(before.items.tolist())


def test_before_the_first_version_an_engine_says_that_it_is_not_ready() -> None:
    with pytest.raises(EngineNotReady, match="publish"):
        engine(None).rank(history(0, 2), ITEMS[:1], NOW)
    with pytest.raises(EngineNotReady, match="publish"):
        engine(None).retrieve(history(0, 2), 1, NOW)
    assert engine(None).manifest is None


def test_a_version_with_a_nan_or_of_another_shape_is_refused_and_the_old_one_goes_on() -> None:
    served, good = engine(), VERSIONS[2]
    poisoned = {**good.weights.dense, "start": np.full(MODEL.dim, np.nan, np.float32)}
    renamed = {("x" + name): array for name, array in good.weights.dense.items()}
    rows = good.weights.rows.copy()
    rows[3, 4] = np.inf
    for changes, word in [
        ({"dense": poisoned}, "start"),
        ({"rows": rows}, "rows"),
        ({"dense": renamed}, "recipe"),
        ({"rows": good.weights.rows[:, :5]}, "recipe"),
        ({"dense": {**good.weights.dense, PRIOR: np.zeros(3, np.float32)}}, r"prior is of shape \(3,\)"),
    ]:
        with pytest.raises(UnusableWeights, match=word):
            served.swap(WeightsVersion(good.manifest, dataclasses.replace(good.weights, **changes)))
    assert served.rank(history(1, 3), ITEMS[:2], NOW).version == 1


def test_a_score_that_overflows_is_an_error_and_no_answer() -> None:
    good = VERSIONS[1]
    huge = {**good.weights.dense, "ranking.3.bias": np.array([3e38, 0], np.float32)}
    huge["ranking.3.weight"] = np.full_like(good.weights.dense["ranking.3.weight"], 3e38)
    served = engine(None)
    served.swap(WeightsVersion(good.manifest, dataclasses.replace(good.weights, dense=huge)))
    with pytest.raises(NonFiniteScores, match="version 1"):
        served.rank(history(1, 3), ITEMS[:9], NOW)


def test_features_other_than_those_trained_with_are_refused() -> None:
    two = dataclasses.replace(history(1, 3), features=np.full((3, 2), ABSENT, np.int64))
    with pytest.raises(WrongFeatures, match=r"context\.place"):
        engine().rank(two, ITEMS[:1], NOW)
    with pytest.raises(WrongFeatures, match=r"context\.place"):
        engine().rank(history(1, 3), ITEMS[:2], NOW, features=np.full((1, 3), ABSENT, np.int64))


def test_candidates_of_one_request_share_its_context() -> None:
    features = np.full((2, 3), ABSENT, np.int64)
    features[1, 1] = PLACES[0]
    with pytest.raises(WrongFeatures, match="the same for all candidates"):
        engine().rank(history(1, 3), ITEMS[:2], NOW, features=features)


def test_requests_during_swaps_are_each_answered_by_one_version() -> None:
    served, past = engine(1), history(2, 8)
    expected = {
        n: from_scratch(v, past, ITEMS[:4], np.full((4, 3), ABSENT, np.int64), NOW)
        for n, v in VERSIONS.items()
    }
    done, seen = threading.Event(), set()

    def swap() -> None:
        for i in range(60):
            served.swap(VERSIONS[i % 3 + 1])
        done.set()

    swapper = threading.Thread(target=swap)
    swapper.start()
    while not done.is_set():
        ranked = served.rank(past, ITEMS[:4], NOW, user=1)
        np.testing.assert_allclose(ranked.probabilities, expected[ranked.version], **TOLERANCE)
        seen.add(ranked.version)
    swapper.join()
    assert len(seen) > 1


def test_a_scorer_can_be_built_from_a_published_version_alone(tmp_path: pathlib.Path) -> None:
    WeightStore(tmp_path).publish(
        VERSIONS[3].weights, RECIPE, step=1, positions={0: [(0, 5)]}, newest_event_ms=9
    )
    loaded = WeightStore(tmp_path).instead_of(0)
    assert loaded is not None
    served = engine(None)
    served.swap(loaded)
    past, (items, features) = history(5, 7), ragged(5, 6)
    ranked = served.rank(past, items, NOW, features=features)
    np.testing.assert_allclose(
        ranked.probabilities, from_scratch(VERSIONS[3], past, items, features, NOW), **TOLERANCE
    )


# -- while trainer and server do not know the same names ----------------------------------------------------

OWN = Schema.of(RECIPE)
LATER = Schema(
    ("click", "like", "buy"), ("context.app", "context.place", "context.device", "item.brand", "item.genre")
)
EARLIER = Schema(("click",), ("context.device", "item.genre"))


def asked_with(schema: Schema, seed: int) -> tuple[History, Keys, Keys]:
    """A history and candidates in the columns of a schema, with all of its actions."""
    draw = np.random.default_rng(seed)
    past, (items, _) = history(seed, 12), ragged(seed, 6)
    past = dataclasses.replace(
        past,
        actions=draw.integers(0, 1 << len(schema.actions), 12).astype(np.int32),
        features=draw.choice([ABSENT, *PLACES], (12, len(schema.features))),
    )
    features = draw.choice([ABSENT, *PLACES], (6, len(schema.features)))
    features[:, : schema.contexts] = features[:1, : schema.contexts]
    return past, items, features


@pytest.mark.parametrize("given", [EARLIER, LATER])
@pytest.mark.parametrize("number", [1, 2])
def test_a_version_is_asked_by_name_and_what_it_does_not_know_has_no_part_in_its_answers(
    given: Schema, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked, plain = Engine(ServeConfig(), schema=given), engine(number)
    asked.swap(VERSIONS[number])
    asked.swap(VERSIONS[number])
    (said,) = caplog.messages
    assert str(given) in said
    assert str(OWN) in said
    columns = OWN.columns_in(given)
    for seed in range(3):
        past, items, features = asked_with(given, seed)
        known = dataclasses.replace(
            past, actions=past.actions & 0b11, features=placed(past.features, columns)
        )
        expected = plain.rank(known, items, NOW, features=placed(features, columns))
        ranked = asked.rank(past, items, NOW, features=features, user=seed)
        assert ranked.actions == OWN.actions
        np.testing.assert_allclose(ranked.probabilities, expected.probabilities, **TOLERANCE)
        context = features[0, : given.contexts]
        found = asked.retrieve(past, 5, NOW, context=context, user=seed)
        assert found.reuse is Reuse.HIT
        expected_nearest = plain.retrieve(known, 5, NOW, context=placed(context[None], columns[:2])[0])
        np.testing.assert_array_equal(found.items, expected_nearest.items)
        np.testing.assert_allclose(found.scores, expected_nearest.scores, **TOLERANCE)
    with pytest.raises(WrongFeatures, match=f"expected {len(given.features)} columns"):
        asked.rank(known, items, NOW)


@pytest.mark.parametrize(
    "given",
    [
        Schema(("like", "click"), OWN.features),
        Schema(("click", "buy"), OWN.features),
        Schema(OWN.actions, ("context.device", "context.place", "item.genre")),
        Schema(OWN.actions, ("context.place", "context.device", "item.brand")),
        Schema(("click", "like", "buy"), ("item.genre",)),
    ],
)
def test_a_version_whose_bits_and_columns_mean_something_else_is_not_served(given: Schema) -> None:
    made = Engine(ServeConfig(), schema=given)
    with pytest.raises(
        UnusableWeights, match=r"version 1 was trained with other actions or features.*events"
    ):
        made.swap(VERSIONS[1])
    assert made.manifest is None
