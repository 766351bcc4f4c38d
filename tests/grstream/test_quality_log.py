"""The log of quality: whole files, few of them, and rows that a crash undid."""

import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grstream import quality_log
from grstream.journal import Mark
from grstream.quality_log import QualityLog, Row, read, undone

RUN, OTHER = "1700000000000-0000000a", "1700000000001-0000000b"
NOW = time.time_ns() // 1_000_000


def rows(number: int) -> list[Row]:
    return [
        Row("step", number),
        Row("ne", number / 2, "1h", "all", "click", events=10),
        Row("lag", 3, partition=2),
    ]


def written(
    directory: pathlib.Path, count: int, run: str = RUN, keep_days: float = 90, first: int = 0
) -> None:
    log = QualityLog(directory, run, keep_days)
    for i in range(first, first + count):
        log.append(Mark(run, i), 1000 + i, rows(i), NOW + i)
    log.close()


def steps(table: pa.Table) -> list[float]:
    return [row["value"] for row in table.to_pylist() if row["figure"] == "step"]


def test_what_was_written_is_read_in_order(tmp_path: pathlib.Path) -> None:
    written(tmp_path, 3)
    table = read(tmp_path)
    assert table.schema == quality_log.SCHEMA
    assert steps(table) == [0, 1, 2]
    assert table.slice(4, 1).to_pylist() == [
        {
            **{"at_ms": NOW + 1, "run": RUN, "entries": 1, "event_ms": 1001},
            **{"window": "1h", "slice": "all", "action": "click", "partition": None},
            **{"figure": "ne", "value": 0.5, "events": 10},
        }
    ]
    assert steps(read(tmp_path, since_ms=NOW + 2)) == [2]


def test_months_of_entries_are_few_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_log, "FAN", 3)
    written(tmp_path, 3**3 + 3**2 + 2)
    # By how often they were merged, at most SIZES times: one of 27, one of 9, and two of one.
    assert sorted(len(steps(pq.read_table(f))) for f in tmp_path.iterdir()) == [1, 1, 9, 27]
    assert steps(read(tmp_path)) == list(range(38))


def test_a_crash_in_the_middle_of_a_merge_changes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 4)
    parts = {f: f.read_bytes() for f in tmp_path.iterdir()}
    written(tmp_path, 1, OTHER, first=4)  # merges what the run before it left
    assert len(list(tmp_path.iterdir())) == 2
    for file, content in list(parts.items())[:3]:  # which a crash would have left
        file.write_bytes(content)
    (tmp_path / f"{quality_log.SCRATCH}half.parquet").write_bytes(b"PAR1")
    assert steps(read(tmp_path)) == [0, 1, 2, 3, 4]
    written(tmp_path, 0, "1700000000002-0000000c")
    assert len(list(tmp_path.iterdir())) == 2
    assert steps(read(tmp_path)) == [0, 1, 2, 3, 4]


def test_a_reader_beside_a_merge_reads_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 4)
    listed = quality_log._list(tmp_path)
    written(tmp_path, 1, OTHER, first=4)
    now = quality_log._list
    answers = iter([listed])
    monkeypatch.setattr(quality_log, "_list", lambda directory: next(answers, None) or now(directory))
    assert steps(read(tmp_path)) == [0, 1, 2, 3, 4]


def test_entries_of_one_millisecond_are_kept_apart(tmp_path: pathlib.Path) -> None:
    log = QualityLog(tmp_path, RUN, 90)
    for i in range(5):
        log.append(Mark(RUN, i), 0, rows(i), NOW)
    log.close()
    assert steps(read(tmp_path)) == [0, 1, 2, 3, 4]


def test_what_is_older_than_the_log_reaches_back_goes(tmp_path: pathlib.Path) -> None:
    written(tmp_path, 2)
    log = QualityLog(tmp_path, OTHER, keep_days=0)
    log.append(Mark(OTHER, 0), 0, rows(7), NOW + 1_000_000)
    log.close()
    assert steps(read(tmp_path)) == [7]


def test_no_log_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was trained"):
        read(tmp_path)


def test_a_write_that_failed_is_raised_at_the_next_entry(tmp_path: pathlib.Path) -> None:
    log = QualityLog(tmp_path / "log", RUN, 90)
    log.append(Mark(RUN, 0), 0, rows(0), NOW)
    log._writing.result()
    for file in (tmp_path / "log").iterdir():
        file.unlink()
    (tmp_path / "log").rmdir()
    log.append(Mark(RUN, 1), 0, rows(1), NOW + 1)
    with pytest.raises(FileNotFoundError):
        log.append(Mark(RUN, 2), 0, rows(2), NOW + 2)


def test_rows_beyond_what_was_built_upon_are_undone(tmp_path: pathlib.Path) -> None:
    written(tmp_path, 4)
    written(tmp_path, 2, OTHER, first=4)
    table = read(tmp_path)
    gone = undone(table, [Mark(OTHER, 10**9), Mark(RUN, 2)])
    assert steps(table.filter(pa.array(~gone))) == [0, 1, 2, 4, 5]
    assert undone(table, [Mark(OTHER, 10**9)]).sum() == 4 * len(rows(0))
    assert not np.any(undone(table.slice(0, 0), []))
