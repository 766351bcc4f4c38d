"""A learner goes on under a schema that has grown: what it knew stays, what is new begins."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from grstream import config as configs
from grstream.dlrm import DLRMLearner
from grstream.keys import ABSENT, feature_namespace, keys_of_ints
from grstream.learner import Learner
from grstream.microbatch import MicroBatch, Role
from grstream.schema import Schema, SchemaChanged, placed
from tests.grstream.micro_batches import random_batches
from tests.grstream.old_checkpoints import hold_vocabulary_whole

OLD = {"actions": ["seen", "liked"], "context": ["place"], "item_features": ["genre"]}
NEW = {
    "actions": ["seen", "liked", "bought"],
    "context": ["device", "place"],
    "item_features": ["brand", "genre"],
}
KINDS: dict[str, dict[str, Any]] = {
    "fused": {},
    "interleaved": {"layout": "interleaved"},
    "transformer": {"encoder": "transformer", "absolute_positions": 8},
    "dlrm": {},
}


def config(events: dict[str, Any], kind: str = "fused", **model: Any) -> configs.Config:
    events = {**events, "context": []} if kind == "dlrm" else events
    return configs.parse(
        {
            "storage": "unused",
            "events": events,
            "model": {"layers": 2, "dim": 8, "heads": 2, **KINDS[kind], **model},
            "train": {"negatives": 8, "learning_rate": 3e-3},
        }
    )


def learner(events: dict[str, Any], kind: str = "fused", **model: Any) -> Learner:
    return (DLRMLearner if kind == "dlrm" else Learner)(config(events, kind, **model))


def stream(seed: int, count: int, of: Learner) -> list[MicroBatch]:
    """Micro-batches with a few values of each feature, and every action of the learner's configuration."""
    draw = np.random.default_rng(seed)
    names, out = of.config.events.features, []
    for batch in random_batches(seed, count):
        columns = [
            np.where(
                draw.random(len(batch.items)) < 0.7,
                keys_of_ints(feature_namespace(name), draw.integers(0, 3, len(batch.items))),
                ABSENT,
            )
            for name in names
        ]
        bought = (batch.actions & 2) << 1 if "bought" in of.config.events.actions else 0
        actions = batch.actions | bought
        out.append(
            dataclasses.replace(
                batch,
                features=np.stack(columns, axis=1),
                actions=actions,
                labels=actions[batch.roles != Role.CONTEXT],
            )
        )
    return out


def seen_by(batch: MicroBatch, old: Learner, new: Learner) -> MicroBatch:
    """The same events where the features of `new` are configured."""
    columns = Schema.of(new.config.events).columns_in(Schema.of(old.config.events))
    return dataclasses.replace(batch, features=placed(batch.features, columns))


Saved = Callable[..., tuple[Learner, pathlib.Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A learner of the old schema after a few steps, and the directory that it was saved into."""

    @functools.cache
    def made(kind: str = "fused") -> tuple[Learner, pathlib.Path]:
        old, directory = learner(OLD, kind), tmp_path_factory.mktemp(kind)
        for batch in stream(0, 6, old):
            old.step(batch)
        old.state().save(directory)
        return old, directory

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_stays_and_what_is_new_is_as_in_a_new_model(saved: Saved, kind: str) -> None:
    (old, directory), new, unlearned = saved(kind), learner(NEW, kind), learner(NEW, kind)
    migrated = new.load(directory)
    assert [line.split(" is new")[0] for line in migrated] == [
        "action bought",
        *(["feature context.device"] if kind != "dlrm" else []),
        "feature item.brand",
    ]
    was, now, fresh = old.weights(), new.weights(), unlearned.weights()
    grown = []
    for name, array in now.dense.items():
        assert np.array_equal(array[: len(was.dense[name])], was.dense[name]), name
        if len(array) > len(was.dense[name]):
            grown.append(name)
            assert np.array_equal(array[2:], fresh.dense[name][2:]), name
    assert len(grown) == 3, "embeddings of actions, and the ranking head's weight and bias"
    assert (now.keys.tobytes(), now.rows.tobytes()) == (was.keys.tobytes(), was.rows.tobytes())
    moments = [of._optimizer.state_dict()["state"] for of in (old, new)]
    assert moments[0].keys() == moments[1].keys()
    for at, held in moments[0].items():
        for name, tensor in held.items():
            after = moments[1][at][name]
            assert torch.equal(after[: len(tensor)] if tensor.ndim else after, tensor)
            assert not tensor.ndim or not after[len(tensor) :].any()
    assert new.steps == old.steps


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_the_old_actions_is_what_would_have_been_said(saved: Saved, kind: str) -> None:
    (old, directory), new = saved(kind), learner(NEW, kind)
    new.load(directory)
    for batch in stream(1, 3, old):
        was, now = old.predict(batch), new.predict(seen_by(batch, old, new))
        # The sums are the same; a product of another shape may round them in another order.
        np.testing.assert_array_max_ulp(now.probabilities[:, :2], was.probabilities, 4)
        assert np.array_equal(now.ranks, was.ranks)
        assert np.isfinite(now.probabilities).all()


def test_training_goes_on_and_learns_the_new_action_and_features(saved: Saved) -> None:
    _, directory = saved()
    new = learner(NEW)
    new.load(directory)
    assert "ne/bought" not in new.metrics.figures()
    before = new.metrics.figures()
    batches = stream(1, 150, new)
    said = [new.step(batch).predictions for batch in batches]
    late = np.concatenate([p.probabilities[:, 2] for p in said[-30:]])
    labels = np.concatenate([p.labels[:, 2] for p in said[-30:]])
    assert late[labels].mean() > 0.8
    assert late[~labels].mean() < 0.2
    figures = new.metrics.figures()
    assert figures["events"] == before["events"] + sum(map(len, said))
    assert figures["ne_total/bought"] < 1
    assert figures["ne_total/liked"] < before["ne_total/liked"]
    assert 0.8 < figures["calibration/bought"] < 1.25
    device = keys_of_ints(feature_namespace("context.device"), np.arange(3))
    assert (new.vocabulary.lookup(device) >= 0).all()


def test_a_migrated_learner_saved_and_loaded_is_the_same_and_needs_no_migration(
    saved: Saved, tmp_path: pathlib.Path
) -> None:
    old, directory = saved()
    new, again = learner(NEW), learner(NEW)
    new.load(directory)
    first, *rest = stream(1, 4, new)
    new.step(first)
    new.state().save(tmp_path)
    assert again.load(tmp_path) == []
    for batch in rest:
        one, other = new.step(batch).predictions, again.step(batch).predictions
        assert np.array_equal(one.probabilities, other.probabilities)
    assert new.metrics.figures() == pytest.approx(again.metrics.figures(), nan_ok=True)
    assert new.metrics.state()["before"] == again.metrics.state()["before"] == [0, 0, old.metrics.events]


def test_loading_does_not_move_the_random_numbers_to_come(saved: Saved) -> None:
    _, directory = saved()
    new = learner(NEW)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    new.load(directory)
    assert torch.equal(torch.rand(3), expected)


def test_a_learner_that_has_not_taken_a_step_can_grow(tmp_path: pathlib.Path) -> None:
    learner(OLD).state().save(tmp_path)
    new = learner(NEW)
    new.load(tmp_path)
    new.step(stream(1, 1, new)[0])


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ({"actions": ["seen", "bought"]}, "events.actions lacks liked"),
        ({"actions": ["seen"]}, "events.actions lacks liked"),
        ({"actions": ["liked", "seen"]}, "does not begin with seen, liked"),
        ({"actions": ["bought", "seen", "liked"]}, "does not begin with seen, liked"),
        ({"context": []}, "lacks the features context.place"),
        ({"item_features": ["kind"]}, "lacks the features item.genre"),
        ({"context": ["place", "genre"], "item_features": []}, "lacks the features item.genre"),
    ],
)
def test_what_was_learned_is_not_given_to_another_name(
    saved: Saved, events: dict[str, Any], reason: str
) -> None:
    other = learner({**OLD, **events})
    before = other.weights().dense
    with pytest.raises(SchemaChanged, match=f"{reason}.*go back to what it was.*another `storage`"):
        other.load(saved()[1])
    assert other.steps == 0
    assert all(np.array_equal(before[name], array) for name, array in other.weights().dense.items())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"dim": 16}, "model.dim was 8 and is 16"),
        ({"layers": 3}, "model.layers was 2 and is 3"),
        ({"layout": "interleaved"}, "model.layout was fused and is interleaved"),
        ({"attention": "softmax", "time_bias": False}, "model.attention was None.*model.time_bias was True"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_words(
    saved: Saved, model: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SchemaChanged, match=f"{reason}.*another `storage`"):
        learner(OLD, **model).load(saved()[1])


def test_dropout_and_the_type_of_numbers_may_change(saved: Saved) -> None:
    old, directory = saved()
    other = learner(OLD, dropout=0.1, dtype="bfloat16")
    assert other.load(directory) == []
    assert all(np.array_equal(a, other.weights().dense[name]) for name, a in old.weights().dense.items())


PLAIN = {"actions": ["seen", "liked"]}


def without_names(directory: pathlib.Path, events: dict[str, Any]) -> None:
    """A checkpoint as it was written before checkpoints named anything."""
    old = learner(events)
    for batch in stream(0, 2, old) if events != PLAIN else random_batches(0, 2):
        old.step(batch)
    old.state().save(directory)
    hold_vocabulary_whole(directory)
    state = torch.load(directory / "learner.pt", weights_only=True)
    del state["recipe"], state["metrics"]["before"]
    torch.save(state, directory / "learner.pt")


def test_a_checkpoint_without_names_goes_on_where_there_are_as_many_actions(tmp_path: pathlib.Path) -> None:
    without_names(tmp_path, PLAIN)
    new = learner(PLAIN)
    assert new.load(tmp_path) == ["it names no actions: its 2 are taken to be seen, liked"]
    assert new.steps == 2
    new.step(random_batches(0, 3)[2])


@pytest.mark.parametrize(
    ("saved", "configured"),
    [(PLAIN, {"actions": ["seen", "liked", "bought"]}), (PLAIN, OLD), (OLD, OLD), (OLD, PLAIN)],
)
def test_a_checkpoint_without_names_is_refused_otherwise(
    tmp_path: pathlib.Path, saved: dict[str, Any], configured: dict[str, Any]
) -> None:
    without_names(tmp_path, saved)
    with pytest.raises(SchemaChanged, match=r"before checkpoints named actions.*another `storage`"):
        learner(configured).load(tmp_path)


def test_a_checkpoint_without_names_of_another_model_is_refused_in_words(tmp_path: pathlib.Path) -> None:
    without_names(tmp_path, PLAIN)
    with pytest.raises(SchemaChanged, match=r"actions was of shape \(2, 8\) and is of \(2, 16\)"):
        learner(PLAIN, dim=16).load(tmp_path)
