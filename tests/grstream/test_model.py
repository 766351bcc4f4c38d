"""The encoder around the attention: shapes, refusals, learning, and micro-batches as tokens."""

import copy
import math

import numpy as np
import pytest
import torch

from grstream.config import ModelConfig
from grstream.microbatch import MicroBatch, Role
from grstream.model import HSTU, Cache
from grstream.tokens import fused
from tests.token_sequences import ACTIONS, FP32, candidates, encoder, events, tokens, user

CONFIG = ModelConfig(dim=12, layers=2, heads=3, qk_dim=2, v_dim=5)


def batch(lengths: list[int], roles: list[int]) -> MicroBatch:
    """A micro-batch of sequences of these lengths; events are numbered through items, actions and times."""
    total, new = sum(lengths), sum(role != Role.CONTEXT for role in roles)
    columns = {
        "users": np.arange(len(lengths), dtype=np.int64),
        "lengths": np.array(lengths, np.int32),
        "items": np.arange(total, dtype=np.int64) + 100,
        "actions": np.arange(total, dtype=np.int32) % 2**ACTIONS,
        "times": np.arange(total, dtype=np.int64) * 1_000,
        "features": np.empty((total, 0), np.int64),
        "roles": np.array(roles, np.uint8),
        "partitions": np.zeros(new, np.int32),
        "offsets": np.arange(new, dtype=np.int64),
    }
    for column in columns.values():
        column.flags.writeable = False  # as Arrow hands them over
    return MicroBatch(**columns, ranges=(), item_names={}, newest_event_ms=0, read_ms=0)


def test_each_new_event_is_asked_before_its_actions_are_known() -> None:
    c, n, late = Role.CONTEXT, Role.NEW, Role.NEW_LATE
    vectors = torch.randn(7, 12, requires_grad=True)
    packed, new = fused(batch([3, 0, 1, 3], [c, c, n, n, late, c, n]), vectors)
    assert packed.memory_lengths.tolist() == [3, 0, 1, 3]
    assert packed.query_lengths.tolist() == [1, 0, 1, 2]
    assert packed.query_prefix.tolist() == [2, 0, 0, 2]
    assert packed.query_times.tolist() == [2_000, 3_000, 4_000, 6_000]
    assert packed.memory_actions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert new.events.tolist() == [2, 3, 4, 6]
    assert new.before.tolist() == [1, -1, -1, 5]
    assert new.roles.tolist() == [n, n, late, n]
    assert packed.query_items.equal(vectors[new.events])
    packed.query_items.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad[:, 0].tolist() == [0, 0, 1, 1, 1, 0, 1]


def test_an_empty_batch_is_encoded_and_trained_on_as_nothing() -> None:
    model = encoder(CONFIG)
    for packed, new in (
        fused(MicroBatch.empty(), torch.zeros(0, 12)),
        fused(batch([0, 2], [Role.CONTEXT] * 2), torch.zeros(2, 12)),
    ):
        encoded = model(packed, new.before)
        assert encoded.memory.shape == encoded.query.shape == (0, 12)
        model.action_logits(encoded.query).sum().backward()


def test_the_actions_of_an_event_are_hidden_from_its_own_query_and_seen_by_the_next() -> None:
    model, before = encoder(CONFIG), batch([3], [Role.CONTEXT, Role.NEW, Role.NEW])
    changed = copy.copy(before.actions)
    changed[1] ^= 3
    after = MicroBatch(**{**vars(before), "actions": changed})
    vectors = torch.randn(3, 12)
    own, following = model(fused(before, vectors)[0]).query - model(fused(after, vectors)[0]).query
    assert own.abs().max() == 0
    assert following.abs().max() > 1e-3


def test_heads_have_their_shapes_and_vectors_their_unit_length() -> None:
    model = encoder(CONFIG)
    users = [user(5, [5, 2], 12), user(0, [0], 12)]
    cache = model.extend(None, events(users))
    query = model.score(cache, candidates(users))
    assert model.action_logits(query).shape == (3, ACTIONS)
    assert_unit(model.user_vectors(cache.newest), 2)
    assert_unit(model.item_vectors(torch.randn(4, 12)), 4)


def assert_unit(vectors: torch.Tensor, count: int) -> None:
    assert vectors.shape == (count, 12)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_learns(dtype: str) -> None:
    model = encoder(CONFIG.model_copy(update={"dtype": dtype}))
    users = [user(70, [70, 3], 12, "any"), user(0, [0], 12)]
    encoded = model(tokens(users), torch.tensor([69, -1]))
    loss = model.action_logits(encoded.query).square().sum()
    loss = loss + model.user_vectors(encoded.memory)[:, :3].sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_whole_model_gradients_agree_with_finite_differences() -> None:
    model = encoder(CONFIG).double()
    packed = tokens([user(4, [4, 1], 12), user(0, [0], 12)])
    items, asked = packed.memory_items.double(), packed.query_items.double()

    def loss(items: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        changed = type(packed)(**{**vars(packed), "memory_items": items, "query_items": asked})
        encoded = model(changed, torch.tensor([3, -1]))
        return model.action_logits(encoded.query).sum() + model.user_vectors(encoded.memory)[:, 0].sum()

    assert torch.autograd.gradcheck(loss, (items.requires_grad_(), asked.requires_grad_()))


def test_it_learns_which_items_follow_which() -> None:
    """Liked exactly when it repeats the item before: only attention to the history can tell."""
    torch.manual_seed(0)
    model = HSTU(ModelConfig(dim=16, layers=2, heads=2), 1)
    vectors = torch.randn(8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        items = torch.randint(0, 8, (64,)).numpy()
        items[1::2] = np.where(np.random.default_rng(0).random(32) < 0.5, items[::2], items[1::2])
        pairs = batch([2] * 32, [Role.CONTEXT, Role.NEW] * 32)
        packed, _ = fused(pairs, vectors[items])
        liked = torch.from_numpy((items[::2] == items[1::2]).astype(np.float32))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model.action_logits(model(packed).query)[:, 0], liked
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * math.log(2)


def test_dropout_is_for_training_alone() -> None:
    model, packed = encoder(CONFIG.model_copy(update={"dropout": 0.5})), tokens([user(9, [9], 12)])
    assert model(packed).query.equal(model(packed).query)
    model.train()
    assert not model(packed).query.equal(model(packed).query)


def test_empty_histories_keep_the_start_vector_until_something_happens() -> None:
    model = encoder(CONFIG)
    cache = model.empty_cache(2)
    assert cache.newest.equal(model.start.expand(2, -1))
    assert model.extend(None, events([user(0, [], 12)])).newest.equal(model.start[None])
    grown = model.extend(cache, events([user(0, [], 12), user(1, [], 12)]))
    assert grown.newest[0].equal(model.start)
    assert not grown.newest[1].equal(model.start)


def test_a_cache_of_one_user_does_not_keep_the_others_alive() -> None:
    model = encoder(CONFIG)
    alone = model.extend(None, events([user(n, [], 12) for n in (2, 50)])).split()[0]
    for array in (alone.times, alone.newest, *(a for layer in alone.layers for a in layer)):
        assert array.untyped_storage().nbytes() == array.numel() * array.element_size()


def test_what_does_not_fit_is_refused() -> None:
    model, users = encoder(CONFIG), [user(3, [3], 12), user(2, [1], 12)]
    cache = model.extend(None, events(users))
    with pytest.raises(ValueError, match="extend takes memory tokens alone"):
        model.extend(None, tokens(users))
    with pytest.raises(ValueError, match="score takes query tokens alone"):
        model.score(cache, tokens(users))
    with pytest.raises(ValueError, match="1 sequences cannot extend a cache of 2"):
        model.extend(cache, events(users[:1]))
    with pytest.raises(ValueError, match="queries of 1 sequences do not fit a cache of 2"):
        model.score(cache, candidates(users[:1]))
    with pytest.raises(ValueError, match="prefix must lie between"):
        model.score(Cache.concat(cache.split()[:1]), candidates([user(4, [4], 12)]))
    with pytest.raises(ValueError, match="no caches to join"):
        Cache.concat([])


def test_float64_is_carried_through() -> None:
    model = encoder(CONFIG).double()
    packed = tokens([user(4, [4, 1], 12)])
    wide = type(packed)(
        **{
            **vars(packed),
            "memory_items": packed.memory_items.double(),
            "query_items": packed.query_items.double(),
        }
    )
    query = model(wide).query
    assert query.dtype == torch.float64
    torch.testing.assert_close(query.float(), encoder(CONFIG)(packed).query, **FP32)
