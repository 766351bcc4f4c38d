"""A checkpoint is complete or absent, verified, and one link of one chain."""

import concurrent.futures
import pathlib
import time

import pytest

from grstream import checkpoints
from grstream.checkpoints import (
    CheckpointConflict,
    CheckpointStore,
    CorruptCheckpoint,
    PartMissing,
    Record,
)
from grstream.ledger import Disposition, Ledger, OffsetRange

LEDGER = Ledger([OffsetRange(0, 0, 10, Disposition.TRAINED), OffsetRange(1, 5, 6, Disposition.DEAD_LETTER)])


def record(number: int) -> Record:
    return Record(number=number, run="r", entries=3, step=7, events=10, newest_event_ms=1, created_ms=0)


def save(directory: pathlib.Path) -> None:
    (directory / "learner.pt").write_bytes(b"weights")


@pytest.fixture
def store(tmp_path: pathlib.Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_an_empty_store_has_no_newest_checkpoint(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.numbers() == []


def test_a_checkpoint_comes_back_with_its_ledger_and_the_learners_files(store: CheckpointStore) -> None:
    store.write(record(1), LEDGER, save)
    found = store.newest()
    assert found is not None
    assert list(found.ledger) == list(LEDGER)
    assert (found.record.number, found.record.step, found.record.events) == (1, 7, 10)
    assert (found.directory / "learner.pt").read_bytes() == b"weights"


def test_a_save_that_fails_leaves_nothing_behind(store: CheckpointStore, tmp_path: pathlib.Path) -> None:
    def fail(directory: pathlib.Path) -> None:
        save(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write(record(1), LEDGER, fail)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_number_is_written_once(store: CheckpointStore) -> None:
    store.write(record(2), LEDGER, save)
    for number in (1, 2):
        with pytest.raises(CheckpointConflict):
            store.write(record(number), LEDGER, save)


def test_of_two_trainers_at_the_same_number_one_loses(store: CheckpointStore) -> None:
    def overtaken(directory: pathlib.Path) -> None:
        save(directory)
        store.write(record(1), LEDGER, save)

    with pytest.raises(CheckpointConflict):
        store.write(record(1), LEDGER, overtaken)
    assert store.numbers() == [1]


@pytest.mark.parametrize("file", ["learner.pt", "ledger.arrow", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before_it(
    store: CheckpointStore, file: str, damage: str
) -> None:
    store.write(record(1), LEDGER, save)
    path = store.write(record(2), LEDGER, save).directory / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(CorruptCheckpoint, match=file):
        store.load(2)
    found = store.newest()
    assert found is not None
    assert found.record.number == 1
    store.write(record(3), LEDGER, save)
    newest = store.newest()
    assert newest is not None
    assert newest.record.number == 3


def test_the_parts_of_other_ranks_are_waited_for_and_verified_as_all_files(store: CheckpointStore) -> None:
    def part(rank: int, text: bytes) -> None:
        store.write_part(1, "r", rank, lambda directory: _write(directory / f"part-{rank}", text))

    store.write_part(1, "an earlier run", 1, lambda directory: _write(directory / "part-1", b"stale"))
    part(2, b"two")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.write, record(1), LEDGER, save, 3)
        time.sleep(0.1)
        assert not writing.done()
        assert store.numbers() == []
        part(1, b"one")
        found = writing.result()
    assert (found.directory / "part-1").read_bytes() == b"one"
    assert (found.directory / "part-2").read_bytes() == b"two"
    assert {"part-1", "part-2", "learner.pt"} < found.record.files.keys()
    (found.directory / "part-2").write_bytes(b"too")
    with pytest.raises(CorruptCheckpoint, match="part-2"):
        store.load(1)


def _write(path: pathlib.Path, text: bytes) -> None:
    path.write_bytes(text)


def test_a_part_that_does_not_come_is_an_error_that_names_the_rank(
    store: CheckpointStore, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PARTS_WAIT_S", 0.05)
    with pytest.raises(PartMissing, match=r"rank 1 did not write its part of checkpoint 1"):
        store.write(record(1), LEDGER, save, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_pruning_keeps_the_newest(store: CheckpointStore) -> None:
    for number in range(1, 6):
        store.write(record(number), LEDGER, save)
    store.prune(2)
    assert store.numbers() == [4, 5]
