"""Versions by deltas are what whole ones would be, whatever fails, is evicted, pruned or damaged."""

import contextlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from grstream import weight_store
from grstream.engine import Engine
from grstream.histories import History
from grstream.learner import Learner
from grstream.publisher import Publisher
from grstream.ranks import Ranks
from grstream.served import Served
from grstream.shards import owners
from grstream.vocabulary import DAY_MS, VocabularyState
from grstream.weight_files import OF_DELTA, TOUCHED
from grstream.weight_store import WeightStore
from grstream.weights import PRIOR, CorruptWeights, Delta, VersionMissing, Weights, WeightsVersion
from tests.grstream.publishing import DIM, Run, assert_same, failing, make_config
from tests.grstream.thread_ranks import together


class AnySequence(RuleBasedStateMachine):
    """Training, publishing, failing, restarting, pruning, orders and damage, in any order; and a reader."""

    @initialize(base_every=st.integers(1, 4), budget=st.sampled_from([None, 6]))
    def start(self, base_every: int, budget: int | None) -> None:
        self.storage = pathlib.Path(tempfile.mkdtemp())
        self.run = Run(make_config(self.storage, base_every=base_every, vocabulary_rows=budget))
        self.reader = WeightStore(self.storage / "weights")
        self.served: WeightsVersion | None = None
        self.damaged: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.publisher.close()
            shutil.rmtree(self.storage)

    @rule(
        keys=st.lists(st.integers(-9, 9), min_size=1, max_size=5, unique=True),
        history=st.booleans(),
        seed=st.integers(0, 99),
        idle=st.integers(0, 2),
    )
    def learn(self, keys: list[int], history: bool, seed: int, idle: int) -> None:
        self.run.learn(keys, history, seed, idle)

    @rule()
    def publish(self) -> None:
        self.run.publish()

    @rule(at=st.sampled_from(["writing", "syncing"]))
    def fail_to_publish(self, at: str) -> None:
        with contextlib.suppress(OSError), failing(at, self.storage / "weights"):
            self.run.publish()

    @rule()
    def restart(self) -> None:
        self.run.restart()

    @rule(place=st.floats(0, 1, exclude_max=True), pinned=st.booleans())
    def order(self, place: float, pinned: bool) -> None:
        numbers = self.run.store.numbers()
        number = numbers[int(place * len(numbers))] if numbers else 1
        with contextlib.suppress(CorruptWeights, VersionMissing):
            if pinned:
                self.run.store.pin(number)
            else:
                self.run.store.rollback(number)

    @rule()
    def unpin(self) -> None:
        if self.run.store.numbers():
            self.run.store.pin(None)

    @rule(place=st.floats(0, 1, exclude_max=True), file=st.floats(0, 1, exclude_max=True))
    def damage(self, place: float, file: float) -> None:
        numbers = self.run.store.numbers()
        if numbers:
            number = numbers[int(place * len(numbers))]
            files = sorted((self.storage / "weights" / f"v{number:010d}").iterdir())
            path = files[int(file * len(files))]
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            self.damaged.add(number)

    @rule()
    def follow(self) -> None:
        version = self.reader.instead_of(self.served.number if self.served else 0)
        if version is not None:
            assert_same(version.weights, self.run.published[version.number])
            if version.changed is not None and self.served and version.changed.since == self.served.number:
                before, after = self.served.weights, version.weights
                kept = np.setdiff1d(np.arange(len(before.keys)), version.changed.places)
                assert np.array_equal(before.keys[kept], after.keys[kept])
                assert np.array_equal(before.rows[kept], after.rows[kept])
            self.served = version

    @invariant()
    def whatever_is_served_stays_as_it_was(self) -> None:
        if hasattr(self, "run") and self.served is not None:
            assert_same(self.served.weights, self.run.published[self.served.number])

    @invariant()
    def every_version_that_can_be_read_is_whole(self) -> None:
        if not hasattr(self, "run"):
            return
        for number in self.run.store.numbers():
            try:
                found = self.run.store.load(number)
            except (CorruptWeights, VersionMissing):
                assert self.damaged
            else:
                assert_same(found.weights, self.run.published[number])

    @invariant()
    def what_is_ordered_can_be_read(self) -> None:
        if hasattr(self, "run") and not self.damaged:
            orders, numbers = self.run.store.orders(), self.run.store.numbers()
            number = orders.newest(numbers) if orders.pinned is None else orders.pinned
            if number is not None:
                self.run.store.load(number)


def test_no_sequence_makes_a_version_other_than_the_whole_one() -> None:
    run_state_machine_as_test(AnySequence, settings=settings(max_examples=40, stateful_step_count=25))


@pytest.mark.parametrize(
    ("base_every", "by"), [(7, "base"), (1000, "deltas")], ids=["bases between", "no base between"]
)
def test_a_reader_that_missed_50_versions_catches_up_bit_for_bit(
    tmp_path: pathlib.Path, base_every: int, by: str
) -> None:
    run = Run(make_config(tmp_path, base_every=base_every, vocabulary_rows=300))
    draw = np.random.default_rng(0)
    run.learn(list(range(300)))
    run.publish()
    late, prompt = WeightStore(tmp_path / "weights"), WeightStore(tmp_path / "weights")
    held, current = late.instead_of(0), prompt.instead_of(0)
    for step in range(50):
        run.learn(draw.choice(600, 4, replace=False).tolist(), seed=step)
        run.publish()
        current = prompt.instead_of(current.number)
        assert current.changed.since == current.number - 1
        assert len(current.changed.places) <= 4
    caught_up = late.instead_of(held.number)
    assert caught_up.number == current.number == held.number + 50
    assert (caught_up.changed is None) == (by == "base")
    fresh = WeightStore(tmp_path / "weights").instead_of(0)
    for version in (caught_up, current, fresh):
        assert_same(version.weights, run.published[51])


def test_a_failed_publish_loses_no_touched_key(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path))
    run.learn([2, 4, 6])
    run.publish()
    run.learn([2], seed=1)
    for at in ("writing", "syncing"):
        with failing(at, tmp_path / "weights"), pytest.raises(OSError, match=r"read-only|input/output"):
            run.publish()
        assert run.publisher.version == 1
        run.learn([8], seed=2)  # while it was away
    # Training goes on, and later is told that it went wrong.
    with failing("writing", tmp_path / "weights"):
        run.publisher.publish({}, 0)
        run.publisher._writing[1].exception()
    run.learn([4], seed=3)
    number = run.publish()
    assert run.publisher.failures == 3
    manifest = run.store.manifest(number)
    assert (manifest.previous, manifest.whole) == (1, False)
    delta = run.store._delta(manifest, OF_DELTA)
    assert delta.keys.tolist() == [2, 4, 8], "all since version 1, and key 6 was not touched"
    assert delta.item_names == {4: "item 4", 8: "item 8"}
    assert_same(run.store.load(number).weights, run.published[number])


def test_what_is_learned_while_a_version_is_written_goes_with_the_next_one(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path))
    run.learn([2, 4])
    run.publish()
    run.learn([2], seed=1)
    taken = run.learner.taken(whole=False)
    run.learn([4], seed=2)
    run.learner.vocabulary.carried(taken.mark, 1)
    assert (
        run.learner.vocabulary.touched().rows.tolist()
        == run.learner.vocabulary.lookup(np.array([4])).tolist()
    )
    assert taken.delta.keys.tolist() == [2]


def priors_of(state: VocabularyState) -> dict[int, float]:
    counts = np.exp2(state.levels - state.clock_ms / DAY_MS / np.array([1.0, 7.0]))
    return dict(zip(state.keys.tolist(), (np.log1p(counts) @ [0.5, -2.0]).tolist(), strict=True))


@settings(max_examples=15)
@given(
    steps=st.lists(st.lists(st.integers(-9, 9), max_size=6, unique=True), min_size=1, max_size=7),
    world=st.integers(1, 3),
    budget=st.sampled_from([None, 9]),
)
def test_a_version_holds_the_rows_of_all_ranks_each_in_its_place(
    steps: list[list[int]], world: int, budget: int | None
) -> None:
    storage = pathlib.Path(tempfile.mkdtemp())
    config = make_config(storage, vocabulary_rows=budget, base_every=3)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"popularity_days": [1.0, 7.0]})}
    )
    learners = [Learner(config, Ranks(rank, world)) for rank in range(world)]
    for learner in learners:
        assert learner.model.popularity is not None
        learner.model.popularity.data[:] = torch.tensor([0.5, -2.0])

    def rank(ranks: Ranks) -> list[VocabularyState]:
        learner, states = learners[ranks.rank], []
        learner.ranks = learner.shards.ranks = ranks
        publisher = Publisher(config, learner)
        for seed, keys in enumerate(steps):
            at = np.array(keys, np.int64)
            at = at[owners(at, world) == ranks.rank]
            rows = learner.vocabulary.admit(at, at % 2 == 0)
            learner.vocabulary.name({key: f"item {key}" for key in at[at % 2 == 0].tolist()})
            learner.vocabulary.count(np.array(keys, np.int64), np.full(len(keys), (seed + 1) * DAY_MS))
            gradient = torch.randn(len(rows), DIM, generator=torch.Generator().manual_seed(seed))
            learner.vocabulary.update(rows, gradient, 0.1)
            learner.steps += 1
            publisher.publish({}, 0, wait=True)
            states.append(learner.vocabulary.state())
        publisher.close()
        return states

    expected = list(zip(*together(world, rank), strict=True))
    store, follower = WeightStore(storage / "weights"), WeightStore(storage / "weights")
    served = None
    for number in store.numbers():
        states = expected[number - 1]
        held = {
            key: row.tobytes() for state in states for key, row in zip(state.keys, state.rows, strict=True)
        }
        priors = {key: prior for state in states for key, prior in priors_of(state).items()}
        items = {key for state in states for key in state.keys[state.items].tolist()}
        names = {key: name for state in states for key, name in state.item_names.items()}
        store.pin(number)
        served = follower.instead_of(served.number if served else 0) or served
        assert served is not None
        for weights in (store.load(number).weights, served.weights):
            assert {k: r.tobytes() for k, r in zip(weights.keys, weights.rows, strict=True)} == held
            assert set(weights.keys[weights.items].tolist()) == items
            prior = dict(zip(weights.keys.tolist(), weights.dense[PRIOR].tolist(), strict=True))
            assert prior == pytest.approx(priors, abs=1e-5)
            assert weights.item_names == names
    assert store.numbers()[-1] == len(steps)
    shutil.rmtree(storage)


def test_a_key_that_was_evicted_and_came_back_has_what_it_learned_since(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path, vocabulary_rows=2))
    reader = WeightStore(tmp_path / "weights")
    run.learn([2, 4])
    run.publish()
    held = reader.instead_of(0)
    run.learn([6], seed=1)  # 2 goes: of equals the first
    run.learn([8], seed=2)
    run.learn([2], seed=3)
    number = run.publish()
    followed = reader.instead_of(held.number)
    assert followed.changed.since == 1
    assert sorted(followed.weights.keys.tolist()) == [2, 8]
    assert_same(followed.weights, run.published[number])
    assert sorted(held.weights.keys.tolist()) == [2, 4], "what is served is not changed"


def test_a_key_that_was_evicted_and_comes_back_in_a_history_has_no_name(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path, vocabulary_rows=2))
    run.learn([4, 2])
    number = run.publish()
    assert run.store.load(number).weights.item_names == {4: "item 4"}
    run.learn([6, 10], seed=1)
    run.learn([4], history=True, seed=2)
    number = run.publish()
    assert not run.store.manifest(number).whole
    found = run.store.load(number).weights
    assert 4 in found.keys
    assert found.item_names == {}
    assert_same(found, run.published[number])


def test_a_copy_for_a_delta_is_of_the_touched_rows_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_config(tmp_path))
    run.learn(list(range(0, 2000, 2)))
    run.publish()
    run.learn([10, 20], seed=1)

    gather, copied = run.learner.vocabulary.gather, list[int]()

    def counted(rows: np.ndarray) -> torch.Tensor:
        copied.append(len(rows))
        return gather(rows)

    monkeypatch.setattr(run.learner.vocabulary, "gather", counted)
    taken = run.learner.taken(whole=False)
    assert copied == [2]
    assert taken.weights is None
    assert taken.delta.rows.shape == (2, DIM)


def test_a_version_whose_base_is_gone_is_followed_by_a_base(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path))
    run.learn([2, 4])
    run.publish()
    shutil.rmtree(tmp_path / "weights" / "v0000000001")
    (tmp_path / "weights" / "v0000000001").mkdir()  # damaged, so its number stays taken
    run.learn([2], seed=1)
    assert run.publish() == 2
    assert run.store.manifest(2).whole
    assert_same(run.store.load(2).weights, run.published[2])


def test_a_damaged_delta_is_passed_over_until_a_base_makes_up_for_it(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path, base_every=4, keep_versions=10))
    for step in range(4):
        run.learn([2, 4], seed=step)
        run.publish()
    (tmp_path / "weights" / "v0000000003" / TOUCHED).write_bytes(b"x")
    reader = WeightStore(tmp_path / "weights")
    assert reader.instead_of(0).number == 2, "4 builds on 3"
    assert reader.instead_of(2) is None
    assert reader.corrupt == 2
    run.learn([2], seed=9)
    run.publish()
    found = reader.instead_of(2)
    assert (found.number, found.manifest.whole) == (5, True)
    assert_same(found.weights, run.published[5])


def test_what_a_pinned_version_builds_on_is_kept(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path, base_every=5))
    for step in range(4):
        run.learn([2, 4], seed=step)
        run.publish()
    run.store.pin(3)
    for step in range(10):
        run.learn([2, 4], seed=step)
        run.publish()
    assert run.store.numbers() == [1, 2, 3, 11, 12, 13, 14]
    assert_same(WeightStore(tmp_path / "weights").instead_of(0).weights, run.published[3])
    assert run.store.rollback(to=3) == 3
    run.learn([4], seed=11)
    number = run.publish()
    assert run.store.manifest(number).previous == 14, "a withdrawn version may be built on"
    reader = WeightStore(tmp_path / "weights")
    assert reader.instead_of(3).number == number
    run.store.rollback()
    back = reader.instead_of(number)
    assert back.number == 3
    assert_same(back.weights, run.published[3])


def test_a_delta_never_goes_on_another_version_of_the_same_number(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path / "one", base_every=100))
    other = Run(make_config(tmp_path / "two", base_every=100))
    for of, seed in ((run, 1), (other, 2)):
        of.learn([2, 4], seed=seed)
        of.publish()
    reader = WeightStore(tmp_path / "one" / "weights")
    held = reader.instead_of(0)
    shutil.rmtree(tmp_path / "one" / "weights")
    other.learn([4], seed=3)
    other.publish()
    shutil.copytree(tmp_path / "two" / "weights", tmp_path / "one" / "weights")
    found = reader.instead_of(held.number)
    assert found.changed is None
    assert_same(found.weights, other.published[2])


def test_a_version_of_another_format_is_refused(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path))
    run.learn([2, 4])
    run.publish()
    directory = tmp_path / "weights" / "v0000000001"
    text = run.store.manifest(1).model_copy(update={"format": 1}).model_dump_json()
    (directory / weight_store.MANIFEST).write_text(text)
    (directory / weight_store.MANIFEST_DIGEST).write_bytes(weight_store._digest_line(text.encode()))
    with pytest.raises(CorruptWeights, match="says format 1"):
        run.store.load(1)


def test_deltas_that_do_not_fit_are_refused() -> None:
    base = Weights({}, np.arange(3), np.zeros((3, 2), np.float32), np.ones(3, np.bool_), {})

    def delta(places: list[int], size: int) -> Delta:
        n = len(places)
        rows = np.ones((n, 2), np.float32)
        return Delta(1, size, {}, np.array(places, np.int64), np.arange(n), rows, np.ones(n, np.bool_), {})

    assert base.after([delta([1, 3], 4)]).rows.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    for places, size in (([4], 5), ([0], 2), ([1], 4)):
        with pytest.raises(ValueError, match="does not fit 3"):
            base.after([delta(places, size)])
    for places in ([2, 1], [1, 1], [-1, 2], [1, 3]):
        with pytest.raises(ValueError, match=r"ascending|from 0 to 2"):
            delta(places, 3)


# -- an engine on deltas ------------------------------------------------------------------------------------


def scores(engine: Engine) -> list[Any]:
    keys = np.arange(-12, 40)
    n = 9
    past = History(
        keys[:n] * 2,
        np.ones(n, np.int32),
        np.arange(n) * 1000,
        np.empty((n, 0), np.int64),
        epoch=0,
        appended=n,
    )
    ranked = engine.rank(past, keys, 50_000)
    found = engine.retrieve(past, 1000, 50_000)
    return [
        ranked.probabilities.tobytes(),
        ranked.known.tobytes(),
        found.items.tobytes(),
        found.scores.tobytes(),
        found.names,
        found.version,
    ]


def said_of(served: Served) -> list[bytes]:
    """All that a request reads of a version."""
    vectors, known = served.table.vectors(np.arange(-12, 40))
    of_items, priors = served.index.take(np.flatnonzero(served.items))
    return [array.numpy().tobytes() for array in (vectors, of_items, priors)] + [known.tobytes()]


@settings(max_examples=30)
@given(
    steps=st.lists(
        st.lists(st.integers(-12, 30), min_size=1, max_size=8, unique=True), min_size=2, max_size=8
    ),
    polled=st.lists(st.booleans(), min_size=8, max_size=8),
    budget=st.sampled_from([None, 10]),
    base_every=st.integers(2, 9),
)
def test_an_engine_that_took_deltas_scores_as_one_built_from_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[list[int]],
    polled: list[bool],
    budget: int | None,
    base_every: int,
) -> None:
    storage = tmp_path_factory.mktemp("storage")
    run = Run(make_config(storage, base_every=base_every, vocabulary_rows=budget))
    reader, followed = WeightStore(storage / "weights"), Engine(run.config.serve)
    for step, (keys, poll) in enumerate(zip(steps, polled, strict=False)):
        run.learn(keys, history=step % 2 == 0, seed=step)
        number = run.publish()
        if not poll:
            continue
        version = reader.instead_of(followed.manifest.number if followed.manifest else 0)
        before = followed.steps.versions.newest
        held = None if before is None else said_of(before)
        followed.swap(version)
        if before is not None:
            assert said_of(before) == held, "requests under way go on with the version they began with"
        whole = Engine(run.config.serve)
        whole.swap(WeightStore(storage / "weights").load(number))
        assert scores(followed) == scores(whole)
    run.publisher.close()


FOLLOW = """
import sys
from grstream.config import ServeConfig
from grstream.engine import Engine
from grstream.served import Served
from grstream.weight_store import WeightStore
store, engine = WeightStore(sys.argv[1]), Engine(ServeConfig())
while True:
    version = store.instead_of(engine.manifest.number if engine.manifest else 0)
    if version is not None:
        print("got", version.number, flush=True)
        engine.swap(version)
        print("serving", version.number, flush=True)
"""


def test_a_reader_killed_while_it_loads_or_swaps_is_whole_after_a_restart(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path, base_every=5, vocabulary_rows=20_000))
    draw = np.random.default_rng(0)
    run.learn(list(range(20_000)))
    run.publish()

    def until(process: subprocess.Popen[str], said: Callable[[str], bool]) -> None:
        for line in process.stdout:
            if said(line):
                return
        raise AssertionError("the reader ended")

    for kill in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", FOLLOW, str(tmp_path / "weights")], stdout=subprocess.PIPE, text=True
        ) as process:
            until(process, lambda line: line.startswith("serving"))
            for _ in range(3):
                run.learn(draw.choice(40_000, 500, replace=False).tolist(), seed=kill)
                number = run.publish()
            if kill % 2:  # while it swaps; else while it reads or waits to
                until(process, lambda line, number=number: line == f"got {number}\n")
            process.send_signal(signal.SIGKILL)
            process.wait()
        reader, engine = WeightStore(tmp_path / "weights"), Engine(run.config.serve)
        version = reader.instead_of(0)
        engine.swap(version)
        assert version.number == number
        assert_same(version.weights, run.published[number])
