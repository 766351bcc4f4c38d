"""A checkpoint is complete or absent, verified, and one link of one chain."""

import pathlib

import pytest

from grstream.checkpoints import CheckpointConflict, CheckpointStore, CorruptCheckpoint, Record
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


def test_pruning_keeps_the_newest(store: CheckpointStore) -> None:
    for number in range(1, 6):
        store.write(record(number), LEDGER, save)
    store.prune(2)
    assert store.numbers() == [4, 5]
