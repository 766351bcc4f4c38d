"""Law 2: who else is in the batch, its size, the candidates' order and the cache never change a score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grstream.config import ModelConfig
from grstream.model import Cache
from tests.token_sequences import FP32, candidates, configs, crowds, encoder, events, tokens, user

CONFIG = ModelConfig(dim=12, layers=2, heads=2)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@settings(max_examples=60)
@given(st.data())
def test_batch_mates_do_not_change_a_user(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim, least=2))
    order = data.draw(st.permutations(range(len(users))))
    together = model(tokens([users[s] for s in order]))
    queries = together.query.split([len(users[s].asked) for s in order])
    memory = together.memory.split([len(users[s]) for s in order])
    for place, s in enumerate(order):
        alone = model(tokens([users[s]]))
        assert_close(queries[place], alone.query, **FP32)
        assert_close(memory[place], alone.memory, **FP32)


@pytest.mark.parametrize("mate", [0, 1, 63, 200, 1024])
def test_a_mate_of_any_length_does_not_change_a_user(mate: int) -> None:
    """The longest of a batch must leave no trace: public code divides by its length."""
    model, one = encoder(CONFIG), user(40, [40, 40, 7], CONFIG.dim)
    alone = model.action_logits(model(tokens([one])).query)
    both = model.action_logits(model(tokens([one, user(mate, [mate], CONFIG.dim)])).query)
    assert_close(both[:3], alone, **FP32)


@settings(max_examples=40)
@given(st.data())
def test_neither_order_nor_micro_batches_of_candidates_change_a_score(data: st.DataObject) -> None:
    model = encoder(CONFIG)
    n, m = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 80))
    asking = user(n, [n] * m, CONFIG.dim, data.draw(st.sampled_from(["rising", "equal", "any"])))
    cache = model.extend(None, events([asking]))
    scores = model.score(cache, candidates([asking]))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(n + m))
    assert_close(model.score(cache, candidates([asking.asking(order)])), scores[order], **FP32)
    size = data.draw(st.integers(1, m))
    parts = [model.score(cache, candidates([asking.asking(part)])) for part in torch.arange(m).split(size)]
    assert_close(torch.cat(parts), scores, **FP32)


@settings(max_examples=40)
@given(st.data())
def test_caches_joined_and_split_keep_every_users_scores(data: st.DataObject) -> None:
    config = data.draw(configs())
    model, users = encoder(config), data.draw(crowds(config.dim, least=1))
    apart = [model.extend(None, events([u])) for u in users]
    joined = Cache.concat(apart)
    scores = torch.cat([model.score(c, candidates([u])) for c, u in zip(apart, users, strict=True)])
    assert_close(model.score(joined, candidates(users)), scores, **FP32)
    again = joined.split()
    assert [c.nbytes for c in again] == [c.nbytes for c in apart]
    more = [user(3, [], config.dim, seed=s) for s, _ in enumerate(users)]
    grown = model.extend(joined, events(more)).split()
    for mine, extra, cache in zip(grown, more, again, strict=True):
        alone = model.extend(cache, events([extra]))
        assert mine.times.equal(alone.times)
        assert_close(mine.newest, alone.newest, **FP32)
        for kept, its in zip(mine.layers, alone.layers, strict=True):
            assert_close(kept, its, **FP32)


def test_a_user_in_bf16_stays_within_two_percent_in_company() -> None:
    model = encoder(CONFIG.model_copy(update={"dtype": "bfloat16"}))
    one = user(40, [40, 40, 7], CONFIG.dim)
    alone = model(tokens([one])).query
    mates = [user(n, [n] * 5, CONFIG.dim) for n in (0, 300, 41, 12)]
    assert_close(model(tokens([one, *mates])).query[:3], alone, atol=2e-2, rtol=2e-2)
