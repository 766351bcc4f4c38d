"""Embedding rows belong to their keys, whatever order they came in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grstream.candidates import Candidates
from grstream.keys import INT64_MAX, INT64_MIN
from grstream.vocabulary import DAY_MS, INITIAL_STD, Vocabulary, VocabularyState, initial_rows

key_sets = st.lists(st.integers(INT64_MIN, INT64_MAX), min_size=1, max_size=30, unique=True)


def no_items(keys: np.ndarray) -> np.ndarray:
    return np.zeros(len(keys), bool)


def revived(state: VocabularyState, vocabulary: Vocabulary) -> Vocabulary:
    vocabulary.restore(state)
    return vocabulary


@given(keys=key_sets, seed=st.integers(0, 5), order=st.randoms())
def test_a_key_starts_from_its_own_vector_whenever_it_comes(keys, seed, order) -> None:
    shuffled = keys[:]
    order.shuffle(shuffled)
    vocabulary = Vocabulary(4, seed)
    for key in shuffled:
        vocabulary.admit(np.array([key]), no_items(np.array([key])))
    got, known = vocabulary.vectors(np.array(keys))
    assert known.all()
    fresh, unknown = Vocabulary(4, seed).vectors(np.array(keys))
    assert not unknown.any()
    assert torch.equal(got, fresh)


@given(keys=key_sets, more=key_sets)
def test_growing_leaves_trained_rows_as_they_are(keys, more) -> None:
    vocabulary = Vocabulary(4)
    held = np.array(keys)
    rows = vocabulary.admit(held, no_items(held))
    vocabulary.update(rows, torch.ones(len(rows), 4), 0.1)
    before = vocabulary.gather(rows)
    extra = np.array(more)
    vocabulary.admit(extra, no_items(extra))
    assert torch.equal(vocabulary.vectors(held)[0], before)
    assert vocabulary.lookup(held).tolist() == rows.tolist()


def test_many_keys_keep_their_rows() -> None:
    keys = np.random.default_rng(0).integers(INT64_MIN, INT64_MAX, 50_000)
    vocabulary = Vocabulary(2)
    for part in np.array_split(np.unique(keys), 37):
        vocabulary.admit(part, part % 2 == 0)
    assert torch.equal(vocabulary.vectors(keys)[0], initial_rows(keys, 2, 0))
    assert (vocabulary.keys_of(vocabulary.item_rows()) % 2 == 0).all()


def test_adagrad_is_rowwise_and_only_for_touched_rows() -> None:
    vocabulary = Vocabulary(2)
    keys = np.array([1, 2])
    rows = vocabulary.admit(keys, no_items(keys))
    start = vocabulary.gather(rows)
    gradient = torch.tensor([[3.0, 4.0]])
    total = 0.0
    for _ in range(3):
        before = vocabulary.gather(rows[:1])
        vocabulary.update(rows[:1], gradient, 0.1)
        total += 12.5
        expected = before - 0.1 * gradient / total**0.5
        assert vocabulary.gather(rows[:1]) == pytest.approx(expected.numpy(), rel=1e-5)
    assert torch.equal(vocabulary.gather(rows[1:]), start[1:])
    vocabulary.update(rows[1:], torch.zeros(1, 2), 0.1)
    assert torch.equal(vocabulary.gather(rows[1:]), start[1:]), "no gradient, no change"


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
def test_restored_state_goes_on_the_same(optimizer: str) -> None:
    def empty() -> Vocabulary:
        return Vocabulary(3, seed=4, optimizer=optimizer, candidates=Candidates(2, 10))

    keys = np.array([5, -7, 11, 6])
    one = empty()
    rows = one.admit(keys, np.array([True, False, True, True]), np.array([2, 3, 2, 1]))
    one.name({5: "five", 6: "no row yet"})
    one.update(rows[:3], torch.ones(3, 3), 0.1)
    other = revived(one.state(), empty())
    for vocabulary in (one, other):
        rows = vocabulary.admit(keys, no_items(keys))
        assert rows.tolist() == [0, 1, 2, 3]
        vocabulary.update(rows, torch.full((4, 3), 0.5), 0.1)
    a, b = one.state(), other.state()
    assert np.array_equal(a.rows, b.rows)
    assert a.optimizer.keys() == b.optimizer.keys()
    assert all(np.array_equal(a.optimizer[name], b.optimizer[name]) for name in a.optimizer)
    assert np.array_equal(a.items, b.items)
    assert np.array_equal(a.used, b.used)
    assert a.item_names == b.item_names == {5: "five"}


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
def test_many_updates_of_some_rows_are_those_of_float64(optimizer: str) -> None:
    random = np.random.default_rng(0)
    keys = np.arange(20)
    vocabulary = Vocabulary(4, optimizer=optimizer)
    vocabulary.admit(keys, no_items(keys))
    table = initial_rows(keys, 4, 0).double().numpy()
    mean, square, steps = np.zeros((20, 4)), np.zeros(20), np.zeros(20)
    for _ in range(50):
        rows = random.choice(20, 7, replace=False)
        gradient = random.standard_normal((7, 4))
        vocabulary.update(rows, torch.from_numpy(gradient).float(), 0.01)
        squared = (gradient**2).mean(1)
        if optimizer == "adagrad":
            square[rows] += squared
            table[rows] -= 0.01 * gradient / np.sqrt(square[rows])[:, None]
            continue
        steps[rows] += 1
        mean[rows] = 0.9 * mean[rows] + 0.1 * gradient
        square[rows] = 0.999 * square[rows] + 0.001 * squared
        corrected = square[rows] / (1 - 0.999 ** steps[rows])
        unbiased = mean[rows] / (1 - 0.9 ** steps[rows])[:, None]
        table[rows] -= 0.01 * unbiased / (np.sqrt(corrected) + 1e-8)[:, None]
    np.testing.assert_allclose(vocabulary.gather(keys).numpy(), table, atol=2e-6)


def test_below_the_threshold_a_key_has_its_initial_vector_and_no_row() -> None:
    vocabulary = Vocabulary(2, candidates=Candidates(3, 100))
    keys, items = np.array([4, 6]), np.array([True, True])
    assert vocabulary.admit(keys, items, np.array([2, 1])).tolist() == [-1, -1]
    assert not vocabulary.vectors(keys)[1].any()
    assert torch.equal(vocabulary.vectors(keys)[0], initial_rows(keys, 2, 0))
    assert len(vocabulary.item_rows()) == 0
    assert vocabulary.admit(keys, items, np.array([1, 1])).tolist() == [0, -1]
    assert vocabulary.admit(keys, items, np.array([0, 0])).tolist() == [0, -1]
    assert vocabulary.keys_of(vocabulary.item_rows()).tolist() == [4]


@given(
    steps=st.lists(st.lists(st.integers(-20, 20), min_size=1, max_size=8, unique=True), max_size=25),
    budget=st.integers(1, 30),
)
def test_a_vocabulary_restored_under_a_lower_budget_keeps_what_was_used_last(steps, budget) -> None:
    whole = Vocabulary(2)
    for keys in steps:
        whole.update(whole.admit(np.array(keys), no_items(np.array(keys))), torch.ones(len(keys), 2), 0.1)
    state = whole.state()
    small = revived(state, Vocabulary(2, budget=budget))
    assert len(small) == min(budget, len(whole))
    got = small.state()
    assert set(got.keys) <= set(state.keys)
    assert np.array_equal(got.rows, whole.vectors(got.keys)[0].numpy())
    left = set(state.keys) - set(got.keys)
    if left:
        assert max(state.used[whole.lookup(np.array(sorted(left)))]) <= got.used.min()


def test_initial_vectors_have_the_stated_spread_and_differ_by_seed() -> None:
    keys = np.arange(4_000)
    rows = initial_rows(keys, 16, 0)
    assert rows.std().item() == pytest.approx(INITIAL_STD, rel=0.02)
    assert abs(rows.mean().item()) < INITIAL_STD / 50
    assert not torch.equal(rows, initial_rows(keys, 16, 1))
    correlation = np.corrcoef(rows.numpy().T) - np.eye(16)
    assert np.abs(correlation).max() < 0.1


class Remembered:
    """What a vocabulary of a budget holds, said with a dict in order of last use."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.vectors: dict[int, float] = {}  # what was added to each key's initial vector

    def admit(self, keys: list[int], rows: dict[int, int]) -> set[int]:
        """Those that were evicted. `rows`: of the keys held, which say who goes first of equals."""
        held = self.vectors
        mine = {key: held.pop(key) for key in keys if key in held}
        new = [key for key in keys if key not in mine]
        gone = list(held)[: max(0, len(held) + len(keys) - self.budget)][: len(new)]
        for key in gone:
            del held[key]
        everyone = mine | dict.fromkeys(new, 0.0)
        held.update({key: everyone[key] for key in sorted(everyone, key=lambda key: rows.get(key, -1))})
        return set(gone)


@given(
    steps=st.lists(st.lists(st.integers(-20, 20), min_size=1, max_size=8, unique=True), max_size=25),
    budget=st.integers(1, 16),
    restored=st.integers(0, 24),
)
def test_beyond_the_budget_the_key_used_least_recently_goes_and_leaves_nothing(
    steps, budget, restored
) -> None:
    vocabulary, expected = Vocabulary(2, budget=budget), Remembered(budget)
    most = budget
    for at, keys in enumerate(steps):
        if at == restored:
            vocabulary = revived(vocabulary.state(), Vocabulary(2, budget=budget))
        array = np.array(keys)
        known = vocabulary.lookup(array) >= 0
        rows = vocabulary.admit(array, array % 2 == 0)
        most = max(most, len(keys))
        assert len(vocabulary) <= most
        assert sorted(vocabulary.fresh.tolist()) == sorted(rows[~known].tolist())
        gone = expected.admit(keys, dict(zip(keys, rows.tolist(), strict=True)))
        if gone:
            assert (vocabulary.lookup(np.array(sorted(gone))) == -1).all()
        assert len(set(rows.tolist())) == len(rows)
        vocabulary._rows[torch.from_numpy(rows)] += 1.0
        for key in keys:
            expected.vectors[key] += 1.0
        held = np.array(sorted(expected.vectors))
        got, known = vocabulary.vectors(held)
        assert known.all()
        assert len(vocabulary) == len(held)
        added = torch.tensor([expected.vectors[key] for key in held.tolist()])
        torch.testing.assert_close(got, initial_rows(held, 2, 0) + added[:, None])
        assert set(vocabulary.keys_of(vocabulary.item_rows()).tolist()) == {k for k in held if k % 2 == 0}


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
def test_an_evicted_key_leaves_neither_its_count_nor_its_optimizer_nor_its_name(optimizer: str) -> None:
    vocabulary = Vocabulary(2, budget=1, optimizer=optimizer, half_lives_days=[1])
    first, second = np.array([4]), np.array([6])
    rows = vocabulary.admit(first, np.array([True]))
    vocabulary.name({4: "four"})
    assert vocabulary.item_names == {4: "four"}
    vocabulary.count(first, np.array([5]))
    vocabulary.update(rows, torch.ones(1, 2), 0.1)
    assert vocabulary.admit(second, np.array([True])).tolist() == rows.tolist()
    state = vocabulary.state()
    assert state.keys.tolist() == [6]
    assert state.item_names == {}
    assert state.levels.tolist() == [[-np.inf]]
    assert not any(column.any() for column in state.optimizer.values())
    assert vocabulary.evicted == 1


def test_a_name_that_comes_alone_is_a_change_that_the_next_version_carries() -> None:
    vocabulary = Vocabulary(2)
    vocabulary.admit(np.array([7, 8]), np.array([True, True]))
    vocabulary.carried(vocabulary.touched().mark, 1)
    assert vocabulary.touched().rows.tolist() == []
    vocabulary.name({8: "eight", 9: "has no row"})
    assert vocabulary.touched()[:2] == (vocabulary.lookup(np.array([8])), {8: "eight"})
    vocabulary.carried(vocabulary.touched().mark, 2)
    vocabulary.name({8: "eight"})
    assert vocabulary.touched().rows.tolist() == []


def test_an_item_that_comes_back_by_way_of_a_history_may_be_retrieved_once_an_event_has_named_it() -> None:
    vocabulary = Vocabulary(2, budget=1)
    for key in (4, 6):
        vocabulary.admit(np.array([key]), np.array([True]))
        vocabulary.name({key: str(key)})
    vocabulary.admit(np.array([4]), np.array([False]))
    assert vocabulary.item_names == {}
    assert len(vocabulary.item_rows()) == 0
    vocabulary.admit(np.array([4]), np.array([True]))
    vocabulary.name({4: "4"})
    assert vocabulary.keys_of(vocabulary.item_rows()).tolist() == [4]
    assert vocabulary.item_names == {4: "4"}


@given(
    counted=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30 * DAY_MS)), max_size=20),
    cut=st.integers(0, 20),
)
def test_popularity_is_the_sum_of_what_each_event_is_still_worth(
    counted: list[tuple[int, int]], cut: int
) -> None:
    """However the events are cut into steps, and through a restart; at times of this century."""
    began, half_lives = 1_700_000_000_000, [0.1, 1, 7]
    vocabulary = Vocabulary(2, half_lives_days=half_lives)
    keys = np.arange(4)  # the fifth has no row: its events' times count all the same
    rows = vocabulary.admit(keys, np.ones(4, np.bool_))
    items = np.array([item for item, _ in counted], np.int64)
    times = began + np.array([time for _, time in counted], np.int64)
    vocabulary.count(items[:cut], times[:cut])
    state, vocabulary = vocabulary.state(), Vocabulary(2, half_lives_days=half_lives)
    vocabulary.restore(state)
    vocabulary.count(items[cut:], times[cut:])
    ages = (times.max(initial=0) - times)[:, None] / DAY_MS / np.array(half_lives)
    expected = [np.log1p((0.5 ** ages[items == key]).sum(0)) for key in keys]
    np.testing.assert_allclose(vocabulary.popularity(rows), expected, atol=1e-5)
