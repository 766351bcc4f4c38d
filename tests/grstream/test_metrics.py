"""Prequential figures, against slow and obvious versions of themselves."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream.metrics import Predictions, StreamMetrics, entropy, gauc, log_loss, running_rates


def predictions(
    labels: list[bool], probabilities: list[float], users: list[int] | None = None
) -> Predictions:
    n = len(labels)
    zeros = np.zeros(n, np.int64)
    return Predictions(
        users=np.array(users if users is not None else zeros, np.int64),
        items=zeros,
        times=zeros,
        partitions=zeros.astype(np.int32),
        offsets=np.arange(n),
        late=np.zeros(n, bool),
        history=zeros.astype(np.int32),
        labels=np.array(labels, bool)[:, None],
        probabilities=np.array(probabilities, np.float32)[:, None],
        ranks=zeros - 1,
    )


rows = st.lists(
    st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from([0.1, 0.4, 0.5, 0.9])), max_size=40
)


@given(rows)
def test_gauc_is_the_weighted_share_of_ordered_pairs(rows) -> None:
    weighted, weight = 0.0, 0
    for user in {u for u, _, _ in rows}:
        good = [s for u, y, s in rows if u == user and y]
        bad = [s for u, y, s in rows if u == user and not y]
        if good and bad:
            pairs = [(g > b) + (g == b) / 2 for g in good for b in bad]
            weighted += (len(good) + len(bad)) * sum(pairs) / len(pairs)
            weight += len(good) + len(bad)
    users, labels, scores = (np.array([r[i] for r in rows]) for i in range(3))
    got = gauc(users.astype(np.int64), labels.astype(bool), scores.astype(float))
    assert math.isnan(got) if not weight else got == pytest.approx(weighted / weight)


def test_the_base_rate_has_normalized_entropy_one() -> None:
    metrics = StreamMetrics(["click"])
    metrics.update(predictions([True, False, False, False] * 50, [0.25] * 200))
    assert metrics.figures()["ne/click"] == pytest.approx(1, abs=1e-6)
    assert metrics.figures()["calibration/click"] == pytest.approx(1, abs=1e-6)


def test_a_better_prediction_has_a_lower_entropy_than_the_base_rate() -> None:
    metrics = StreamMetrics(["click"])
    metrics.update(predictions([True, False] * 50, [0.8, 0.2] * 50, [1] * 100))
    figures = metrics.figures()
    assert figures["ne/click"] == pytest.approx(-math.log(0.8) / math.log(2), rel=1e-4)
    assert figures["gauc/click"] == 1


def test_recent_figures_forget_and_totals_do_not() -> None:
    metrics = StreamMetrics(["click"], recent=100)
    metrics.update(predictions([True, False] * 50, [0.01, 0.99] * 50))
    metrics.update(predictions([True, False] * 50, [0.9, 0.1] * 50))
    figures = metrics.figures()
    assert figures["ne/click"] < 0.2 < 1 < figures["ne_total/click"]


def test_restored_metrics_go_on_with_the_same_figures() -> None:
    one, other = StreamMetrics(["click"], recent=150), StreamMetrics(["click"], recent=150)
    one.update(predictions([True, False] * 50, [0.7, 0.4] * 50, list(range(10)) * 10))
    other.load(one.state())
    for metrics in (one, other):
        metrics.update(predictions([True, True] * 50, [0.7, 0.4] * 50))
    assert one.figures() == other.figures()


def joined(one: Predictions, other: Predictions) -> Predictions:
    """The same events with the actions of both."""
    return dataclasses.replace(
        one,
        labels=np.concatenate([one.labels, other.labels], axis=1),
        probabilities=np.concatenate([one.probabilities, other.probabilities], axis=1),
    )


def test_an_action_that_is_new_is_judged_from_then_on_and_the_others_as_ever() -> None:
    """Its figures are those of a stream that begins there; theirs go on."""
    users = list(range(10)) * 10
    first = predictions([True, False] * 50, [0.7, 0.4] * 50, users)
    later = predictions([True, True, False, False] * 25, [0.7, 0.4] * 50, users)
    bought = predictions([False] * 90 + [True] * 10, [0.1] * 90 + [0.6] * 10, users)
    steady, anew = StreamMetrics(["click"], recent=150), StreamMetrics(["buy"], recent=150)
    before, grown = StreamMetrics(["click"], recent=150), StreamMetrics(["click", "buy"], recent=150)
    steady.update(first)
    before.update(first)
    grown.load(before.state())
    assert grown.figures() == pytest.approx(before.figures(), nan_ok=True), (
        "of the new action nothing is known"
    )
    for metrics, said in ((steady, later), (anew, bought), (grown, joined(later, bought))):
        metrics.update(said)
    expected = {**anew.figures(), **steady.figures()}
    assert grown.figures() == pytest.approx(expected)
    again = StreamMetrics(["click", "buy"], recent=150)
    again.load(grown.state())
    assert again.figures() == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=30))
def test_a_running_rate_knows_nothing_of_what_comes_after(rows) -> None:
    users, items, labels = (np.array([r[i] for r in rows], np.int64) for i in range(3))
    whole = running_rates(users, items, labels.astype(bool))
    for cut in range(len(rows)):
        part = running_rates(users[:cut], items[:cut], labels[:cut].astype(bool))
        for name, rates in whole.items():
            assert rates[:cut].tolist() == part[name].tolist()
            assert ((rates > 0) & (rates < 1)).all()


def test_entropy_and_log_loss_meet_at_the_rate() -> None:
    labels = np.array([True] * 3 + [False] * 7)
    assert log_loss(np.full(10, 0.3), labels).mean() == pytest.approx(entropy(0.3))
    assert np.isfinite(log_loss(np.array([0.0, 1.0]), np.array([True, False]))).all()


def test_gauc_puts_who_learns_a_users_level_from_its_labels_below_who_does_not() -> None:
    """Each user's labels are drawn at a level of its own, which is as good as a constant in its AUC.

    Of labels that are what they are in sum, those to come are the rarer the more have been: a level learned
    from them is right on average, and ranks a user's own events the wrong way round.
    """
    random, users, each = np.random.default_rng(0), 3000, 17
    user = np.repeat(np.arange(users), each)
    quality = random.normal(0, 0.9, 500)[random.integers(500, size=len(user))]
    level = np.repeat(random.normal(0, 0.8, users), each)
    liked = random.random(len(user)) < 1 / (1 + np.exp(-quality - level))
    labels = liked.reshape(users, each)
    before = np.cumsum(labels, 1) - labels
    learned = (before + 5) / (np.arange(each) + 10)
    told = quality + np.log(learned / (1 - learned)).reshape(-1)
    alone, beside, known = (gauc(user, liked, scores) for scores in (quality, told, quality + level))
    assert alone == pytest.approx(known)
    assert alone - beside > 0.03
    losses = [log_loss(1 / (1 + np.exp(-scores)), liked).mean() for scores in (quality, told)]
    assert losses[1] < losses[0] - 0.01, "and yet it predicts better"
