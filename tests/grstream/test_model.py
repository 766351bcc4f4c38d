"""The encoder around the attention: shapes, refusals, learning, and micro-batches as tokens."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from grstream.config import ModelConfig
from grstream.microbatch import MicroBatch, Role
from grstream.model import HSTU, Cache
from grstream.tokens import Asked, Events, Tokens, training_tokens
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
        "labels": np.zeros(new, np.int32),
        "partitions": np.zeros(new, np.int32),
        "offsets": np.arange(new, dtype=np.int64),
    }
    for column in columns.values():
        column.flags.writeable = False  # as Arrow hands them over
    return MicroBatch(**columns, ranges=(), item_names={}, newest_event_ms=0, read_ms=0)


def fused(batch: MicroBatch, vectors: torch.Tensor, interleaved: bool = False) -> tuple[Tokens, Asked]:
    """The tokens of a micro-batch without features."""
    none = torch.empty(0, dtype=torch.int64)
    columns = (torch.tensor(getattr(batch, f), dtype=torch.int64) for f in ("lengths", "actions", "times"))
    lengths, actions, times = columns
    events = Events(lengths, vectors, actions, times, vectors[:0], none)
    return training_tokens(events, torch.tensor(np.flatnonzero(batch.roles)), interleaved)


def test_an_empty_batch_is_encoded_and_trained_on_as_nothing() -> None:
    model = encoder(CONFIG)
    for packed, new in (
        fused(MicroBatch.empty(), torch.zeros(0, 12)),
        fused(batch([0, 2], [Role.CONTEXT] * 2), torch.zeros(2, 12)),
    ):
        encoded = model(packed, new.readout)
        assert encoded.memory.shape == encoded.query.shape == (0, 12)
        model.action_logits(new.ranking(encoded)).sum().backward()


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_actions_of_an_event_are_hidden_from_its_own_query_and_seen_by_the_next(
    interleaved: bool,
) -> None:
    model, before = encoder(CONFIG), batch([3], [Role.CONTEXT, Role.NEW, Role.NEW])
    changed = copy.copy(before.actions)
    changed[1] ^= 3
    after = MicroBatch(**{**vars(before), "actions": changed})
    vectors = torch.randn(3, 12)

    def ranked(batch: MicroBatch) -> torch.Tensor:
        packed, new = fused(batch, vectors, interleaved)
        return new.ranking(model(packed, new.readout))

    own, following = ranked(before) - ranked(after)
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


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "bfloat16"},
        {"attention": "softmax", "position_bias": "exact"},
        {"encoder": "transformer", "absolute_positions": 9, "dropout": 0.1},
    ],
)
def test_every_parameter_learns(change: dict[str, object]) -> None:
    model = encoder(CONFIG.model_copy(update=change)).train()
    users = [user(70, [70, 3], 12, "any"), user(0, [0], 12)]
    kinds = torch.arange(70) % 6  # all of them, which no layout has
    users[0] = dataclasses.replace(users[0], kinds=kinds)
    encoded = model(tokens(users), torch.tensor([69, -1]))
    loss = model.action_logits(encoded.query).square().sum()
    loss = loss + model.user_vectors(encoded.memory)[:, :3].sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("encoder_name", ["hstu", "transformer"])
def test_an_encoder_without_any_bias_of_position_does_not_know_the_order(encoder_name: str) -> None:
    change = {"encoder": encoder_name, "position_bias": "none", "time_bias": False, "layers": 1}
    bare, asking = encoder(CONFIG.model_copy(update=change)), user(6, [6], 12)
    turned = dataclasses.replace(
        asking,
        **{name: getattr(asking, name).flip(0) for name in ("items", "kinds", "actions")},
    )
    torch.testing.assert_close(bare(tokens([turned])).query, bare(tokens([asking])).query, **FP32)
    for told in ({"position_bias": "exact"}, {"absolute_positions": 4}):
        model = encoder(CONFIG.model_copy(update={**change, **told}))
        one, other = model(tokens([turned])).query, model(tokens([asking])).query
        assert (one - other).abs().max() > 1e-3, told


def test_whole_model_gradients_agree_with_finite_differences() -> None:
    model = encoder(CONFIG).double()
    packed = tokens([user(4, [4, 1], 12), user(0, [0], 12)])
    items, asked = packed.memory_vectors.double(), packed.query_vectors.double()

    def loss(items: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        changed = type(packed)(**{**vars(packed), "memory_vectors": items, "query_vectors": asked})
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
        packed, new = fused(pairs, vectors[items])
        liked = torch.from_numpy((items[::2] == items[1::2]).astype(np.float32))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model.action_logits(new.ranking(model(packed, new.readout)))[:, 0], liked
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
            "memory_vectors": packed.memory_vectors.double(),
            "query_vectors": packed.query_vectors.double(),
        }
    )
    query = model(wide).query
    assert query.dtype == torch.float64
    torch.testing.assert_close(query.float(), encoder(CONFIG)(packed).query, **FP32)
