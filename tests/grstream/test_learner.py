"""Streaming training predicts first, learns after, and its whole state can be taken up again."""

import dataclasses
import pathlib
import socket
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grstream import config
from grstream.keys import Namespace, feature_namespace, keys_of_ints
from grstream.learner import Learner, NonFiniteLoss, StepReport, _InTable
from grstream.microbatch import MicroBatch, Role
from grstream.ranks import Ranks
from grstream.shards import Asked, Fetched, Negatives, Shards
from grstream.vocabulary import DAY_MS
from grstream.weights import PRIOR, Weights
from tests.grstream.micro_batches import micro_batch, random_batches
from tests.grstream.old_checkpoints import hold_vocabulary_whole
from tests.grstream.thread_ranks import together

T = TypeVar("T")


def small_config(seed: int = 0, train: dict[str, object] | None = None, **model: object) -> config.Config:
    return config.parse(
        {
            "storage": "unused",
            "events": {"actions": ["seen", "liked"], "item_features": ["genre"]},
            "model": {"layers": 2, "dim": 8, "heads": 2, **model},
            "train": {"negatives": 8, "seed": seed, "learning_rate": 3e-3, **(train or {})},
        }
    )


def same_weights(one: Learner, other: Learner) -> bool:
    a, b = one.weights(), other.weights()
    assert a is not None
    assert b is not None
    return (
        all(np.array_equal(a.dense[name], b.dense[name]) for name in a.dense)
        and np.array_equal(a.keys, b.keys)
        and np.array_equal(a.rows, b.rows)
        and a.item_names == b.item_names
    )


def test_a_killed_and_resumed_learner_equals_one_that_never_stopped(tmp_path: pathlib.Path) -> None:
    batches = random_batches(0, 12)
    steady, first = Learner(small_config()), Learner(small_config())
    for batch in batches[:6]:
        steady.step(batch)
        first.step(batch)
    first.state().save(tmp_path)
    resumed = Learner(small_config(seed=0))
    resumed.load(tmp_path)
    for batch in batches[6:]:
        said, again = steady.step(batch), resumed.step(batch)
        assert np.array_equal(said.predictions.probabilities, again.predictions.probabilities)
    assert same_weights(steady, resumed)
    assert steady.metrics.figures() == pytest.approx(resumed.metrics.figures(), nan_ok=True)


def test_an_event_is_predicted_before_it_is_learned_from() -> None:
    """What is said of an event does not depend on what was done in it."""
    learners = Learner(small_config()), Learner(small_config())
    for batch in random_batches(1, 5):
        for learner in learners:
            learner.step(batch)
    old, item = [(1, 3, 1000), (2, 1, 2000)], 7
    said = [
        learner.step(micro_batch([(1, old, [(item, bits, 3000)])])).predictions
        for learner, bits in zip(learners, (1, 3), strict=True)
    ]
    assert np.array_equal(said[0].probabilities, said[1].probabilities)
    assert not np.array_equal(said[0].labels, said[1].labels)
    assert not same_weights(*learners), "and then it is learned from"


def test_dropout_is_off_when_the_model_is_judged() -> None:
    plain, dropping = Learner(small_config()), Learner(small_config(dropout=0.9))
    batch = random_batches(2, 1)[0]
    assert plain.step(batch).predictions.probabilities == pytest.approx(
        dropping.step(batch).predictions.probabilities, abs=1e-6
    )


def test_learning_finds_what_items_are_liked() -> None:
    learner = Learner(small_config(layers=1))
    reports = [learner.step(batch) for batch in random_batches(3, 400)]
    late = np.concatenate([r.predictions.probabilities[:, 1] for r in reports[-50:]])
    labels = np.concatenate([r.predictions.labels[:, 1] for r in reports[-50:]])
    assert late[labels].mean() > 0.8
    assert late[~labels].mean() < 0.2


def test_an_empty_batch_changes_no_embedding_and_does_not_fail() -> None:
    learner = Learner(small_config())
    learner.step(random_batches(4, 1)[0])
    before = len(learner.vocabulary)
    report = learner.step(MicroBatch.empty())
    assert len(report.predictions) == 0
    assert len(learner.vocabulary) == before


def test_a_loss_that_is_no_number_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(small_config())
    batches = random_batches(5, 2)
    learner.step(batches[0])
    with torch.no_grad():
        learner.model.start.fill_(torch.nan)
    before = learner.weights()
    with pytest.raises(NonFiniteLoss):
        learner.step(micro_batch([(99, [], [(3, 3, 1)])]))
    after = learner.weights()
    held = len(before.keys)
    assert np.array_equal(before.rows, after.rows[:held])
    assert all(np.array_equal(before.dense[k], after.dense[k], equal_nan=True) for k in before.dense)


def test_features_reach_the_prediction() -> None:
    learner = Learner(small_config())
    plain = micro_batch([(1, [], [(3, 3, 1)])], features=1)
    told = dataclasses.replace(
        plain, features=keys_of_ints(Namespace.FEATURE, np.array([[5]], np.int64).reshape(1, 1))
    )
    other = Learner(small_config())
    one, two = learner.step(plain).predictions, other.step(told).predictions
    assert not np.array_equal(one.probabilities, two.probabilities)
    assert len(other.vocabulary) == 2


def test_what_a_loss_weighs_nothing_is_not_learned() -> None:
    weighed = Learner(small_config(train={"action_weights": {"liked": 0}, "retrieval_weight": 0}))
    plain = Learner(small_config(train={"retrieval_weight": 0}))
    for batch in random_batches(3, 200):
        said = [learner.step(batch).predictions.probabilities.std(0) for learner in (weighed, plain)]
    assert said[0][1] < 0.1 < said[1][1], "liking follows the item, which is found out only where it weighs"


@pytest.mark.parametrize("full", [0, 100])
def test_the_retrieval_loss_learns_what_comes_next(full: int) -> None:
    """Each user goes round the items, so that the newest one tells the next."""
    learner = Learner(small_config(train={"full_softmax_items": full, "retrieval_weight": 1.0}))
    hits = []
    for step in range(200):
        sequences = []
        for user in range(8):
            start = (7 * user + 3 * step) % 20
            items = [(start + i) % 20 for i in range(4)]
            sequences.append((user, [(i, 1, 1) for i in items[:3]], [(items[3], 1, 2)]))
        hits.append((learner.step(micro_batch(sequences, 8 * step)).predictions.ranks == 0).mean())
    assert np.mean(hits[:20]) < 0.4
    assert np.mean(hits[-20:]) > 0.9


@pytest.mark.parametrize("full", [0, 1000])
def test_retrieval_learns_to_follow_what_is_popular_now(full: int) -> None:
    """Each day one new item is read by most, of users without a history, so nothing else tells it."""
    hits = {}
    for days in ([], [0.1]):
        rates = {"learning_rate": 0.02, "retrieval_weight": 1.0, "retrieval_temperature": 0.2}
        learner = Learner(small_config(train={"full_softmax_items": full, **rates}, popularity_days=days))
        draw, ranks = np.random.default_rng(0), []
        for step in range(120):
            day = step // 4
            items = np.where(draw.random(16) < 0.7, 100 + day, draw.integers(0, 100, 16))
            events = [(int(item), 1, DAY_MS * day) for item in items]
            sequences = [(16 * step + user, [], [event]) for user, event in enumerate(events)]
            said = learner.step(micro_batch(sequences, 16 * step)).predictions
            if step >= 80 and step % 4 == 1:  # after the item's first step
                ranks.append(said.ranks[items == 100 + day])
        hits[len(days)] = (np.concatenate(ranks) == 0).mean()
    assert hits[1] > hits[0] + 0.4


def test_a_resumed_learner_knows_what_is_popular(tmp_path: pathlib.Path) -> None:
    with_prior = small_config(popularity_days=[0.1, 7.0])
    batches = random_batches(0, 12)
    steady, resumed = Learner(with_prior), Learner(with_prior)
    for batch in batches[:6]:
        steady.step(batch)
    steady.state().save(tmp_path)
    resumed.load(tmp_path)
    for batch in batches[6:]:
        said, again = steady.step(batch), resumed.step(batch)
        assert np.array_equal(said.predictions.ranks, again.predictions.ranks)
    assert steady.weights().dense[PRIOR].any()
    assert same_weights(steady, resumed)


def test_stochastic_length_shortens_what_is_learned_from_and_says_by_how_much() -> None:
    short = config.parse(
        {
            "storage": "unused",
            "events": {"actions": ["seen"]},
            "histories": {"window": 16, "chunk": 4},
            "model": {"layers": 1, "dim": 8, "heads": 1},
            "train": {"stochastic_length": 1.1},
        }
    )
    learner = Learner(short)
    old = [(i, 1, i) for i in range(15)]
    reports = [learner.step(micro_batch([(1, old, [(3, 1, 99)])], offset)) for offset in range(40)]
    kept = [r.tokens - 2 for r in reports]  # beside a request and a candidate
    assert set(kept) == {5, 16}, "16^.55 = 4.6 events, or all of them"
    assert [r.sparsity for r in reports] == pytest.approx([1 - k / 16 for k in kept])


def _train_rank(rank: int, port: int, directory: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.set_num_threads(1)
    learner = Learner(small_config(), Ranks(rank, 2))
    _learn_part(learner)
    learner.state().save(pathlib.Path(directory))
    dist.destroy_process_group()


def _learn_part(learner: Learner) -> list[StepReport]:
    ranks = learner.ranks
    return [learner.step(_parts(batch, ranks.world)[ranks.rank]) for batch in random_batches(6, 8)]


def in_threads(learners: list[Learner], act: Callable[[Learner], T]) -> list[T]:
    """What each rank's learner returns; they were made one by one, for there is one seed for all threads."""

    def run(ranks: Ranks) -> T:
        learner = learners[ranks.rank]
        learner.ranks = learner.shards.ranks = ranks
        return act(learner)

    return together(len(learners), run)


def _parts(batch: MicroBatch, count: int) -> list[MicroBatch]:
    """The batch's sequences dealt out to ranks, of which the last may be left without any."""
    parts, rest = [], batch
    for left in range(count, 1, -1):
        first, rest = _cut(rest, -(-len(rest.users) // left))
        parts.append(first)
    return [*parts, rest]


def _cut(batch: MicroBatch, cut: int) -> tuple[MicroBatch, MicroBatch]:
    events = int(batch.lengths[:cut].sum())
    new = int((batch.roles[:events] != Role.CONTEXT).sum())
    of_sequence, of_new = ("users", "lengths"), ("labels", "partitions", "offsets")
    of_event = ("items", "actions", "times", "features", "roles")

    def part(first: bool) -> MicroBatch:
        changes = {}
        for names, at in ((of_sequence, cut), (of_event, events), (of_new, new)):
            for name in names:
                array = getattr(batch, name)
                changes[name] = array[:at] if first else array[at:]
        return dataclasses.replace(batch, **changes)

    return part(True), part(False)


def loaded(directory: pathlib.Path, world: int, train: dict[str, object] | None = None) -> list[Learner]:
    learners = [Learner(small_config(train=train), Ranks(rank, world)) for rank in range(world)]
    for learner in learners:
        learner.load(directory)
    return learners


def all_weights(learners: list[Learner]) -> Weights:
    """Of all ranks, by key."""
    found = in_threads(learners, Learner.weights)
    assert found[0] is not None
    assert found[1:] == [None] * (len(found) - 1)
    at = np.argsort(found[0].keys)
    return dataclasses.replace(
        found[0], **{name: getattr(found[0], name)[at] for name in ("keys", "rows", "items")}
    )


def test_ranks_of_a_process_each_learn_as_ranks_of_threads_do(tmp_path: pathlib.Path) -> None:
    """And what they save is taken up by any number of ranks, every row as it was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train_rank, (port, str(tmp_path)), nprocs=2)
    learners = [Learner(small_config(), Ranks(rank, 2)) for rank in range(2)]
    in_threads(learners, _learn_part)
    threads = all_weights(learners)
    assert [learner.keys for learner in learners] == [len(threads.keys)] * 2
    for world in (1, 2, 3):
        learners = loaded(tmp_path, world)
        assert sum(len(learner.vocabulary) for learner in learners) == len(threads.keys)
        found = all_weights(learners)
        assert all(np.array_equal(found.dense[name], threads.dense[name]) for name in threads.dense)
        assert np.array_equal(found.keys, threads.keys)
        assert np.array_equal(found.rows, threads.rows)
        assert np.array_equal(found.items, threads.items)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
def test_ranks_together_learn_what_one_would_that_holds_everything(
    world: int, sampled: bool, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients summed over ranks that hold the whole table alike: that is one rank with the whole batch."""
    train: dict[str, object] = {
        "full_softmax_items": 0 if sampled else 100,
        "retrieval_weight": 1.0,
        "row_optimizer": optimizer,
        "learning_rate": 1e-3,
        "row_learning_rate": 0.01,
    }
    drawn: dict[int, np.ndarray] = {}
    fetch = Shards.fetch

    def remembering(self: Shards, asked: Asked, negatives: Negatives | None) -> Fetched:
        fetched = fetch(self, asked, negatives)
        assert negatives is not None
        assert fetched.items is not None
        drawn[negatives.seed[1]] = fetched.items.keys[fetched.items.sampled]
        return fetched

    monkeypatch.setattr(Shards, "fetch", remembering)
    several = [Learner(small_config(train=train), Ranks(rank, world)) for rank in range(world)]
    said_by = in_threads(several, _learn_part)
    monkeypatch.setattr(Shards, "fetch", fetch)

    def same(self: Shards, items: np.ndarray, sizes: list[int], negatives: Negatives) -> np.ndarray:
        return self.vocabulary.lookup(drawn[negatives.seed[1]])

    monkeypatch.setattr(Shards, "_drawn", same)
    alone = Learner(small_config(train=train))
    reports = _learn_part(alone)
    for learner, said in zip(several, said_by, strict=True):
        for mine, expected in zip(said, reports, strict=True):
            of = np.argsort(mine.predictions.offsets)
            assert np.array_equal(mine.predictions.offsets[of], expected.predictions.offsets)
            np.testing.assert_allclose(
                mine.predictions.probabilities[of], expected.predictions.probabilities, atol=1e-5
            )
            assert mine.ranking_loss == pytest.approx(expected.ranking_loss, rel=1e-5)
            assert mine.retrieval_loss == pytest.approx(expected.retrieval_loss, rel=1e-5)
            assert np.array_equal(mine.predictions.ranks[of], expected.predictions.ranks)
        assert learner.metrics.figures() == pytest.approx(several[0].metrics.figures(), nan_ok=True)
    got, want = all_weights(several), all_weights([alone])
    assert np.array_equal(got.keys, want.keys)
    np.testing.assert_allclose(got.rows, want.rows, atol=1e-4)
    for name in want.dense:
        np.testing.assert_allclose(got.dense[name], want.dense[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("used", [True, False])
def test_a_checkpoint_that_holds_the_vocabulary_whole_is_taken_up(tmp_path: pathlib.Path, used: bool) -> None:
    learner = Learner(small_config())
    for batch in random_batches(0, 6):
        learner.step(batch)
    learner.state().save(tmp_path)
    hold_vocabulary_whole(tmp_path, used)
    assert same_weights(loaded(tmp_path, 1)[0], learner)
    found = all_weights(loaded(tmp_path, 2))
    assert np.array_equal(found.rows, all_weights([learner]).rows)
    again = loaded(tmp_path, 1)[0]
    for batch in random_batches(0, 8)[6:]:
        one, other = again.step(batch), learner.step(batch)
        assert np.array_equal(one.predictions.probabilities, other.predictions.probabilities)


def test_a_key_that_is_rare_is_predicted_from_its_initial_vector_and_learned_once_it_is_not() -> None:
    learner = Learner(small_config(train={"admit_after": 3, "retrieval_weight": 1.0}))
    for step in range(3):
        assert len(learner.vocabulary) == 0
        report = learner.step(micro_batch([(step, [], [(3, 1, step)])], step))
        assert report.predictions.ranks.tolist() == [-1]
    assert len(learner.vocabulary) == 1
    report = learner.step(micro_batch([(9, [(3, 1, 1), (4, 1, 2)], [(3, 1, 9)])], 9))
    assert report.predictions.ranks.tolist() == [0]
    assert len(learner.vocabulary) == 1, "that it stands in a history is no event about a key"


def test_a_learner_in_bf16_says_nearly_what_one_in_fp32_says() -> None:
    exact, reduced = Learner(small_config()), Learner(small_config(dtype="bfloat16"))
    for batch in random_batches(3, 30):
        said = [learner.step(batch).predictions.probabilities for learner in (exact, reduced)]
        assert said[1] == pytest.approx(said[0], abs=0.02)
    assert all(array.dtype == np.float32 for array in reduced.weights().dense.values())


def test_features_alone_say_who_goes_for_an_item_that_nobody_has_touched() -> None:
    """Each user goes for items of one genre, every time for another item: only the genre can be learned."""
    learner = Learner(small_config(train={"negatives": 32, "retrieval_weight": 0.5}, dim=16))
    genres = [int(key) for key in keys_of_ints(feature_namespace("item.genre"), np.arange(4))]
    random, histories = np.random.default_rng(0), {user: [] for user in range(8)}
    for step in range(60):
        new = {u: [(1000 * step + 10 * u + i, 1, 10_000 * step + i) for i in range(2)] for u in range(8)}
        sequences = [(u, histories[u], new[u]) for u in random.permutation(8).tolist()]
        batch = micro_batch(sequences, 16 * step, features=1)
        of_user = np.repeat([genres[u % 4] for u, *_ in sequences], batch.lengths)
        learner.step(dataclasses.replace(batch, features=of_user[:, None]))
        histories = {u: [*histories[u], *new[u]][-6:] for u in histories}
    # Nobody has touched these: all that is known of them is their genre.
    fresh = keys_of_ints(Namespace.ITEM, np.arange(10**6, 10**6 + 4))
    order = np.argsort(fresh)
    untouched, _ = learner.vocabulary.vectors(fresh[order])
    by_genre, _ = learner.vocabulary.vectors(np.sort(genres))
    by_genre = by_genre[np.argsort(np.argsort(genres))]
    found = learner.model.item_vectors(untouched[np.argsort(order)] + by_genre)
    batch = micro_batch([(u, histories[u], [(0, 1, 10**6)]) for u in range(8)], 0, features=1)
    of_user = np.repeat([genres[u % 4] for u in range(8)], batch.lengths)
    batch = dataclasses.replace(batch, features=of_user[:, None])
    with torch.no_grad():
        table, _ = learner.vocabulary.vectors(np.unique(np.concatenate([batch.items, genres])))
        keys = np.unique(np.concatenate([batch.items, genres]))
        places = _InTable(np.searchsorted(keys, batch.items), np.searchsorted(keys, batch.features))
        users = learner.model.user_vectors(learner._encode(batch, places, None, table, False).retrieval)
    best = (users @ found.T).argmax(1).numpy()
    assert (best == np.arange(8) % 4).mean() >= 0.75
