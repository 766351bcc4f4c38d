"""The gate closes where predictions get much worse, and only there."""

import numpy as np
import pytest

from grstream import config as configs
from grstream.gate import Diverged, EntropyGate
from grstream.metrics import Predictions

EVENTS = 64  # a step


def gate(recent: int = 1000, **train: float) -> EntropyGate:
    return EntropyGate(2, configs.TrainConfig(recent_events=recent, **train))  # type: ignore[arg-type]


def said(
    draw: np.random.Generator, rates: tuple[float, float], right: float = 1.0, late: bool = False
) -> Predictions:
    """A step of events with actions of these rates, predicted by the rates' log-odds times `right`."""
    odds = np.log(np.array(rates) / (1 - np.array(rates))) + draw.normal(0, 0.5, (EVENTS, 2))
    labels = draw.random((EVENTS, 2)) < 1 / (1 + np.exp(-odds))
    none = np.zeros(EVENTS, np.int64)
    return Predictions(
        users=none,
        items=none,
        times=none,
        partitions=none.astype(np.int32),
        offsets=none,
        late=np.full(EVENTS, late),
        history=np.zeros(EVENTS, np.int32),
        labels=labels,
        probabilities=(1 / (1 + np.exp(-right * odds))).astype(np.float32),
        ranks=none,
    )


def test_a_good_model_is_never_stopped_whatever_the_actions_rates_do() -> None:
    draw, judge = np.random.default_rng(0), gate()
    for step in range(3000):
        common = 0.2 + 0.15 * np.sin(step / 100)
        rare = 0.004 if step % 500 < 400 else 0.02  # a campaign
        judge.update(said(draw, (common, rare)))
        assert judge.open, step


def test_a_model_that_gets_its_signs_wrong_is_stopped_and_let_on_when_it_is_right_again() -> None:
    draw, judge = np.random.default_rng(1), gate()
    for _ in range(100):
        judge.update(said(draw, (0.2, 0.05)))
    bad = 0
    while judge.open:
        judge.update(said(draw, (0.2, 0.05), right=-1))
        bad += 1
    assert bad <= 3  # of 64 events: it takes no more to see it
    for _ in range(20):  # many times the short window: bad is not what bad is compared with
        judge.update(said(draw, (0.2, 0.05), right=-1))
        assert not judge.open
    steps = 0
    while not judge.open:
        judge.update(said(draw, (0.2, 0.05)))
        steps += 1
    assert steps <= 3


def test_bad_steps_without_end_are_an_error_that_says_how_bad() -> None:
    draw, judge = np.random.default_rng(2), gate(bad_steps=7)
    for _ in range(100):
        judge.update(said(draw, (0.2, 0.05)))

    def go_on() -> None:
        while True:
            judge.update(said(draw, (0.2, 0.05), right=-1))

    with pytest.raises(Diverged, match="for 7 steps") as caught:
        go_on()
    assert caught.value.now - caught.value.before > 0.5


def test_late_events_and_the_first_ones_are_not_judged() -> None:
    draw, judge = np.random.default_rng(3), gate()
    for _ in range(15):  # fewer than the recent events
        judge.update(said(draw, (0.2, 0.05)))
    for _ in range(100):
        judge.update(said(draw, (0.2, 0.05), right=-1, late=True))
    assert judge.open
    fresh = gate()
    for _ in range(100):  # nothing better was seen
        fresh.update(said(draw, (0.2, 0.05), right=-1))
    assert fresh.open


def test_a_gate_that_is_seeded_judges_at_once() -> None:
    draw, judge = np.random.default_rng(4), gate()
    judge.seed(Predictions.concat([said(draw, (0.2, 0.05)) for _ in range(16)]))
    for _ in range(3):
        judge.update(said(draw, (0.2, 0.05), right=-1))
    assert not judge.open


def test_how_a_new_action_is_predicted_at_first_is_no_jump_and_is_judged_later() -> None:
    draw, judge = np.random.default_rng(6), gate()
    before = [said(draw, (0.2, 0.01)) for _ in range(16)]
    for step in before:
        step.probabilities[:, 1] = np.nan  # it was not configured
    judge.seed(Predictions.concat(before))
    untold = [said(draw, (0.2, 0.01)) for _ in range(3)]
    for step in untold:
        step.probabilities[:, 1] = 0.5
        judge.update(step)
    assert judge.open
    resumed = gate()
    resumed.seed(Predictions.concat([*before, *untold]))
    for one in (judge, resumed):
        for _ in range(60):
            one.update(said(draw, (0.2, 0.01)))
            assert one.open
        for _ in range(3):
            one.update(said(draw, (0.2, 0.01), right=-1))
        assert not one.open, "it judges again"


def test_without_a_bound_nothing_is_judged() -> None:
    draw, judge = np.random.default_rng(5), gate(max_entropy_jump=None)
    for right in (1, -1):
        for _ in range(100):
            judge.update(said(draw, (0.2, 0.05), right=right))
    assert judge.open
