"""Predictions are kept, and set beside what any recommender must beat."""

import os
import pathlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream.evaluation import compare, difference, measures
from grstream.metrics import Predictions, entropy, gauc, log_loss, popularity_ranks
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
        history=np.zeros(n, np.int32),
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
    first, second = PredictionLog(tmp_path, "0001", 60), PredictionLog(tmp_path, "0002", 60)
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


def test_predictions_go_by_age(tmp_path: pathlib.Path) -> None:
    log = PredictionLog(tmp_path, "run", 60)
    for offsets in (range(10), range(10, 20)):
        events = stream(20)
        log.append(events.where(np.isin(events.offsets, offsets)))
        log.flush()
        if offsets.start == 0:
            [first] = tmp_path.iterdir()
            os.utime(first, (time.time() - 61, time.time() - 61))
    assert read(tmp_path).offsets.tolist() == list(range(10, 20))


def test_an_empty_log_says_how_to_get_one(tmp_path: pathlib.Path) -> None:
    PredictionLog(tmp_path, "run", 60).flush()
    with pytest.raises(FileNotFoundError, match="log_predictions"):
        read(tmp_path)


def test_a_better_model_is_ahead_by_the_difference_of_its_means_with_the_interval_clear_of_zero() -> None:
    truth = stream(6_000)
    noise = np.random.default_rng(1).normal(0, 0.15, truth.probabilities.shape)
    worse = Predictions(
        **{
            **vars(truth),
            "probabilities": np.clip(truth.probabilities + noise, 0.02, 0.98).astype(np.float32),
        }
    )
    first, second = ([measures(p, 0)] for p in (truth, worse))
    for figure, sign in (("ne", 1), ("gauc", -1)):
        apart = difference([m[figure] for m in first], [m[figure] for m in second])
        assert apart.mean == pytest.approx(second[0][figure].mean - first[0][figure].mean)
        assert sign * apart.mean > 0
        assert min(sign * x for x in apart.interval) > 0


def test_the_figures_of_a_measure_are_those_that_are_known_by_other_means() -> None:
    known = stream(2_000)
    ranks = np.arange(2_000) % 40
    ranks[::3] = -1  # not asked
    found = measures(Predictions(**{**vars(known), "ranks": ranks}), 0)
    later = slice(1_000, None)
    labels, said = known.labels[later, 0], known.probabilities[later, 0]
    assert found["ne"].mean == pytest.approx(log_loss(said, labels).mean() / entropy(labels.mean()))
    assert found["gauc"].mean == pytest.approx(gauc(known.users[later], labels, said))
    asked = ranks[later][ranks[later] >= 0]
    assert found["hr@10"].mean == pytest.approx((asked < 10).mean())
    assert found["mrr"].mean == pytest.approx((1 / (asked + 1)).mean())


def test_the_spread_of_the_seeds_is_part_of_an_interval() -> None:
    known = stream(2_000)
    shifted = [
        Predictions(**{**vars(known), "probabilities": np.clip(known.probabilities + by, 0.01, 0.99)})
        for by in (-0.1, 0.0, 0.1)
    ]
    same, apart = ([measures(p, 0)["ne"] for p in of] for of in ([known] * 3, shifted))
    alone = difference([measures(known, 0)["ne"]], [measures(known, 0)["ne"]])
    assert (alone.mean, alone.error) == (0, 0)
    assert difference(same, apart).error > np.std([m.mean for m in apart], ddof=1) / 3**0.5


def test_measures_of_other_events_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different events"):
        difference([measures(stream(100), 0)["ne"]], [measures(stream(120), 0)["ne"]])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=40), st.integers(1, 10))
def test_popularity_is_counted_over_the_time_before(rows, within) -> None:
    items = np.array([item for item, _ in rows], np.int64)
    times = np.cumsum([step for _, step in rows], dtype=np.int64)
    for i, rank in enumerate(popularity_ranks(items, times, within).tolist()):
        before = [j for j in range(i) if times[j] >= times[i] - within]
        counts = {x: sum(items[j] == x for j in before) for x in set(items.tolist())}
        latest = {x: max((j for j in range(i) if items[j] == x), default=-1) for x in counts}
        own = items[i]
        better = [x for x in counts if (counts[x], latest[x]) > (counts[own], latest[own])]
        assert rank == len(better)
