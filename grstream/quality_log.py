"""The log of quality: what a trainer said of itself at one time and another, as Parquet for months.

An entry is a small table: a row per figure, with the windows, slices, actions or partition that it is of. It
is a file at once, whole or absent; files are then merged, and merged again, so that a trainer that runs for
months leaves some hundred, until they are older than the log is to reach back.

Entries name the run and how far its journal was, so that figures can be left out that a crash has undone.
"""

import concurrent.futures
import os
import pathlib
import re
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grstream.directories import sync
from grstream.journal import Mark

FAN = 30  # files of one size that become one: with an entry each 30 s a quarter of an hour, then 7.5 h, 9 d
SIZES = 3  # files merged so often are left as they are
READS = 10  # attempts to read files that are being merged
SCRATCH = ".scratch-"
_NAME = re.compile(r"(\d{13}-[0-9a-f]{8})-(\d{13})-(\d{13})\.parquet")
_DAY_MS = 24 * 3_600_000

_WORDS = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {
        "at_ms": pa.int64(),  # wall clock of the entry
        "run": _WORDS,
        "entries": pa.int64(),  # of the run's journal
        "event_ms": pa.int64(),  # event time at which the windows end, the mean over partitions
        "window": _WORDS,  # null where the figure is of the moment
        "slice": _WORDS,
        "action": _WORDS,
        "partition": pa.int32(),
        "figure": _WORDS,
        "value": pa.float64(),
        "events": pa.int64(),  # that the figure is made of
    }
)


class Row(NamedTuple):
    """A figure of an entry, and what it is of."""

    figure: str
    value: float
    window: str | None = None
    slice: str | None = None
    action: str | None = None
    partition: int | None = None
    events: int | None = None


class _File(NamedTuple):
    run: str
    first: int  # at_ms of its entries
    last: int

    @property
    def name(self) -> str:
        return f"{self.run}-{self.first:013d}-{self.last:013d}.parquet"

    def within(self, other: "_File") -> bool:
        return (
            self != other and self.run == other.run and other.first <= self.first and self.last <= other.last
        )


class QualityLog:
    """Writes one run's entries, in a thread of its own. One trainer writes to a directory at a time."""

    def __init__(self, directory: pathlib.Path, run: str, keep_days: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._run, self._keep_ms = directory, run, keep_days * _DAY_MS
        self._files: list[list[_File]] = [[] for _ in range(SIZES + 1)]  # by how often they were merged
        self._last_ms = 0
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "quality-log")
        self._writing = self._writer.submit(self._tidy)

    def append(self, mark: Mark, event_ms: int, rows: Sequence[Row], at_ms: int | None = None) -> None:
        """Add an entry. Raises what went wrong with the one before it."""
        self._writing.result()
        now = time.time_ns() // 1_000_000 if at_ms is None else at_ms
        self._last_ms = max(now, self._last_ms + 1)  # names and entries tell each other by it
        self._writing = self._writer.submit(self._write, self._last_ms, mark, event_ms, rows)

    def close(self) -> None:
        """Wait until all of it is written."""
        self._writing.result()
        self._writer.shutdown()

    def _write(self, at_ms: int, mark: Mark, event_ms: int, rows: Sequence[Row]) -> None:
        columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
        for name, value in (
            ("at_ms", at_ms),
            ("run", mark.run),
            ("entries", mark.entries),
            ("event_ms", event_ms),
        ):
            columns[name] = [value] * len(rows)
        file = _File(self._run, at_ms, at_ms)
        _put(self._directory, file, pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMA}))
        self._files[0].append(file)
        for size, files in enumerate(self._files[:SIZES]):
            if len(files) == FAN:
                self._files[size + 1].append(_merge(self._directory, files))
                files.clear()
        if not self._files[0]:
            self._forget()

    def _tidy(self) -> None:
        """What earlier runs left becomes one file a run."""
        for path in self._directory.glob(f"{SCRATCH}*"):
            path.unlink()
        files = _list(self._directory)
        for file in files:
            if any(file.within(other) for other in files):
                (self._directory / file.name).unlink()
        for run in {f.run for f in files if f.run != self._run}:
            of_run = [f for f in _list(self._directory) if f.run == run]
            if len(of_run) > 1:
                _merge(self._directory, of_run)
        self._forget()

    def _forget(self) -> None:
        """Files go whose every entry is too old."""
        oldest = time.time() * 1000 - self._keep_ms
        for file in _list(self._directory):
            if file.last < oldest:
                (self._directory / file.name).unlink()
        self._files = [[f for f in files if f.last >= oldest] for files in self._files]


def read(directory: pathlib.Path, since_ms: int = 0) -> pa.Table:
    """All entries since a time, in the order of time. Raises FileNotFoundError where there is no log."""
    lost: FileNotFoundError | None = None
    for _ in range(READS):
        files = _list(directory)
        if not files:
            raise FileNotFoundError(
                f"no log of quality in {directory}: nothing was trained with this storage"
            )
        wanted = [f for f in files if f.last >= since_ms and not any(f.within(other) for other in files)]
        try:
            tables = [pq.read_table(directory / f.name, schema=SCHEMA) for f in wanted]
        except FileNotFoundError as error:  # merged since they were listed
            lost = error
            continue
        table = pa.concat_tables([SCHEMA.empty_table(), *tables]).unify_dictionaries().combine_chunks()
        return table.filter(pc.greater_equal(table["at_ms"], since_ms)).sort_by("at_ms")
    assert lost is not None
    raise lost


def undone(table: pa.Table, kept: Iterable[Mark]) -> npt.NDArray[np.bool_]:
    """Which rows are of steps that no run in `kept` was built upon: a crash has undone them."""
    limits = {mark.run: mark.entries for mark in kept}
    runs = table["run"].combine_chunks()
    limit = np.array([limits.get(run, -1) for run in runs.dictionary.to_pylist()], np.int64)
    return table["entries"].to_numpy() > limit[runs.indices.to_numpy()]


def _list(directory: pathlib.Path) -> list[_File]:
    """By time, and one that holds others before them."""
    found = (_NAME.fullmatch(path.name) for path in directory.glob("*.parquet"))
    files = [_File(match[1], int(match[2]), int(match[3])) for match in found if match]
    return sorted(files, key=lambda f: (f.first, -f.last, f.run))


def _put(directory: pathlib.Path, file: _File, table: pa.Table) -> None:
    beside = directory / f"{SCRATCH}{file.name}"
    pq.write_table(table, beside, compression="zstd")
    sync(beside)
    os.replace(beside, directory / file.name)
    sync(directory)


def _merge(directory: pathlib.Path, files: Sequence[_File]) -> _File:
    """One file of several of a run, which then go. A reader, or a crash, in between finds what it needs."""
    merged = _File(files[0].run, min(f.first for f in files), max(f.last for f in files))
    tables = [pq.read_table(directory / f.name, schema=SCHEMA) for f in files]
    _put(directory, merged, pa.concat_tables(tables).unify_dictionaries().sort_by("at_ms"))
    for file in files:
        if file != merged:
            (directory / file.name).unlink()
    return merged
