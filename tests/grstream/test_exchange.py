"""Versions by the object store of one cluster are those of storage, and none is missed when it is away."""

import pathlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from grstream.exchange import NAMESPACE, Exchange
from grstream.publisher import Publisher
from grstream.weight_files import ROWS, TOUCHED
from grstream.weight_store import WeightStore
from grstream.weights import CorruptWeights, Delta, Manifest, Weights, WeightsVersion
from tests.grstream.publishing import Run, assert_same, failing, make_config

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def run(cluster: None, tmp_path: pathlib.Path) -> Iterator[Run]:
    """A run whose versions go by storage and object store."""
    made = Run(make_config(tmp_path, base_every=4, vocabulary_rows=100))
    exchange = Exchange(tmp_path)
    exchange.open(keep=2)
    made.publisher = Publisher(made.config, made.learner, exchange)
    yield made
    made.publisher.close()
    exchange.close()


def reader(run: Run) -> WeightStore:
    return WeightStore(run.config.storage / "weights", Exchange(run.config.storage))


def damage(run: Run, number: int, file: str) -> None:
    (run.config.storage / "weights" / f"v{number:010d}" / file).write_bytes(b"x")


def actor(run: Run) -> ray.actor.ActorHandle:
    return ray.get_actor(f"weights of {run.config.storage}", NAMESPACE)


def given(source: WeightStore, number: int) -> WeightsVersion:
    version = source.instead_of(number)
    assert version is not None
    return version


def test_without_ray_or_an_actor_nothing_is_found_and_storage_is_used(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path))
    run.learn([2, 4])
    run.publish()
    source = reader(run)
    assert_same(given(source, 0).weights, run.published[1])
    began = time.monotonic()
    source.wait(0.05)
    assert time.monotonic() - began >= 0.05
    assert ray.is_initialized() is False, "a reader starts no cluster"


@pytest.mark.ray_cluster
class TestCluster:
    def test_a_base_and_deltas_come_from_the_object_store_bit_for_bit(self, run: Run) -> None:
        run.learn(list(range(100)))
        run.publish()
        damage(run, 1, ROWS)  # so that storage cannot be where it comes from
        follower = reader(run)
        held = given(follower, 0)
        assert_same(held.weights, run.published[1])
        for step in range(3):
            run.learn([2 * step, 200 + step], seed=step)
            run.publish()
            damage(run, step + 2, TOUCHED)
        followed, late = given(follower, 1), given(reader(run), 0)
        for version in (followed, late):
            assert_same(version.weights, run.published[4])
            assert all(array.flags.writeable for array in version.weights.dense.values())
        assert followed.changed is not None
        assert_same(held.weights, run.published[1])
        with pytest.raises(CorruptWeights):
            WeightStore(run.config.storage / "weights").load(4)

    def test_what_a_publisher_put_outlives_it(self, run: Run) -> None:
        run.learn([2, 4])
        run.publish()

        @ray.remote
        class Rank:
            def offer(self, exchange: Exchange, manifest: Manifest, weights: Weights) -> None:
                exchange.offer(manifest, weights, None)

        wide = np.arange(300_000, dtype=np.float32).reshape(-1, 4)  # too large to travel within a message
        weights = Weights({}, np.arange(len(wide)), wide, np.ones(len(wide), np.bool_), item_names={1: "one"})
        manifest = run.store.manifest(1).model_copy(update={"number": 7})
        rank, exchange = Rank.remote(), Exchange(run.config.storage)
        ray.get(rank.offer.remote(exchange, manifest, weights))
        ray.kill(rank)
        found = exchange.weights(manifest)
        assert found is not None
        assert_same(found, weights)

    def test_a_newer_base_takes_the_place_of_the_one_before(self, run: Run) -> None:
        for step in range(6):
            run.learn([2, step * 2 + 4], seed=step)
            run.publish()
        exchange = Exchange(run.config.storage)
        manifests = {number: run.store.manifest(number) for number in run.store.numbers()}
        manifests[1] = manifests[5].model_copy(update={"number": 1})
        held = {
            number: (exchange.weights(manifest) is not None, exchange.delta(manifest) is not None)
            for number, manifest in manifests.items()
        }
        assert held == {
            1: (False, False),
            5: (True, True),  # which followers of 4 go on by
            6: (False, True),
        } | {number: (False, number >= 3) for number in held if 1 < number < 5}
        other = manifests[5].model_copy(update={"lineage": "another"})
        assert exchange.weights(other) is None

    def test_waiting_ends_when_a_version_comes_and_otherwise_in_time(self, run: Run) -> None:
        run.learn([2, 4])
        run.publish()
        source = reader(run)
        source.wait(PATIENCE_S)  # tells of version 1
        began = time.monotonic()
        source.wait(0.2)
        assert 0.2 <= time.monotonic() - began < PATIENCE_S / 2
        run.learn([2], seed=1)
        later = threading.Timer(0.3, run.publish)
        later.start()
        source.wait(PATIENCE_S)
        later.join()
        assert time.monotonic() - began < PATIENCE_S / 2
        assert given(source, 1).number == 2

    def test_an_actor_that_dies_is_done_without_and_filled_again(self, run: Run) -> None:
        run.learn(list(range(50)))
        run.publish()
        follower = reader(run)
        held = given(follower, 0)
        ray.kill(actor(run), no_restart=False)
        run.learn([3, 60], seed=1)
        run.publish()
        held = given(follower, held.number)
        assert_same(held.weights, run.published[2])
        until = time.monotonic() + PATIENCE_S
        exchange = Exchange(run.config.storage)
        while True:
            run.learn([5], seed=2)
            number = run.publish()
            if exchange.delta(run.store.manifest(number)) is not None:
                break
            assert time.monotonic() < until
            time.sleep(0.2)
        assert_same(given(follower, held.number).weights, run.published[number])
        assert_same(given(reader(run), 0).weights, run.published[number])

    def test_a_version_that_is_not_durable_is_not_in_the_object_store(self, run: Run) -> None:
        run.learn([2, 4])
        run.publish()
        run.learn([2], seed=1)
        with failing("writing", run.config.storage / "weights"), pytest.raises(OSError, match="read-only"):
            run.publish()
        exchange = Exchange(run.config.storage)
        lost = run.store.manifest(1).model_copy(update={"number": 2})
        assert exchange.delta(lost) is None

    def test_a_reader_killed_while_it_reads_leaves_the_others_whole(self, run: Run) -> None:
        run.learn(list(range(100)))
        run.publish()

        @ray.remote
        class Replica:
            def follow(self, storage: str) -> None:
                source = WeightStore(f"{storage}/weights", Exchange(storage))
                while True:
                    source._held = None
                    source.instead_of(0)

        replica = Replica.remote()
        replica.follow.remote(str(run.config.storage))
        time.sleep(1)
        ray.kill(replica)
        run.learn([7], seed=3)
        number = run.publish()
        assert_same(given(reader(run), 0).weights, run.published[number])


class Offered:
    """An exchange that notes what it was given, and what was in storage by then."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.got: list[tuple[int, bool, bool, list[int]]] = []

    def offer(self, manifest: Manifest, weights: Weights | None, delta: Delta | None) -> None:
        self.got.append(
            (manifest.number, weights is not None, delta is not None, self.store.numbers()),
        )


def test_a_version_is_offered_once_it_is_durable(tmp_path: pathlib.Path) -> None:
    run = Run(make_config(tmp_path, base_every=2))
    offered = Offered(run.store)
    run.publisher = Publisher(run.config, run.learner, offered)
    for step in range(2):
        run.learn([2, 4], seed=step)
        run.publish()
    run.learn([2], seed=3)
    with failing("writing", tmp_path / "weights"), pytest.raises(OSError, match="read-only"):
        run.publish()
    run.publish()
    assert offered.got == [
        (1, True, False, [1]),
        (2, False, True, [1, 2]),
        (3, True, True, [1, 2, 3]),
    ]
