"""A pass over a data set, and what weights of several ages would have said on it."""

import copy
import pathlib

import numpy as np
import pytest
import torch

from grstream.config import Config, ConfigError, parse
from grstream.dlrm import DLRMLearner
from grstream.events import ActionEvent, InvalidEvent
from grstream.learner import Learner
from grstream.one_pass import learned, micro_batches, stale


def make_config(**changes: object) -> Config:
    return parse(
        {
            "storage": "unused",
            "events": {"actions": ["view", "like"], "item_features": ["kind"]},
            "histories": {"window": 8, "chunk": 2},
            "source": {"flush_events": 16},
            "model": {"layers": 1, "dim": 8, "heads": 1},
            **changes,
        }
    )


def events(count: int, seed: int = 0) -> list[ActionEvent]:
    random = np.random.default_rng(seed)
    out = []
    for at in range(count):
        item = int(random.integers(12))
        out.append(
            ActionEvent(
                user_id=int(random.integers(5)),
                item_id=item,
                actions=["view", "like"] if item % 2 else ["view"],
                timestamp_ms=1_000_000 + 1000 * at,
                item_features={"kind": item % 3},
            )
        )
    return out


def test_every_event_is_predicted_once_in_the_stream_s_order() -> None:
    config = make_config()
    seen: list[int] = []
    said = learned(micro_batches(events(100), config), Learner(config), seen.append)
    assert said.offsets.tolist() == list(range(100))
    assert said.labels[:, 1].tolist() == ["like" in e.actions for e in events(100)]
    assert seen == [16, 32, 48, 64, 80, 96, 100]


def test_a_pass_comes_out_the_same_again() -> None:
    config = make_config()
    a, b = (learned(micro_batches(events(80), config), Learner(config)) for _ in range(2))
    assert np.array_equal(a.probabilities, b.probabilities)
    assert np.array_equal(a.ranks, b.ranks)


def test_an_event_that_the_configuration_forbids_is_an_error_that_names_it() -> None:
    wrong = [*events(3)[:2], events(1)[0].model_copy(update={"actions": ["buy"]})]
    with pytest.raises(InvalidEvent, match=r"actions: event 2: unknown action 'buy'"):
        list(micro_batches(wrong, make_config()))


def test_predicting_says_what_a_step_would_have_said_and_changes_nothing() -> None:
    config = make_config()
    learner = Learner(config)
    *before, last = micro_batches(events(100), config)
    learned(before, learner)
    weights = copy.deepcopy(learner.model.state_dict())
    keys = learner.vocabulary.state().keys
    said = learner.predict(last)
    assert all(torch.equal(weights[name], value) for name, value in learner.model.state_dict().items())
    assert np.array_equal(keys, learner.vocabulary.state().keys)
    step = learner.step(last).predictions
    np.testing.assert_allclose(said.probabilities, step.probabilities, atol=1e-6)
    assert np.array_equal(said.ranks, step.ranks)


def test_an_item_that_was_never_seen_is_predicted_from_its_initial_vector_and_ranked_last() -> None:
    config = make_config()
    learner = Learner(config)
    learned(micro_batches(events(60), config), learner)
    known = len(learner.vocabulary.item_rows())
    new = events(1)[0].model_copy(update={"item_id": 999, "item_features": {}})
    [batch] = micro_batches([new], config)
    said = learner.predict(batch)
    step = learner.step(batch).predictions
    assert said.ranks.tolist() == step.ranks.tolist() == [known]
    np.testing.assert_allclose(said.probabilities, step.probabilities, atol=1e-6)


def test_versions_of_an_age_are_those_that_were_made_so_long_ago() -> None:
    config = make_config()
    batches = list(micro_batches(events(96), config))
    said = stale(batches, Learner(config), every=32, ages=[0, 1, 2])
    fresh, learner = [], Learner(config)
    versions = [copy.deepcopy(learner)]
    for at, batch in enumerate(batches):
        fresh.append(learner.step(batch).predictions)
        if at % 2:
            versions.append(copy.deepcopy(learner))
    by_hand = {
        0: fresh,
        1: [versions[at // 2].predict(batch) for at, batch in enumerate(batches)],
        2: [versions[max(at // 2 - 1, 0)].predict(batch) for at, batch in enumerate(batches)],
    }
    for age, parts in by_hand.items():
        order = np.argsort(np.concatenate([p.offsets for p in parts]))
        expected = np.concatenate([p.probabilities for p in parts])[order]
        np.testing.assert_array_equal(said[age].probabilities, expected)


def test_the_dlrm_learns_and_predicts_from_what_came_before_alone() -> None:
    config = make_config()
    stream = events(1_200)
    said = learned(micro_batches(stream, config), DLRMLearner(config))
    like, last = said.labels[-200:, 1], said.probabilities[-200:, 1]
    assert last[like].mean() > last[~like].mean() + 0.2
    # Neither the answer nor what comes after an event may reach its prediction.
    flipped = [*stream[:80], *(e.model_copy(update={"actions": ["like"]}) for e in stream[80:])]
    before, after = (learned(micro_batches(s[:96], config), DLRMLearner(config)) for s in (stream, flipped))
    first_of_batch = [
        80 + i for i in range(16) if stream[80 + i].user_id not in {e.user_id for e in stream[80 : 80 + i]}
    ]
    assert len(first_of_batch) > 1
    np.testing.assert_array_equal(before.probabilities[first_of_batch], after.probabilities[first_of_batch])
    assert not np.array_equal(before.probabilities[80:], after.probabilities[80:])


def test_the_dlrm_refuses_context_which_it_does_not_read(tmp_path: pathlib.Path) -> None:
    config = make_config(events={"actions": ["view"], "context": ["place"]})
    with pytest.raises(ConfigError, match=r"events\.context must be empty"):
        DLRMLearner(config)
