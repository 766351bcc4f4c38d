"""Leave one out: what is learned from, what is asked, and how a run that was cut goes on."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grstream import epochs
from grstream.config import ConfigError
from grstream.epochs import RunConfig, Training, evaluate, run
from grstream.leave_one_out import (
    HELD_OUT,
    LEAST_EVENTS,
    Batch,
    Sequences,
    SequencesError,
    mean_and_error,
    metrics,
    questions,
    read_ml_1m,
    read_ml_100k,
    sequences,
    target_counts,
    target_ranks,
    training_batches,
    training_windows,
)
from kernels import UNKNOWN_TIME


def numbered(lengths: list[int]) -> Sequences:
    """Every event has its own item, so that an item says which event it is."""
    users = np.repeat(np.arange(len(lengths)), lengths)
    return sequences(users, np.arange(len(users)), np.arange(len(users)) * 1000)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Each sequence's inputs and targets."""
    sizes = batch.lengths.tolist()
    both = zip(batch.items.split(sizes), batch.targets.split(sizes), strict=True)
    return [(items.tolist(), targets.tolist()) for items, targets in both]


# -- What is read ----------------------------------------------------------------------------------------


def test_a_file_of_lists_becomes_sequences_in_its_order_without_times(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sequences.parquet"
    pa.parquet.write_table(pa.table({"item_ids": [[70, 5, 900, 5], [5, 900, 70, 1, 2]]}), path)
    data = read_ml_1m(path)
    assert data.lengths.tolist() == [4, 5]
    assert data.ids[data.items].tolist() == [70, 5, 900, 5, 5, 900, 70, 1, 2]
    assert set(data.times.tolist()) == {UNKNOWN_TIME}


def test_ratings_become_sequences_in_the_order_of_time_and_ties_stay_as_they_are(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "u.data"
    path.write_text("8\t1\t5\t30\n8\t2\t5\t10\n3\t1\t1\t7\n8\t4\t5\t30\n8\t3\t5\t20\n" + "3\t9\t1\t8\n" * 3)
    data = read_ml_100k(path)
    assert data.ids[data.items].tolist() == [1, 9, 9, 9, 2, 3, 1, 4]
    assert data.times.tolist() == [7000, 8000, 8000, 8000, 10_000, 20_000, 30_000, 30_000]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"items": [[1, 2]]}, r"must have a column item_ids, .* it has items \(list<"),
        ({"item_ids": ["a"]}, r"must have a column item_ids"),
        ({"item_ids": [[1, 2, 3, 4], [1, 2, 3]]}, "1 of 2 users have fewer than 4 events: leave them out"),
        ({"item_ids": [[1, None, 3, 4]]}, "1 items that are null"),
    ],
)
def test_a_file_of_another_shape_says_what_is_expected(
    tmp_path: pathlib.Path, columns: dict[str, Any], message: str
) -> None:
    path = tmp_path / "sequences.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(SequencesError, match=message):
        read_ml_1m(path)


def test_a_file_that_is_not_there_or_no_table_says_which(tmp_path: pathlib.Path) -> None:
    for read in (read_ml_1m, read_ml_100k):
        with pytest.raises(SequencesError, match=r"cannot read .*nowhere"):
            read(tmp_path / "nowhere")
    (tmp_path / "u.data").write_text("1,2,3,4\n")
    with pytest.raises(SequencesError, match=r"cannot read .*u\.data.*user, item, rating and unix seconds"):
        read_ml_100k(tmp_path / "u.data")
    with pytest.raises(SequencesError, match="as Parquet"):
        read_ml_1m(tmp_path / "u.data")


# -- What is learned from --------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(LEAST_EVENTS, 30), min_size=1, max_size=6),
    window=st.integers(1, 12),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_an_epoch_of_tiles_has_every_event_as_target_once_but_first_and_held_out(
    lengths: list[int], window: int, tokens: int, seed: int
) -> None:
    data, random = numbered(lengths), np.random.default_rng(seed)
    windows = training_windows(data, window, random)
    assert windows[1].max() <= window
    batches = training_batches(data, *windows, tokens, random)
    seen = [pair for batch in batches for pair in rows(batch)]
    for inputs, targets in seen:
        assert targets == [i + 1 for i in inputs]  # the next event
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
    ends = data.starts + data.lengths
    expected = [e for s, end in zip(data.starts, ends, strict=True) for e in range(s + 1, end - HELD_OUT)]
    assert sorted(t for _, targets in seen for t in targets) == expected
    assert np.flatnonzero(target_counts(data)).tolist() == expected


def test_tiles_begin_anywhere_but_a_sequence_that_fits_stays_whole() -> None:
    data = numbered([50, 9])
    begins = set()
    for seed in range(200):
        at, lengths = training_windows(data, 10, np.random.default_rng(seed))
        begins.update(at[at < 50].tolist())
        assert (at[-1], lengths[-1]) == (50, 6)
    assert begins == set(range(47))


def test_without_tiles_only_the_newest_window_is_learned_from() -> None:
    at, lengths = training_windows(numbered([50, 9]), 10, None)
    assert (at.tolist(), lengths.tolist()) == ([37, 50], [10, 6])


# -- What is asked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("back", "ends"), [(2, [9, 10, 48]), (1, [10, 11, 49])])
def test_the_last_items_are_asked_for_with_all_before_them_as_history(back: int, ends: list[int]) -> None:
    data = numbered([50, 11, 12])
    found = {}
    for asked in questions(data, back, window=20, tokens=16):
        for user, (history, targets) in zip(asked.users, rows(asked.batch), strict=True):
            found[int(user)] = (history, targets[-1])
    starts = [50, 61, 0]
    for user, (start, end) in zip((1, 2, 0), zip(starts, ends, strict=True), strict=True):
        assert found[user] == (list(range(max(start, start + end - 20), start + end)), start + end)


def test_a_target_is_ranked_among_what_its_user_has_not_had_and_ties_count_against_it() -> None:
    users = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    data = sequences(users, np.array([0, 1, 2, 3, 4, 5, 1, 0]), np.zeros(8, np.int64))
    scores = torch.tensor([[9.0, 8, 7, 5, 5, 6], [1.0, 3, 2, 5, 9, 9]])
    # User 0: 0, 1 and 2 were had; 5 is ahead and 4 is a tie. User 1: 1, 4 and 5 were had; 2 and 3 are ahead.
    assert target_ranks(scores, data, np.array([0, 1]), back=1).tolist() == [2, 2]
    # Validation: user 0's target is 2, and 3 has not been had; user 1's is 1, and 0 has not been had.
    assert target_ranks(scores, data, np.array([0, 1]), back=2).tolist() == [0, 1]
    assert target_ranks(torch.zeros(1, 6), data, np.array([1]), back=1).tolist() == [2]


def test_an_item_that_comes_again_is_still_ranked_by_its_score() -> None:
    data = sequences(np.zeros(4, np.int64), np.array([0, 1, 2, 0]), np.zeros(4, np.int64))
    data = dataclasses.replace(data, ids=np.arange(5))
    scores = torch.tensor([[3.0, 9, 9, 4, 1]])
    assert target_ranks(scores, data, np.array([0]), back=1).tolist() == [1]


def test_scores_that_are_no_numbers_are_an_error_and_no_hit() -> None:
    with pytest.raises(ValueError, match="not finite"):
        target_ranks(torch.full((1, 4), torch.nan), numbered([4]), np.array([0]), back=1)


def test_metrics_are_those_of_the_definitions() -> None:
    found = metrics(np.array([0, 9, 10, 199, 200]))
    assert found["HR@10"] == pytest.approx(2 / 5)
    assert found["HR@200"] == pytest.approx(4 / 5)
    assert found["NDCG@10"] == pytest.approx((1 + 1 / math.log2(11)) / 5)
    assert found["NDCG@50"] == pytest.approx((1 + 1 / math.log2(11) + 1 / math.log2(12)) / 5)
    assert found["MRR"] == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 200 + 1 / 201) / 5)


def test_a_standard_error_is_that_of_the_mean() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([4.0]) == (4.0, None)


# -- Training --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small take longer with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(stride: int, users: int = 60, items: int = 30) -> Sequences:
    """Each user walks round the items with a stride of their own choice: what comes next can be learned."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(users):
        length, start, step = random.integers(8, 20), random.integers(items), random.integers(1, stride + 1)
        rows.append((start + step * np.arange(length)) % items)
    names = np.repeat(np.arange(users), [len(row) for row in rows])
    return sequences(names, np.concatenate(rows), np.full(len(names), UNKNOWN_TIME))


def settings(**changed: Any) -> RunConfig:
    """A model that learns in seconds, with everything random switched on."""
    model = {"layers": 2, "dim": 16, "heads": 2, "dropout": 0.1, "time_bias": False}
    training = {"epochs": 6, "window": 12, "batch_tokens": 100, "learning_rate": 0.01, "averaging": 0.9}
    return RunConfig.model_validate({"model": model, "epochs": training | changed})


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_what_can_be_learned_is_learned(tmp_path: pathlib.Path, loss: str) -> None:
    config = settings(epochs=12, loss=loss, negatives=20, softmax_dtype="float32")
    result = run(steps_of(2), config, 0, tmp_path, lambda done, epoch: None)
    assert result.test["NDCG@10"] > 0.8  # by chance: .27
    assert result.best_epoch <= result.epochs <= 12


def test_a_request_tells_the_time_of_what_is_asked_for(tmp_path: pathlib.Path) -> None:
    """What comes next depends on nothing but how long it takes to come."""
    random = np.random.default_rng(0)
    items = random.integers(4, size=(80, 12))
    times = np.cumsum(10 ** (items + 3), axis=1)
    users = np.repeat(np.arange(80), 12)
    data = sequences(users, items.ravel(), times.ravel())
    data = dataclasses.replace(data, ids=np.arange(4))
    found = {}
    for request in (False, True):
        config = settings(epochs=10, request=request, softmax_dtype="float32")
        config = config.model_copy(update={"model": config.model.model_copy(update={"time_bias": True})})
        training = Training(data, config, 0)
        for _ in range(10):
            training.epoch()
        found[request] = training.log[-1].loss
    assert found[False] > 0.95 * math.log(4)
    assert found[True] < 0.5 * math.log(4)


def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path: pathlib.Path) -> None:
    data, config = steps_of(3), settings()
    whole = Training(data, config, seed=3)
    cut = Training(data, config, seed=3)
    for number in range(4):
        whole.epoch()
        torch.rand(7)  # what else is drawn meanwhile changes nothing
        cut.epoch()
        cut.save(tmp_path)
        cut = Training(data, config, seed=3)
        cut.resume(tmp_path)
        for mine, its in (
            (whole.model, cut.model),
            (whole.average, cut.average),
        ):
            for (name, a), b in zip(mine.state_dict().items(), its.state_dict().values(), strict=True):
                assert torch.equal(a, b), (number, name)
        assert whole.best == cut.best
        assert [dataclasses.replace(e, seconds=0) for e in whole.log] == [
            dataclasses.replace(e, seconds=0) for e in cut.log
        ]
    assert whole.result().test == cut.result().test


def test_seeds_differ_and_a_seed_repeats() -> None:
    losses = []
    for seed in (0, 1, 0):
        training = Training(steps_of(3), settings(), seed)
        training.epoch()
        losses.append(training.log[0].loss)
    assert losses[0] == losses[2] != losses[1]


def test_the_test_is_read_once_with_the_weights_that_validated_best(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    # Validation is best at the second epoch, whatever the model does.
    values = iter([0.1, 0.5, 0.2, 0.3, 0.4])
    weights = []

    def judged(model: epochs.Recommender, data: Sequences, window: int, back: int) -> dict[str, float]:
        asked.append(back)
        weights.append(model.items.detach().clone())
        found = evaluate(model, data, window, back)
        return found | ({"NDCG@10": next(values)} if back == epochs.VALIDATION else {})

    monkeypatch.setattr(epochs, "evaluate", judged)
    config, data = settings(epochs=50, patience=3), steps_of(2)
    result = run(data, config, 0, tmp_path, lambda done, epoch: None)
    assert asked == [epochs.VALIDATION] * 5 + [epochs.TEST]
    assert (result.best_epoch, result.epochs) == (2, 5)
    assert result.validation["NDCG@10"] == 0.5
    assert torch.equal(weights[-1], weights[1])
    assert not torch.equal(weights[-1], weights[4])
    again = run(data, config, 0, tmp_path, lambda done, epoch: None)
    assert again == result
    assert len(asked) == 6
    assert json.loads((tmp_path / "result.json").read_text())["test"] == result.test


def test_a_directory_of_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    training = Training(steps_of(2), settings(), 0)
    training.epoch()
    training.save(tmp_path)
    with pytest.raises(ConfigError, match=r"another config: .*a directory of its own"):
        Training(steps_of(2), settings(temperature=0.1), 0).resume(tmp_path)
    with pytest.raises(ConfigError, match="another seed: 0 instead of 1"):
        Training(steps_of(2), settings(), 1).resume(tmp_path)
