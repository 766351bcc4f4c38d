"""A partition's file: what is read back, what a kill leaves, what damage is."""

import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import pytest
from kafka.record.memory_records import MemoryRecords

from grstream.broker.batch import MAX_BATCH_BYTES
from grstream.broker.errors import CorruptLog, Refused
from grstream.broker.log import PartitionLog

batches = st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=5), min_size=1, max_size=12)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "0.log"


def values(data: bytes) -> Iterator[tuple[int, bytes]]:
    records = MemoryRecords(data)
    while records.has_next():
        for record in records.next_batch():
            yield record.offset, record.value


@hypothesis.given(batches, st.data())
def test_any_read_gives_whole_batches_from_the_one_that_holds_the_offset(record_batch, written, data):
    with tempfile.TemporaryDirectory() as folder:
        log = PartitionLog(pathlib.Path(folder) / "0.log")
        stored = [record_batch(values) for values in written]
        bases = [log.append(batch) for batch in stored]
        flat = [v for values in written for v in values]
        offset = data.draw(st.integers(0, log.end - 1))
        max_bytes = data.draw(st.integers(0, log.size + 10))
        got = log.read(offset, max_bytes)
        read = list(values(got))
        assert read[0][0] == max(b for b in bases if b <= offset)
        assert read == [(o, flat[o]) for o in range(read[0][0], read[-1][0] + 1)]
        assert read[-1][0] + 1 in [*bases, log.end]
        first = bases.index(read[0][0])
        assert len(got) <= max(max_bytes, len(stored[first]))
        following = bases.index(read[-1][0] + 1) if read[-1][0] + 1 < log.end else None
        assert following is None or len(got) + len(stored[following]) > max_bytes
        assert log.available(offset) == sum(map(len, stored[first:]))
        log.close()


@hypothesis.given(batches, st.data())
def test_wherever_a_kill_cuts_the_last_write_the_whole_batches_stay(record_batch, written, data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "0.log"
        log = PartitionLog(path)
        for one in written:
            log.append(record_batch(one))
        end, size = log.end, log.size
        torn = record_batch([b"torn" * 10])
        log.append(torn)
        log.close()
        os.truncate(path, size + data.draw(st.integers(0, len(torn) - 1)))
        again = PartitionLog(path)
        assert (again.end, again.size, path.stat().st_size) == (end, size, size)
        assert again.append(record_batch([b"next"])) == end
        assert list(values(again.read(0, 1 << 20))) == [
            *enumerate(v for one in written for v in one),
            (end, b"next"),
        ]
        again.close()


@hypothesis.given(st.data())
def test_damage_that_no_kill_leaves_is_an_error_and_the_file_is_not_touched(record_batch, data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "0.log"
        log = PartitionLog(path)
        for i in range(3):
            log.append(record_batch([b"%d" % i * 20]))
        log.close()
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        # Not the length (a longer batch is a torn one) nor the leader epoch (no checksum covers it).
        in_batch = at % (len(content) // 3)
        hypothesis.assume(not 8 <= in_batch < 16)
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(CorruptLog, match="cut it to"):
            PartitionLog(path)
        assert path.read_bytes() == bytes(content)


def test_a_full_disk_refuses_the_batch_and_leaves_the_log_as_it_was(path, record_batch, monkeypatch):
    log = PartitionLog(path)
    log.append(record_batch([b"one"]))
    pwrite = os.pwrite

    def half_then_full(file: int, data: memoryview, at: int) -> int:
        monkeypatch.setattr(os, "pwrite", full)
        return pwrite(file, data[: len(data) // 2], at)

    def full(file: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", half_then_full)
    with pytest.raises(Refused, match="No space"):
        log.append(record_batch([b"two"]))
    monkeypatch.undo()
    assert path.stat().st_size == log.size
    assert log.append(record_batch([b"three"])) == 1
    assert [v for _, v in values(log.read(0, 1 << 20))] == [b"one", b"three"]
    log.close()


def test_a_producer_that_repeats_itself_after_a_restart_is_known(path, record_batch):
    log = PartitionLog(path)
    for sequence in (0, 1, 2):
        log.append(record_batch([b"%d" % sequence], producer_id=9, epoch=0, sequence=sequence))
    log.close()
    again = PartitionLog(path)
    assert again.append(record_batch([b"1"], producer_id=9, epoch=0, sequence=1)) == 1
    with pytest.raises(Refused, match="expected 3"):
        again.append(record_batch([b"4"], producer_id=9, epoch=0, sequence=4))
    assert again.append(record_batch([b"3"], producer_id=9, epoch=0, sequence=3)) == 3
    assert again.end == 4
    again.close()


def test_sequence_numbers_go_round(path, record_batch):
    log = PartitionLog(path)
    log.append(record_batch([b"a", b"b"], producer_id=9, epoch=0, sequence=2**31 - 2))
    assert log.append(record_batch([b"c"], producer_id=9, epoch=0, sequence=0)) == 2
    log.close()


def test_a_deleted_prefix_stays_deleted(path, record_batch):
    log = PartitionLog(path)
    log.append(record_batch([b"a", b"b", b"c"]))
    log.delete_before(2)
    log.close()
    again = PartitionLog(path)
    assert (again.start, again.end) == (2, 3)
    with pytest.raises(Refused, match="outside 2 to 3"):
        again.available(1)
    again.close()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda b: b[:30], "no record batch"),
        (lambda b: b[:-1], "checksum"),
        (lambda b: b + b, "more than one batch"),
        (lambda b: b[:16] + b"\x01" + b[17:], "magic 1"),
        (lambda b: b + bytes(MAX_BATCH_BYTES), "at most"),
    ],
)
def test_what_is_no_sound_batch_is_refused(spoil, why, path, record_batch):
    log = PartitionLog(path)
    with pytest.raises(Refused, match=why):
        log.append(spoil(record_batch([b"value"])))
    assert (log.end, path.stat().st_size) == (0, 0)
    log.close()
