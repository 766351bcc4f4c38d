import dataclasses
import logging
import os
import pathlib
import shutil
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream import cli, keys, weight_store
from grstream.config import ModelConfig
from grstream.weight_files import DENSE, NAMES, ROWS
from grstream.weight_store import MANIFEST, MANIFEST_DIGEST, ORDERS, Orders, WeightStore
from grstream.weights import (
    Beside,
    CorruptWeights,
    Manifest,
    NonFiniteWeights,
    Recipe,
    VersionExists,
    VersionMissing,
    Weights,
    WeightsError,
)

RECIPE = Recipe(
    model=ModelConfig(layers=1, dim=4),
    actions=["click", "like"],
    features=["context.place"],
    vocabulary_seed=7,
)
FILES = [MANIFEST, MANIFEST_DIGEST, DENSE, ROWS, NAMES]


def some_weights(seed: int = 0, n: int = 5) -> Weights:
    draw = np.random.default_rng(seed)
    ids = keys.keys_of_ints(keys.Namespace.ITEM, np.arange(n))
    return Weights(
        dense={"w": draw.normal(size=(3, 4)).astype(np.float32), "bias": np.float32(seed).reshape(())},
        keys=ids,
        rows=draw.normal(size=(n, 4)).astype(np.float32),
        items=np.arange(n) % 2 == 0,
        item_names={keys.key_of(keys.Namespace.ITEM, "träd\x00"): "träd\x00"},
    )


def publish(store: WeightStore, seed: int = 0, number: int | None = None) -> Manifest:
    return store.publish(
        some_weights(seed),
        RECIPE,
        step=seed,
        positions={0: [(0, 10), (12, 13)]},
        newest_event_ms=5,
        number=number,
    )


def assert_same(a: Weights, b: Weights) -> None:
    assert a.dense.keys() == b.dense.keys()
    for name in a.dense:
        assert a.dense[name].dtype == b.dense[name].dtype
        np.testing.assert_array_equal(a.dense[name], b.dense[name])
        assert a.dense[name].shape == b.dense[name].shape
    for field in ("keys", "rows", "items"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert a.item_names == b.item_names


def file_of(directory: pathlib.Path, number: int, name: str) -> pathlib.Path:
    return directory / f"v{number:010d}" / name


def test_a_version_is_read_as_it_was_published(tmp_path: pathlib.Path) -> None:
    manifest = publish(WeightStore(tmp_path / "new" / "weights"), seed=3)
    version = WeightStore(tmp_path / "new" / "weights").load(1)
    assert version.manifest == manifest
    assert version.manifest.recipe == RECIPE
    assert_same(version.weights, some_weights(3))


def test_a_version_says_which_offsets_it_has_learned_from(tmp_path: pathlib.Path) -> None:
    manifest = publish(WeightStore(tmp_path))
    assert [o for o in range(-1, 20) if manifest.covers(0, o)] == [*range(10), 12]
    assert not manifest.covers(1, 0)


def test_an_empty_store_has_nothing_newer(tmp_path: pathlib.Path) -> None:
    store = WeightStore(tmp_path / "absent")
    assert store.numbers() == []
    assert store.instead_of(0) is None


def test_item_keys_are_turned_back_into_the_ids_they_came_from() -> None:
    held = some_weights()
    assert [held.item_id(k) for k in held.keys.tolist()] == [0, 1, 2, 3, 4]
    assert held.item_id(keys.key_of(keys.Namespace.ITEM, "träd\x00")) == "träd\x00"


@given(st.lists(st.integers(0, 12), max_size=12))
def test_numbers_strictly_go_up(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    directory = tmp_path_factory.mktemp("store")
    store = WeightStore(directory)
    newest = 0
    for number in numbers:  # 0 stands for "the next one"
        if 0 < number <= newest:
            with pytest.raises(VersionExists, match=str(newest)):
                publish(store, number=number)
        else:
            newest = publish(store, number=number or None).number
        assert max(store.numbers(), default=0) == newest
    assert not list(directory.glob(".scratch-*"))


def test_of_two_publishers_of_one_number_the_second_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(WeightStore(tmp_path), seed=1, number=4)
    late = WeightStore(tmp_path)
    monkeypatch.setattr(late, "numbers", list)  # it listed the store before the other one published
    with pytest.raises(VersionExists, match="another publisher"):
        publish(late, seed=2, number=4)
    assert_same(late.load(4).weights, some_weights(1))
    assert os.listdir(tmp_path) == ["v0000000004"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named_and_never_served(
    tmp_path: pathlib.Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = WeightStore(tmp_path)
    publish(store, seed=1)
    publish(store, seed=2)
    path = file_of(tmp_path, 2, name)
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1]), lambda: path.unlink()):
        damage()
        with pytest.raises(CorruptWeights, match=r"manifest|" + name) as caught:
            store.load(2)
        assert caught.value.number == 2
    with caplog.at_level(logging.ERROR):
        version = store.instead_of(0)
        assert version is not None
        assert version.number == 1
        assert store.instead_of(1) is None
    assert len([r for r in caplog.records if "version 2 is corrupt" in r.message]) == 1
    publish(store, seed=3)
    assert store.instead_of(1).number == 3


@pytest.mark.parametrize("name", FILES)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("store")
    store = WeightStore(directory)
    publish(store)
    path = file_of(directory, 1, name)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(CorruptWeights):
        store.load(1)


@pytest.mark.parametrize("written", range(len(FILES)))
def test_a_publisher_that_dies_between_files_leaves_no_version(tmp_path: pathlib.Path, written: int) -> None:
    store = WeightStore(tmp_path)
    publish(store, seed=1)
    child = os.fork()
    if not child:
        write, calls = weight_store._write, []

        def write_until_killed(path: pathlib.Path, data: bytes) -> None:
            if len(calls) == written:
                path.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(path)
            write(path, data)

        weight_store._write = write_until_killed
        publish(store, seed=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = list(tmp_path.glob(".scratch-*"))
    assert len(left) == 1
    again = WeightStore(tmp_path)
    assert again.numbers() == [1]
    assert again.instead_of(1) is None
    assert publish(again, seed=3).number == 2
    again.prune(keep=2)
    assert left[0].exists(), "a young scratch directory may have a living writer"
    os.utime(left[0], (0, 0))
    again.prune(keep=2)
    assert sorted(os.listdir(tmp_path)) == ["v0000000001", "v0000000002"]


def test_pruning_keeps_the_newest_and_never_lets_a_number_come_back(tmp_path: pathlib.Path) -> None:
    store = WeightStore(tmp_path)
    for seed in range(4):
        publish(store, seed)
    assert store.prune(keep=2) == [1, 2]
    assert store.numbers() == [3, 4]
    with pytest.raises(VersionMissing, match="no weights version 1"):
        store.load(1)
    assert store.prune(keep=1) == [3]
    assert publish(store).number == 5
    with pytest.raises(ValueError, match="at least 1"):
        store.prune(keep=0)


def test_a_reader_beside_a_publisher_that_prunes_sees_whole_versions_in_rising_order(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        store = WeightStore(tmp_path)
        try:
            for seed in range(1, 60):
                publish(store, seed)
                store.prune(keep=1)
        except OSError as error:
            failures.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader, seen = WeightStore(tmp_path), 0
    while not done.is_set() or seen < 59:
        assert not failures, failures
        version = reader.instead_of(seen)
        if version is not None:
            assert version.number > seen
            assert version.manifest.step == version.number
            assert_same(version.weights, some_weights(version.number))
            seen = version.number
    writer.join()
    assert "corrupt" not in caplog.text


def test_a_version_copied_under_another_number_is_not_that_number(tmp_path: pathlib.Path) -> None:
    store = WeightStore(tmp_path)
    publish(store)
    shutil.copytree(tmp_path / "v0000000001", tmp_path / "v0000000009")
    with pytest.raises(CorruptWeights, match="number 1; expected 2, 9"):
        store.load(9)


def test_a_version_that_a_reader_rejects_is_passed_over_for_an_older_one(tmp_path: pathlib.Path) -> None:
    store = WeightStore(tmp_path)
    publish(store)
    publish(store)
    store.reject(2)
    assert store.instead_of(0).number == 1
    assert store.instead_of(1) is None
    assert WeightStore(tmp_path).instead_of(0).number == 2


@pytest.mark.parametrize("where", ["dense", "rows"])
def test_weights_that_are_not_finite_are_never_published(tmp_path: pathlib.Path, where: str) -> None:
    store, good = WeightStore(tmp_path), some_weights()
    spoiled = {"dense": {**good.dense, "w": np.full((3, 4), np.inf, np.float32)}, "rows": good.rows * np.nan}
    bad = dataclasses.replace(good, **{where: spoiled[where]})
    with pytest.raises(NonFiniteWeights, match=r"step 3 are not published: (w|the embedding rows)"):
        store.publish(bad, RECIPE, step=3, positions={}, newest_event_ms=5)
    assert store.numbers() == []


def test_a_pinned_version_is_served_and_kept_until_it_is_unpinned(tmp_path: pathlib.Path) -> None:
    store, scorer = WeightStore(tmp_path), WeightStore(tmp_path)
    for seed in range(3):
        publish(store, seed)
    store.pin(1)
    assert scorer.instead_of(3).number == 1
    assert scorer.instead_of(1) is None
    publish(store, 3)
    assert store.prune(keep=1) == [2, 3]
    assert scorer.instead_of(1) is None
    store.pin(None)
    assert scorer.instead_of(1).number == 4


def test_rollback_withdraws_what_is_newer_and_lets_later_versions_through(tmp_path: pathlib.Path) -> None:
    store, scorer = WeightStore(tmp_path), WeightStore(tmp_path)
    for seed in range(4):
        publish(store, seed)
    assert store.rollback() == 3
    assert scorer.instead_of(4).number == 3
    assert store.rollback() == 2
    assert scorer.instead_of(3).number == 2
    assert scorer.instead_of(2) is None
    assert store.prune(keep=1) == [1, 3], "what is to be served stays, and so does the newest number"
    assert scorer.instead_of(0).number == 2
    assert publish(store, 9).number == 5
    assert scorer.instead_of(2).number == 5
    store.pin(2)
    assert store.rollback(to=2) == 2
    assert store.orders() == Orders(withdrawn=[4, 5]), "a rollback ends a pin"
    with pytest.raises(VersionMissing, match="withdrawn"):
        store.rollback(to=4)
    with pytest.raises(VersionMissing, match="no older"):
        store.rollback()


def test_an_ab_test_keeps_its_version_and_ends_with_its_withdrawal(tmp_path: pathlib.Path) -> None:
    store = WeightStore(tmp_path)
    for seed in range(3):
        publish(store, seed)
    store.begin_ab(2, 0.25)
    assert WeightStore(tmp_path).beside() == Beside(number=2, share=0.25)
    assert store.instead_of(0).number == 3, "the others are served the newest"
    for seed in range(3, 6):
        publish(store, seed)
    assert store.prune(keep=1) == [1, 3, 4, 5]
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            store.begin_ab(2, share)
    with pytest.raises(VersionMissing, match="no weights version 3"):
        store.begin_ab(3, 0.5)
    assert store.beside() == Beside(number=2, share=0.25)
    publish(store, 6)
    assert store.rollback(to=6) == 6
    assert store.beside() == Beside(number=2, share=0.25), "it is older than what was withdrawn"
    store.begin_ab(6, 0.5)
    assert store.rollback(to=2) == 2
    assert store.beside() is None
    store.begin_ab(2, 0.5)
    store.end_ab()
    assert store.orders() == Orders(withdrawn=[6, 7])


def test_what_cannot_be_served_is_not_ordered(tmp_path: pathlib.Path) -> None:
    store = WeightStore(tmp_path)
    publish(store)
    publish(store)
    file_of(tmp_path, 1, ROWS).write_bytes(b"x")
    for order in (
        lambda: store.pin(1),
        lambda: store.rollback(),
        lambda: store.pin(7),
        lambda: store.begin_ab(1, 0.5),
    ):
        with pytest.raises((CorruptWeights, VersionMissing)):
            order()
        assert store.orders() == Orders()
        assert store.instead_of(0).number == 2


def test_orders_that_cannot_be_read_are_an_error(tmp_path: pathlib.Path) -> None:
    publish(WeightStore(tmp_path))
    (tmp_path / ORDERS).write_text("{")
    with pytest.raises(WeightsError, match=r"orders\.json"):
        WeightStore(tmp_path).instead_of(0)


def test_the_command_lists_and_orders(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = WeightStore(tmp_path / "weights")
    publish(store)
    publish(store)
    config = tmp_path / "config.yaml"
    config.write_text(f"storage: {tmp_path}\nevents: {{actions: [click]}}\n")

    def run(*arguments: str) -> list[str]:
        assert cli.main(["weights", *arguments, "--config", str(config)]) == 0
        return capsys.readouterr().out.splitlines()[1:]

    newest, oldest = run("list")
    assert newest.split()[:3] == ["2", "0", "11"]
    assert newest.endswith("to be served")
    newest, oldest = run("pin", "1")
    assert oldest.endswith("pinned, to be served")
    newest, oldest = run("unpin")
    assert newest.endswith("to be served")
    newest, oldest = run("ab", "1", "--share", "0.1")
    assert oldest.endswith("to 10% of users")
    newest, oldest = run("ab")
    assert not oldest.endswith("users")
    newest, oldest = run("rollback")
    assert newest.endswith("withdrawn")
    assert oldest.endswith("to be served")
    assert cli.main(["weights", "pin", "9", "--config", str(config)]) == 1
    assert "no weights version 9" in capsys.readouterr().err
