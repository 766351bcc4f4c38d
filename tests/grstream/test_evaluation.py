"""Predictions are kept, and set beside what any recommender must beat."""

import pathlib

import numpy as np
import pytest

from grstream.evaluation import compare
from grstream.metrics import Predictions
from grstream.predictions import PredictionLog, read


def stream(n: int, seed: int = 0) -> Predictions:
    """Labels that follow a known probability of user and item."""
    random = np.random.default_rng(seed)
    users, items = random.integers(0, 40, n), random.integers(0, 30, n)
    true = 1 / (1 + np.exp(-(users % 5 - 2.0) - (items % 3 - 1.0)))
    return Predictions(
        users=users,
        items=items,
        times=np.arange(n),
        partitions=np.zeros(n, np.int32),
        offsets=np.arange(n),
        late=np.zeros(n, bool),
        labels=np.stack([random.random(n) < true, np.ones(n, bool)], axis=1),
        probabilities=np.stack([true, true], axis=1).astype(np.float32),
        ranks=np.full(n, -1),
    )


def test_the_truth_beats_every_running_rate_and_the_best_rate_is_the_one_of_user_and_item() -> None:
    result = compare(stream(6_000), action=0)
    assert result.events == 3_000
    assert result.model < result.rates["user_item"] < result.rates["item"] < result.rates["global"]
    assert result.margin == pytest.approx(result.rates["user_item"] - result.model)
    assert 0 < result.interval[0] < result.margin < result.interval[1]


def test_a_model_that_says_what_the_best_rate_says_has_no_margin() -> None:
    known = stream(4_000)
    coin = Predictions(**{**vars(known), "probabilities": np.full((4_000, 2), 0.5, np.float32)})
    assert compare(coin, action=0).margin < 0


def test_a_prediction_made_again_after_a_crash_replaces_the_first(tmp_path: pathlib.Path) -> None:
    events = stream(100)
    first, second = PredictionLog(tmp_path, "0001"), PredictionLog(tmp_path, "0002")
    first.append(events.where(events.offsets < 70))
    first.flush()
    again = events.where(events.offsets >= 50)
    changed = Predictions(**{**vars(again), "probabilities": again.probabilities * 0})
    second.append(changed)
    second.flush()
    got = read(tmp_path)
    assert got.offsets.tolist() == list(range(100))
    assert np.array_equal(got.probabilities[:50], events.probabilities[:50])
    assert not got.probabilities[50:].any()
    assert np.array_equal(got.labels, events.labels)


def test_an_empty_log_says_how_to_get_one(tmp_path: pathlib.Path) -> None:
    PredictionLog(tmp_path, "run").flush()
    with pytest.raises(FileNotFoundError, match="log_predictions"):
        read(tmp_path)
