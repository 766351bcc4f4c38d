"""Stochastic Length: how often, how much, and the same again on a replay."""

import numpy as np
import pytest

from grstream.microbatch import MicroBatch, Role
from grstream.stochastic_length import kept_events
from tests.grstream.micro_batches import Event, micro_batch

WINDOW, ALPHA = 100, 1.6  # cut to 100^.8 = 40 events


def history(n: int) -> list[Event]:
    return [(i, 1, 1_000 * i) for i in range(n)]


def batch(old: list[int], new: int = 2, first_offset: int = 0) -> MicroBatch:
    sequences = [(user, history(n), [(7, 1, 10**6)] * new) for user, n in enumerate(old)]
    return micro_batch(sequences, first_offset)


def test_short_histories_and_new_events_stay() -> None:
    short = batch([0, 5, 38])
    assert kept_events(short, WINDOW, ALPHA, 0).all()
    long = batch([98] * 50)
    kept = kept_events(long, WINDOW, ALPHA, 0)
    assert kept[long.roles != Role.CONTEXT].all()
    assert not kept.all()


def test_long_ones_are_cut_to_the_papers_length_as_often_as_it_says() -> None:
    n, sequences = 100, 2_000
    kept = kept_events(batch([n - 2] * sequences), WINDOW, ALPHA, 0).reshape(sequences, n).sum(1)
    assert set(kept.tolist()) == {40, n}
    whole = WINDOW**ALPHA / n**2
    assert (kept == n).mean() == pytest.approx(whole, abs=4 * (whole * (1 - whole) / sequences) ** 0.5)


def test_older_events_are_dropped_more_often() -> None:
    kept = kept_events(batch([98] * 2_000), WINDOW, ALPHA, 0).reshape(2_000, 100)[:, :98].mean(0)
    old, middle, recent = kept[:30].mean(), kept[30:70].mean(), kept[70:].mean()
    assert old < middle < recent


def test_at_alpha_2_nothing_is_cut() -> None:
    assert kept_events(batch([98, 50]), WINDOW, 2.0, 0).all()


def test_a_replay_draws_the_same_whoever_else_is_in_the_batch() -> None:
    together = batch([98, 98])
    first, second = np.split(kept_events(together, WINDOW, ALPHA, 3), 2)
    assert np.array_equal(kept_events(batch([98]), WINDOW, ALPHA, 3), first)
    assert np.array_equal(kept_events(batch([98], first_offset=2), WINDOW, ALPHA, 3), second)
    assert not np.array_equal(first, second)
    assert not np.array_equal(kept_events(batch([98]), WINDOW, ALPHA, 4), first)


def test_an_offset_of_a_backfill_may_be_negative() -> None:
    below, at = (kept_events(batch([98] * 20, first_offset=o), WINDOW, ALPHA, 0) for o in (-(10**6), 0))
    assert below.sum() < len(below)
    assert below.tolist() != at.tolist()


def test_a_batch_with_empty_and_without_sequences() -> None:
    assert len(kept_events(MicroBatch.empty(), WINDOW, ALPHA, 0)) == 0
    only_old = micro_batch([(1, history(90), []), (2, [], [])])
    assert kept_events(only_old, WINDOW, ALPHA, 0).all(), "nothing is learned from it: leave it alone"
