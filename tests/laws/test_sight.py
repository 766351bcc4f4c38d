"""Law 1: training, prefill, extending a cache and scoring are one rule of sight with different prefixes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grstream.config import ModelConfig
from grstream.model import HSTU, Cache
from grstream.pages import PagedCache
from tests.token_sequences import FP32, User, candidates, configs, crowds, encoder, events, tokens, user

CONFIG = ModelConfig(dim=12, layers=2, heads=2, v_dim=5, qk_dim=3)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def in_steps(model: HSTU, users: list[User], steps: int) -> Cache:
    """The users' cache, each history cut into this many parts that arrive one after another."""
    cache = None
    for step in range(steps):
        parts = [u.events(len(u) * step // steps, len(u) * (step + 1) // steps) for u in users]
        cache = model.extend(cache, events(parts))
    assert cache is not None
    return cache


def same(one: Cache, other: Cache) -> None:
    assert one.lengths.equal(other.lengths)
    assert one.times.equal(other.times)
    assert_close(one.newest, other.newest, **FP32)
    for mine, its in zip(one.layers, other.layers, strict=True):
        assert_close(mine, its, **FP32)


@settings(max_examples=60)
@given(st.data())
def test_prefill_then_score_equals_encoding_all_at_once(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim, least=1))
    cache = model.extend(None, events(users))
    encoded = model(tokens(users))
    assert_close(model.score(cache, candidates(users)), encoded.query, **FP32)
    newest = torch.cumsum(cache.lengths, 0) - 1
    some = cache.lengths > 0
    assert_close(cache.newest[some], encoded.memory[newest[some]], **FP32)
    assert_close(cache.newest[~some], model.start.expand(int((~some).sum()), -1))


@settings(max_examples=60)
@given(st.data())
def test_a_cache_extended_in_steps_is_the_cache_of_a_prefill(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim, least=1))
    steps = data.draw(st.integers(1, 13))  # 13 is more than the longest history: one event at a time
    same(in_steps(model, users, steps), model.extend(None, events(users)))


@settings(max_examples=40)
@given(st.data())
def test_what_comes_after_a_prefix_is_not_seen(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim, least=1))
    whole = model(tokens(users))
    rows = 0
    for u in users:
        for c in range(len(u.asked)):
            seen = int(u.prefix[c])
            cache = model.extend(None, events([u.events(0, seen)]))
            alone = model.score(cache, candidates([u.asking([c])]))
            assert_close(alone, whole.query[rows : rows + 1], **FP32)
            rows += 1


def test_everything_before_a_prefix_is_seen() -> None:
    model, asking = encoder(CONFIG), user(6, [6], CONFIG.dim)
    asking = dataclasses.replace(asking, asked=asking.times[-1:] + 86_400_000)
    score = model(tokens([asking])).query
    for event in range(6):
        other_item = asking.items.index_copy(0, torch.tensor([event]), torch.ones(1, CONFIG.dim).cumsum(1))
        other_actions = asking.actions.clone()
        other_actions[event] ^= 5
        other_time = asking.times.clone()
        other_time[event] = asking.asked[0] - 1
        for change in ({"items": other_item}, {"actions": other_actions}, {"times": other_time}):
            other = model(tokens([dataclasses.replace(asking, **change)])).query
            assert not torch.allclose(other, score, **FP32), (event, change)


def test_time_enters_through_differences_alone() -> None:
    model, then = encoder(CONFIG), user(9, [9, 4, 0], CONFIG.dim)
    later = dataclasses.replace(then, times=then.times + 10**9, asked=then.asked + 10**9)
    assert_close(model(tokens([later])).query, model(tokens([then])).query, **FP32)
    waited = dataclasses.replace(then, asked=then.times[-1] + 86_400_000 * torch.tensor([1, 100, 1]))
    cache = model.extend(None, events([then]))
    scores = model.score(cache, candidates([waited]))
    assert not torch.allclose(scores[0], model.score(cache, candidates([then]))[0], **FP32)


def test_a_window_that_is_exactly_full_and_longer_than_a_block() -> None:
    model = encoder(CONFIG)
    users = [
        user(256, [256, 255, 1, 0], CONFIG.dim),
        user(0, [0, 0], CONFIG.dim),
        user(257, [257], CONFIG.dim),
    ]
    cache = in_steps(model, users, 3)
    same(cache, model.extend(None, events(users)))
    assert_close(model.score(cache, candidates(users)), model(tokens(users)).query, **FP32)


@settings(max_examples=40)
@given(st.data())
def test_the_rows_read_out_are_those_of_the_whole(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim))
    users = [*users, user(3, [1], config.dim)]
    whole = model(tokens(users))
    rows = torch.tensor(
        data.draw(st.lists(st.integers(-1, len(whole.memory) - 1), max_size=6)), dtype=torch.int64
    )
    some = model(tokens(users), rows)
    assert_close(some.query, whole.query, **FP32)
    for row, vector in zip(rows.tolist(), some.memory, strict=True):
        assert_close(vector, whole.memory[row] if row >= 0 else model.start, **FP32)


def test_bf16_faces_agree_within_two_percent_of_a_score() -> None:
    """Stated bound of bfloat16: its 8 bits of mantissa round each projection."""
    model = encoder(CONFIG.model_copy(update={"dtype": "bfloat16"}))
    users = [user(n, [n, n // 2], CONFIG.dim) for n in (0, 3, 90, 256)]
    cache = in_steps(model, users, 4)
    assert all(array.dtype == torch.bfloat16 for layer in cache.layers for array in layer)
    encoded = model(tokens(users)).query
    assert encoded.dtype == torch.float32
    assert_close(model.score(cache, candidates(users)), encoded, atol=2e-2, rtol=2e-2)
    exact = encoder(CONFIG)(tokens(users)).query
    assert (encoded - exact).abs().mean() < 2e-2 * exact.abs().mean()


@settings(max_examples=40)
@given(st.data())
def test_a_cache_in_pages_scores_as_the_cache_itself(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim, least=1, longest=40))
    cache = model.extend(None, events(users))
    paged = PagedCache.of(cache, data.draw(st.sampled_from([16, 32])))
    assert_close(model.score(paged, candidates(users)), model.score(cache, candidates(users)), **FP32)
