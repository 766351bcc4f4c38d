"""A backfill: Parquet of any size, through Ray Data, into segments of the log (`grstream.segments`).

Rows become records slice by slice in parallel tasks (`grstream.records`), Ray Data sorts them by partition
and time, spilling to disk what memory does not hold, and each sorted block is written by a task of its own.
Records of one time keep the order of the files, by name, and of the rows in them, so a backfill made again
holds the same.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import glob
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import kafka
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import ray
import ray.data

from grstream.config import Config
from grstream.datasets import DatasetError
from grstream.directories import appearing, disappear, sweep, sync
from grstream.kafka import consumer, partition_count, reaching
from grstream.records import RecordMaker
from grstream.segments import (
    REJECTED,
    SCHEMA,
    Manifest,
    Partition,
    Segment,
    SegmentError,
    Segments,
    directory,
    write_manifest,
    write_segment,
)

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1 << 16  # made into records at a time: some tens of MB
MAX_TASKS = 2000  # of reading; each takes its share of the row groups
COUNTS = -1  # the partition of a row that only says in `order` how many rows of a slice were left out


class BackfillRefused(RuntimeError):
    """The backfill would lose or double events; the message says what to do."""


class _Piece(NamedTuple):
    """A row group of a file."""

    path: str
    name: str  # the path from the data's own directory on: of this file in event ids and rejections
    row_group: int
    first_in_file: int
    first: int  # of all rows
    rows: int


@dataclasses.dataclass(frozen=True)
class _Run:
    """The records of one partition within a sorted block."""

    partition: int
    start: int  # row of the block
    stop: int
    first: tuple[int, int]  # order and row of its first record and its last
    last: tuple[int, int]


def backfill(config: Config, data: str, before_ms: int | None, replace: bool = False) -> Manifest:
    """Make the storage's segments of Parquet: a file, a directory or a pattern, local or by URI.

    Data that says no offsets of its own needs `before_ms`: it is taken to hold every event whose record the
    topic took before that time. Raises BackfillRefused, DatasetError, BrokerUnavailable or TopicMissing.
    """
    target = directory(config)
    _check_unused(config, target, replace)
    partitions = partition_count(config.kafka)
    maker = RecordMaker(config, partitions, before_ms)
    if maker.of_dump and before_ms is not None:
        raise BackfillRefused(
            "data with partitions and offsets says itself where it ends: leave --before out"
        )
    starts, ends, seams = _topic(config, partitions, before_ms)
    if not maker.of_dump and before_ms is None:
        raise BackfillRefused(
            "data without replay.records.offset needs --before: the time up to which it holds every event "
            "that the topic took; what the topic took from then on is read from the topic"
        )
    filesystem, pieces = _pieces(data, maker.needed)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    with appearing(target) as scratch:
        blocks = _sorted(maker, filesystem, pieces, scratch)
        files, left_out, repeated = _written(maker, blocks, seams, scratch)
        seams = {p: files[p][-1].stop for p in files} if maker.of_dump else seams
        _check_seams(config, seams, starts, ends)
        rejected = sum(
            pyarrow.parquet.read_metadata(path).num_rows for path in sorted(scratch.glob(REJECTED))
        )
        manifest = Manifest(
            topic=config.kafka.topic,
            source=data,
            created_ms=time.time_ns() // 1_000_000,
            before_ms=before_ms,
            rows=sum(piece.rows for piece in pieces),
            records=sum(s.records for held in files.values() for s in held),
            rejected=rejected,
            left_out=left_out,
            repeated=repeated,
            holes=sum(
                held[-1].stop - held[0].start - sum(s.records for s in held) for held in files.values()
            ),
            partitions={
                p: Partition(
                    start=files[p][0].start if p in files else seam, seam=seam, files=files.get(p, [])
                )
                for p, seam in sorted(seams.items())
            },
        )
        # A dump's rows that are no events keep their offsets, and are dead letters there.
        accounted = manifest.records + left_out + repeated + (0 if maker.of_dump else rejected)
        if accounted != manifest.rows:
            raise RuntimeError(f"{manifest.rows} rows were read and {accounted} accounted for")
        write_manifest(scratch, manifest)
        _check_unused(config, target, replace)
        if target.exists():
            disappear(target)
    return manifest


def _check_unused(config: Config, target: pathlib.Path, replace: bool) -> None:
    begun = [name for name in ("checkpoints", "snapshots") if any((config.storage / name).glob("*"))]
    if begun:
        raise BackfillRefused(
            f"training has begun on {config.storage}, which has {' and '.join(begun)}: a backfill comes "
            "first. Use another storage, or move these away to begin anew"
        )
    if not target.exists():
        return
    with contextlib.suppress(SegmentError, FileNotFoundError):
        if Segments(target).claimed():
            raise BackfillRefused(
                f"training has begun with {target}: move it away, and with it what was trained from it"
            )
    if not replace:
        raise BackfillRefused(f"{target} exists, made and not yet used: say --replace to make it anew")


# -- the topic ----------------------------------------------------------------------------------------------


def _topic(
    config: Config, partitions: int, before_ms: int | None
) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """First offsets and ends of the topic's partitions, and the seams where the data does not tell them."""
    asked = [kafka.TopicPartition(config.kafka.topic, p) for p in range(partitions)]
    if before_ms is not None and before_ms > time.time() * 1000:
        raise BackfillRefused("--before lies in the future: no data can hold what has not happened yet")
    with reaching(config.kafka), contextlib.closing(consumer(config.kafka)) as log:
        begins, ends = log.beginning_offsets(asked), log.end_offsets(asked)
        found = log.offsets_for_times(dict.fromkeys(asked, before_ms)) if before_ms is not None else {}
    seams = {tp.partition: found[tp].offset if found.get(tp) else ends[tp] for tp in asked}
    late = [
        found[tp].timestamp
        for tp in asked
        if found.get(tp) and found[tp].offset <= begins[tp] != 0 and found[tp].timestamp > (before_ms or 0)
    ]
    if late:
        first = datetime.datetime.fromtimestamp(max(late) / 1000, datetime.UTC).isoformat()
        raise BackfillRefused(
            f"{config.kafka.topic} no longer has its first records, and what it has begins after --before: "
            f"what it took between would be in neither. Its last partition begins at {first}: with data up "
            "to there, say so as --before"
        )
    return {tp.partition: o for tp, o in begins.items()}, {tp.partition: o for tp, o in ends.items()}, seams


def _check_seams(config: Config, seams: dict[int, int], starts: dict[int, int], ends: dict[int, int]) -> None:
    for partition, seam in seams.items():
        if seam > ends[partition]:
            raise BackfillRefused(
                f"the data goes up to offset {seam} of partition {partition}, and {config.kafka.topic} ends "
                f"at {ends[partition]}: it is not the topic that was dumped"
            )
        if seam < starts[partition]:
            logger.warning(
                "%d offsets of partition %d are in neither the data, which ends at %d, nor the topic, which "
                "begins at %d: training will say so",
                *(starts[partition] - seam, partition, seam, starts[partition]),
            )


# -- the data -----------------------------------------------------------------------------------------------


def _pieces(data: str, needed: Sequence[str]) -> tuple[pyarrow.fs.FileSystem, list[_Piece]]:
    """The row groups of the data in the order of their files' names. Raises DatasetError."""
    filesystem, base, paths = _files(data)
    if not paths:
        raise DatasetError(f"there is no Parquet file at {data}")

    def footer(path: str) -> pyarrow.parquet.FileMetaData:
        try:
            return pyarrow.parquet.read_metadata(path, filesystem=filesystem)
        except (OSError, pa.ArrowInvalid) as error:
            raise DatasetError(f"cannot read {path} as parquet: {error}") from error

    pieces, first = [], 0
    with ThreadPoolExecutor(16) as pool:
        for path, metadata in zip(paths, pool.map(footer, paths), strict=True):
            names = metadata.schema.to_arrow_schema().names
            missing = [name for name in needed if name not in names]
            if missing:
                raise DatasetError(
                    f"{path} has no column {', '.join(missing)}, which replay asks for; "
                    f"it has {', '.join(names)}"
                )
            in_file = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                name = os.path.relpath(path, base)
                pieces.append(_Piece(path, name, group, in_file, first + in_file, rows))
                in_file += rows
            first += in_file
    if not first:
        raise DatasetError(f"{data} holds no rows")
    return filesystem, pieces


def _files(data: str) -> tuple[pyarrow.fs.FileSystem, str, list[str]]:
    """A filesystem, the directory that the data is in, and the paths of its files."""
    if "://" in data:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(data)
    else:
        filesystem, path = pyarrow.fs.LocalFileSystem(), os.path.abspath(data)
    pattern = glob.has_magic(path)
    base = path
    while glob.has_magic(base):
        base = os.path.dirname(base)
    info = filesystem.get_file_info(base)
    if info.type == pyarrow.fs.FileType.File:
        return filesystem, os.path.dirname(base), [base]
    selected = filesystem.get_file_info(pyarrow.fs.FileSelector(base, allow_not_found=True, recursive=True))
    paths = sorted(i.path for i in selected if i.type == pyarrow.fs.FileType.File)
    wanted = path if pattern else "*.parquet"
    return filesystem, base, [p for p in paths if fnmatch.fnmatchcase(p, wanted)]


# -- through Ray --------------------------------------------------------------------------------------------


def _sorted(
    maker: RecordMaker, filesystem: pyarrow.fs.FileSystem, pieces: Sequence[_Piece], scratch: pathlib.Path
) -> list[ray.ObjectRef]:
    """The records of all pieces as blocks, sorted over all of them. Rows that are no events are written."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    rows = [piece._asdict() for piece in pieces]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), MAX_TASKS)))
    made = dataset.map_batches(
        _make,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"maker": maker, "filesystem": filesystem, "scratch": scratch},
    )
    return made.sort(["partition", "order", "row"]).materialize().to_arrow_refs()


def _make(
    batch: pa.Table, maker: RecordMaker, filesystem: pyarrow.fs.FileSystem, scratch: pathlib.Path
) -> Iterator[pa.Table]:
    """What a reading task does with one piece."""
    for piece in (_Piece(**row) for row in batch.to_pylist()):
        done = 0
        with pyarrow.parquet.ParquetFile(piece.path, filesystem=filesystem) as file:
            slices = file.iter_batches(ROWS_AT_ONCE, row_groups=[piece.row_group], columns=maker.needed)
            for table in map(pa.Table.from_batches, ([part] for part in slices)):
                numbers = piece.first_in_file + done + np.arange(len(table))
                records = maker.make(table, piece.name, numbers)
                if len(records.rejected):
                    name = f"rejected-{piece.first + done:015d}.parquet"
                    pyarrow.parquet.write_table(records.rejected, scratch / name)
                    sync(scratch / name)
                yield from _with_rows(records.table, records.left_out, piece.first + done)
                done += len(table)


def _with_rows(records: pa.Table, left_out: int, first: int) -> Iterator[pa.Table]:
    row = pa.array(first + np.arange(len(records)), pa.int64())
    yield records.append_column("row", row)
    if left_out:
        counts = {"partition": [COUNTS], "order": [left_out], "offset": [0], "timestamp_ms": [0]}
        columns = {**counts, "user": [None], "key": [None], "value": [None], "row": [first]}
        yield pa.table(columns, records.schema.append(pa.field("row", pa.int64())))


def _written(
    maker: RecordMaker, blocks: Sequence[ray.ObjectRef], seams: dict[int, int], scratch: pathlib.Path
) -> tuple[dict[int, list[Segment]], int, int]:
    """Write sorted blocks; the segments by partition, and how many rows were left out, and repeated."""
    runs, left_out = _outlined(blocks)
    count = {p: sum(r.stop - r.start for r in held) for p, held in _by_partition(runs).items()}
    upcoming = {p: -1 if maker.of_dump else seams[p] - n for p, n in count.items()}
    writing = []
    for number, held in enumerate(runs):
        for run in held:
            rows = run.stop - run.start
            # Of a dump the offset before, which may come again; else the one that its first record is given.
            place = upcoming[run.partition]
            path = scratch / f"p{run.partition:05d}-{number:06d}.parquet"
            writing.append((run, _write.remote(blocks[number], run, maker.of_dump, place, path)))
            upcoming[run.partition] = run.last[0] if maker.of_dump else place + rows
    files: dict[int, list[Segment]] = {}
    repeated = 0
    for run, reference in writing:
        segment = ray.get(reference)
        if segment is not None:
            files.setdefault(run.partition, []).append(segment)
        repeated += run.stop - run.start - (segment.records if segment else 0)
    return files, left_out, repeated


def _outlined(blocks: Sequence[ray.ObjectRef]) -> tuple[list[list[_Run]], int]:
    """What each block holds, seen to be in order, and how many rows were left out."""
    runs, left_out = [], 0
    last: tuple[int, int, int] | None = None
    for held, left in ray.get([_outline.remote(block) for block in blocks]):
        left_out += left
        runs.append(held)
        for run in held:
            if last is not None and (run.partition, *run.first) <= last:
                raise RuntimeError("Ray Data's blocks are not in the order that was asked for")
            last = (run.partition, *run.last)
    return runs, left_out


def _by_partition(runs: Sequence[Sequence[_Run]]) -> dict[int, list[_Run]]:
    found: dict[int, list[_Run]] = {}
    for run in (run for held in runs for run in held):
        found.setdefault(run.partition, []).append(run)
    return found


@ray.remote
def _outline(block: pa.Table) -> tuple[list[_Run], int]:
    if not len(block):
        return [], 0
    partition: npt.NDArray[Any] = block["partition"].to_numpy()
    order, row = block["order"].to_numpy(), block["row"].to_numpy()
    starts = np.flatnonzero(np.append(True, np.diff(partition) != 0))
    stops = np.append(starts[1:], len(block))
    runs, left_out = [], 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if partition[start] == COUNTS:
            left_out += int(order[start:stop].sum())
            continue
        first, last = ((int(order[i]), int(row[i])) for i in (start, stop - 1))
        runs.append(_Run(int(partition[start]), start, stop, first, last))
    return runs, left_out


@ray.remote
def _write(block: pa.Table, run: _Run, of_dump: bool, place: int, path: pathlib.Path) -> Segment | None:
    """Write one run; None where each of its records was repeated."""
    table = block.slice(run.start, run.stop - run.start)
    offsets = table["offset"].to_numpy() if of_dump else place + np.arange(len(table))
    stop = int(offsets[-1]) + 1
    columns = {
        "offset": pa.array(offsets),
        **{name: table[name] for name in ("timestamp_ms", "user", "key", "value")},
        "forgotten": pa.array(np.zeros(len(table), np.bool_)),
    }
    written = pa.table(columns, SCHEMA)
    if of_dump:
        fresh = np.append(offsets[0] > place, offsets[1:] != offsets[:-1])
        if not fresh.any():
            return None
        written = written.filter(pa.array(fresh))
    return write_segment(path, written, stop)
