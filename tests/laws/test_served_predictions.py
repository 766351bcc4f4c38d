"""Law 6: an event is predicted, before it is learned from, by the model as it would serve."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream import config
from grstream.engine import Engine
from grstream.events import EventBatch
from grstream.histories import RollingHistories
from grstream.keys import Namespace, keys_of_ints
from grstream.learner import Learner
from grstream.weights import Manifest, Recipe, WeightsVersion

CONFIGS = {
    layout: config.parse(
        {
            "storage": "unused",
            "events": {"actions": ["seen", "liked"], "context": ["place"], "item_features": ["genre"]},
            "histories": {"window": 6, "chunk": 2, "lateness_ms": 2_000},
            "model": {"layers": 2, "dim": 8, "heads": 2, "layout": layout, **model},
            "train": {"negatives": 4, "learning_rate": 0.01, **train},
        }
    )
    for layout, model, train in (
        ("fused", {"dropout": 0.3, "popularity_days": [0.0001]}, {}),
        (
            "interleaved",
            {"popularity_days": [0.00001, 1]},
            {"stochastic_length": 1.2, "full_softmax_items": 50},
        ),
    )
}


def stream(seed: int, events: int) -> EventBatch:
    """Few users, so that windows roll within a micro-batch; times collide, and some come late."""
    draw = np.random.default_rng(seed)
    times = 1_000_000 + np.cumsum(draw.integers(0, 800, events))
    late = draw.random(events) < 0.15
    return EventBatch(
        partition=0,
        offsets=np.arange(events),
        users=keys_of_ints(Namespace.USER, draw.integers(0, 3, events)),
        items=keys_of_ints(Namespace.ITEM, draw.integers(0, 9, events)),
        actions=draw.integers(1, 4, events).astype(np.int32),
        times=np.where(late, times - draw.integers(0, 4_000, events), times),
        features=np.where(
            draw.random((events, 2)) < 0.5,
            keys_of_ints(Namespace.FEATURE, draw.integers(0, 3, (events, 2))),
            0,
        ),
        event_keys=np.zeros(events, np.int64),
        item_names={},
    )


def part(batch: EventBatch, start: int, stop: int) -> EventBatch:
    columns = ("offsets", "users", "items", "actions", "times", "features", "event_keys")
    return EventBatch(
        partition=0, item_names={}, **{name: getattr(batch, name)[start:stop] for name in columns}
    )


def served_version(learner: Learner) -> WeightsVersion:
    manifest = Manifest(
        number=learner.steps + 1,
        step=learner.steps,
        created_ms=0,
        positions={},
        newest_event_ms=0,
        recipe=Recipe.of(learner.config),
        files={},
    )
    return WeightsVersion(manifest, learner.weights())


@given(
    layout=st.sampled_from(sorted(CONFIGS)),
    seed=st.integers(0, 1_000),
    cuts=st.lists(st.integers(1, 12), min_size=3, max_size=5),
    budget=st.sampled_from([None, 5]),
)
@settings(max_examples=30)
def test_a_trainer_says_of_an_event_what_a_server_would_have_said(
    layout: str, seed: int, cuts: list[int], budget: int | None
) -> None:
    config, events = CONFIGS[layout], stream(seed, sum(cuts))
    rows = config.train.model_copy(update={"vocabulary_rows": budget})
    config = config.model_copy(update={"train": rows})
    # Each version at once: a trainer has none beside its newest.
    serving = config.serve.model_copy(update={"max_version_age_s": 0, "page_tokens": 16})
    learner, engine = Learner(config), Engine(serving)
    trainers = RollingHistories(config.histories, features=2)
    servers = RollingHistories(config.histories, features=2, track_new=False)
    at = 0
    for size in cuts:
        engine.swap(served_version(learner))
        served, found = {}, {}
        for row in range(at, at + size):
            one = part(events, row, row + 1)
            if one.times[0] >= servers.history(int(one.users[0])).times.max(initial=0):  # not late
                user, time = int(one.users[0]), int(one.times[0])
                past = servers.history(user)
                served[row] = engine.rank(
                    past, one.items, time, features=one.features, user=user
                ).probabilities[0]
                found[row] = engine.retrieve(past, 100, time, context=one.features[0, :1], user=user)
            servers.append(one)
        trainers.append(part(events, at, at + size))
        said = learner.step(trainers.pack()).predictions
        at += size
        by_offset = dict(zip(said.offsets.tolist(), said.probabilities, strict=True))
        assert len(by_offset) == size
        for row, probabilities in served.items():
            assert by_offset[row] == pytest.approx(probabilities, abs=1e-5), row
        if budget is not None:  # the step has evicted items that the server still has
            continue
        ranks = dict(zip(said.offsets.tolist(), said.ranks.tolist(), strict=True))
        for row, retrieved in found.items():
            own = retrieved.scores[retrieved.items == events.items[row]]
            if len(own) == 0:
                assert ranks[row] in (-1, len(retrieved.items)), "what no version knows cannot be found"
                continue
            better = [int((retrieved.scores > own + slack).sum()) for slack in (1e-5, -1e-5)]
            assert better[0] <= ranks[row] < better[1], row
