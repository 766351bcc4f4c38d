"""Earlier segments of the log: what a backfill made, read as if the topic had held it.

`storage/backfill/` holds Parquet files of records and `manifest.json`, which names each with its SHA-256. A
partition's log is then its segments, offsets `start` to before `seam`, and the topic from `seam` on; what the
topic holds before the seam is not read, for the segments say what happened until then. A dump of the topic
keeps its offsets; other events are given those that end at the seam, so that the log has no hole and the
window of duplicates spans the seam as it spans any place. A start may therefore be negative.

Training that begins with segments claims them (`CLAIM`); from then on they may not be replaced, and training
that began without them cannot take them up.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pydantic

from grstream.config import Config
from grstream.directories import sync
from grstream.events import Tombstones
from grstream.ledger import Ledger

logger = logging.getLogger(__name__)

FORMAT = 1  # of a backfill's files; a reader refuses another
MANIFEST, CLAIM, REJECTED = "manifest.json", "claimed", "rejected-*.parquet"
NOTES = "forget-*.json"  # of tombstones that were read: [partition, [[user key, offset], ...]]
SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("timestamp_ms", pa.int64(), nullable=False),  # of the record
        pa.field("user", pa.int64()),  # user key of whom the record speaks, null where it speaks of none
        pa.field("key", pa.binary()),  # of the record, null where the value says enough
        pa.field("value", pa.binary()),  # of the record, null in a tombstone
        pa.field("forgotten", pa.bool_(), nullable=False),
    ]
)
ROW_GROUP_ROWS = 1 << 16
_ROWS_AT_ONCE = 8192  # read at a time


class SegmentError(RuntimeError):
    """Segments cannot be used as they are; the message says what to do."""


class Record(NamedTuple):
    """A record of a segment, with the names of a Kafka client's."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class Segment(pydantic.BaseModel):
    """A file: records of one partition, ascending offsets from `start` to before `stop`."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    file: str
    start: int
    stop: int
    records: int
    newest_ms: int
    sha256: str


class Partition(pydantic.BaseModel):
    """The segments of a partition, and where they lie in its log."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    start: int
    seam: int
    files: list[Segment]


class Manifest(pydantic.BaseModel):
    """What a backfill is."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    topic: str
    source: str
    created_ms: int
    before_ms: int | None  # the seam's time; None for a dump of the topic
    rows: int  # of the source
    records: int  # in the segments; of a dump also those that are no events, which are dead letters there
    rejected: int  # rows that are no events: in rejected-*.parquet with the reasons
    left_out: int  # rows at or after the seam's time, which come by the topic
    repeated: int  # rows of a dump whose offset another row has
    holes: int  # offsets of a dump between its first and its last that no row has
    partitions: dict[int, Partition]


def directory(config: Config) -> pathlib.Path:
    """Where a storage's segments lie."""
    return config.storage / "backfill"


class Segments:
    """The segments of a storage."""

    def __init__(self, path: pathlib.Path) -> None:
        """Raises FileNotFoundError where there are none, SegmentError for what cannot be read."""
        self.path = path
        self.manifest = self._load()

    @classmethod
    def of(cls, config: Config) -> "Segments | None":
        """The storage's segments, if a backfill made any. Raises SegmentError."""
        try:
            found = cls(directory(config))
        except FileNotFoundError:
            return None
        if found.manifest.topic != config.kafka.topic:
            raise SegmentError(
                f"{found.path} was made for topic {found.manifest.topic}, not {config.kafka.topic}: correct "
                "kafka.topic, use another storage, or make the backfill again (jobs/backfill.py --replace)"
            )
        return found

    @classmethod
    def of_training(cls, config: Config, ledger: Ledger) -> "Segments | None":
        """The same for who trains on from `ledger`: claims them. Raises SegmentError if it is too late."""
        found = cls.of(config)
        if found is None or found.claimed():
            return found
        if ledger.partitions():
            raise SegmentError(
                f"{found.path} was made after training had begun without it. Move it away to train on from "
                f"the newest checkpoint, or checkpoints and snapshots in {config.storage} to begin with it"
            )
        (found.path / CLAIM).touch()
        sync(found.path)
        return found

    def claimed(self) -> bool:
        return (self.path / CLAIM).exists()

    def span(self, partition: int) -> tuple[int, int] | None:
        """Start and seam of a partition; None where all of its log is in the topic."""
        held = self.manifest.partitions.get(partition)
        return (held.start, held.seam) if held else None

    def records(self, partition: int, offset: int) -> Iterator[list[Record]]:
        """The records of a partition from an offset on, some thousands at a time.

        A file that goes away meanwhile was rewritten by `forget`: what took its place is read. Raises
        SegmentError for one that is damaged or missing.
        """
        while (segment := self._next_file(partition, offset)) is not None:
            try:
                file = self._opened(segment)
            except FileNotFoundError as error:
                self.manifest = self._load()
                if self._next_file(partition, offset) == segment:
                    raise SegmentError(
                        f"{self.path / segment.file} is missing: make the backfill anew"
                    ) from error
                continue
            with file:
                for records in _records(file, offset):
                    yield records
                    offset = records[-1].offset + 1
            offset = segment.stop

    def forgotten(self, partition: int) -> npt.NDArray[np.int64]:
        """The offsets of the records of a partition that `forget` deleted: (n,)"""
        found = [np.empty(0, np.int64)]
        for segment in self.manifest.partitions[partition].files:
            with self._opened(segment) as file:
                table = file.read(["offset", "forgotten"])
            found.append(table.filter(table["forgotten"])["offset"].to_numpy())
        return np.concatenate(found)

    def first_at(self, partition: int, time_ms: int) -> int:
        """The first offset of a partition whose record is of this time or later; else the seam."""
        held = self.manifest.partitions[partition]
        for segment in held.files:
            if segment.newest_ms >= time_ms:
                with self._opened(segment) as file:
                    table = file.read(["offset", "timestamp_ms"])
                late = np.flatnonzero(table["timestamp_ms"].to_numpy() >= time_ms)
                return int(table["offset"][int(late[0])].as_py())
        return held.seam

    def note(self, partition: int, tombstones: Tombstones) -> None:
        """Have `forget` delete what these tombstones of a partition's log forget; durable when it returns."""
        name = f"forget-p{partition:05d}-o{int(tombstones.offsets[0]):d}.json"
        pairs = list(zip(tombstones.users.tolist(), tombstones.offsets.tolist(), strict=True))
        _replace(self.path / name, lambda scratch: scratch.write_text(json.dumps([partition, pairs])))

    def noted_at(self) -> float:
        """When the oldest note was written, in seconds since 1970; infinity without one."""
        return min((path.stat().st_mtime for path in self.path.glob(NOTES)), default=math.inf)

    def forget(self) -> int:
        """Delete of the users of noted tombstones what stands before them; how many records that is.

        Their offsets become such as hold no record. Rejected rows, which have no place in the log, go
        whenever they are. A file is written anew beside the old one, then the manifest, then the old ones
        go: whoever reads meanwhile reads one or the other, and after a crash the next call does the rest. Not
        to be called by two at once.
        """
        notes = sorted(self.path.glob(NOTES))
        if not notes:
            return 0
        ends: dict[int, dict[int, int]] = collections.defaultdict(dict)  # partition -> user -> offset
        for path in notes:
            partition, pairs = json.loads(path.read_text())
            for user, offset in pairs:
                ends[partition][user] = max(offset, ends[partition].get(user, offset))
        self.manifest = self._load()
        self._forget_rejected({user for users in ends.values() for user in users})
        count = 0
        partitions = dict(self.manifest.partitions)
        for number in ends.keys() & partitions.keys():
            files = []
            for segment in partitions[number].files:
                gone = self._gone(segment, ends[number])
                if gone.any():
                    count += int(gone.sum())
                    segment = self._without(segment, pa.array(gone))
                files.append(segment)
            partitions[number] = partitions[number].model_copy(update={"files": files})
        if count:
            self.manifest = self.manifest.model_copy(update={"partitions": partitions})
            write_manifest(self.path, self.manifest)
        named = {segment.file for held in partitions.values() for segment in held.files}
        for path in self.path.glob("p*.parquet"):
            if path.name not in named:
                path.unlink()
        for path in notes:
            path.unlink()
        return count

    def _gone(self, segment: Segment, ends: Mapping[int, int]) -> npt.NDArray[np.bool_]:
        """Which records of a segment are of a user and before the offset that the user is forgotten at."""
        users, before = (np.array(column, np.int64) for column in zip(*sorted(ends.items()), strict=True))
        with self._opened(segment) as file:
            table = file.read(["user", "offset"])
        at = pc.index_in(table["user"], pa.array(users)).fill_null(-1).to_numpy()
        gone: npt.NDArray[np.bool_] = (at >= 0) & (table["offset"].to_numpy() < before[at])
        return gone

    def _forget_rejected(self, users: Collection[int]) -> None:
        keys = pa.array(sorted(users), pa.int64())
        for path in sorted(self.path.glob(REJECTED)):
            table = pyarrow.parquet.read_table(path)
            gone = pc.is_in(table["user"], keys)
            if pc.any(gone).as_py():
                _replace(
                    path,
                    lambda scratch, t=table, g=gone: pyarrow.parquet.write_table(  # type: ignore[misc]
                        t.filter(pc.invert(g)), scratch
                    ),
                )

    def _without(self, segment: Segment, gone: pa.BooleanArray) -> Segment:
        with self._opened(segment) as file:
            table = file.read()
        columns = {
            "offset": table["offset"],
            "timestamp_ms": table["timestamp_ms"],
            "user": pc.if_else(gone, pa.scalar(None, pa.int64()), table["user"]),
            "key": pc.if_else(gone, pa.scalar(None, pa.binary()), table["key"]),
            "value": pc.if_else(gone, pa.scalar(None, pa.binary()), table["value"]),
            "forgotten": pc.or_(table["forgotten"], gone),
        }
        name = f"{segment.file.split('.')[0]}.{secrets.token_hex(4)}.parquet"
        return write_segment(self.path / name, pa.table(columns, SCHEMA), segment.stop)

    def _load(self) -> Manifest:
        path = self.path / MANIFEST
        try:
            manifest = Manifest.model_validate(json.loads(path.read_text()))
        except (ValueError, pydantic.ValidationError) as error:
            raise SegmentError(f"{path} cannot be read ({error}): make the backfill anew") from error
        if manifest.format != FORMAT:
            raise SegmentError(f"{path} is of format {manifest.format}, not {FORMAT}: make the backfill anew")
        return manifest

    def _next_file(self, partition: int, offset: int) -> Segment | None:
        held = self.manifest.partitions.get(partition)
        return next((s for s in held.files if s.stop > offset), None) if held else None

    def _opened(self, segment: Segment) -> pyarrow.parquet.ParquetFile:
        path = self.path / segment.file
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != segment.sha256:
            raise SegmentError(f"{path} does not match its SHA-256: make the backfill anew")
        return pyarrow.parquet.ParquetFile(path)


def _records(file: pyarrow.parquet.ParquetFile, offset: int) -> Iterator[list[Record]]:
    groups = range(file.metadata.num_row_groups)
    column = SCHEMA.get_field_index("offset")
    unread = [g for g in groups if file.metadata.row_group(g).column(column).statistics.max >= offset]
    names = ["offset", "timestamp_ms", "key", "value"]
    for batch in file.iter_batches(
        _ROWS_AT_ONCE, row_groups=unread, columns=[*names, "forgotten"], use_threads=False
    ):
        batch = batch.slice(int(np.searchsorted(batch["offset"].to_numpy(), offset)))
        batch = batch.filter(pc.invert(batch["forgotten"]))
        if len(batch):
            yield list(map(Record, *(batch[name].to_pylist() for name in names)))


class SegmentLog:
    """The segments of some partitions, fetched as from a consumer: of all the next, the oldest first.

    Partitions go side by side by the times of their records, so that what is learned from comes nearly in
    order.
    """

    def __init__(self, segments: Segments, positions: Mapping[int, int]) -> None:
        self._cursors: dict[int, _Cursor] = {}
        for partition, position in positions.items():
            span = segments.span(partition)
            if span is not None and position < span[1]:
                self._cursors[partition] = _Cursor(segments.records(partition, position), span[1])

    def __bool__(self) -> bool:
        """Whether anything is left to fetch before the topic's turn."""
        return bool(self._cursors)

    def fetch(
        self, most: int, stops: Mapping[int, int] | None = None
    ) -> dict[int, tuple[Sequence[Record], int]]:
        """Some records of one partition, at least one, and the position behind them.

        A partition that has come to its stop is not read further.
        """
        oldest = min(self._cursors, key=lambda p: self._cursors[p].head_ms)
        cursor = self._cursors[oldest]
        records, position = cursor.take(most)
        if position >= min(cursor.seam, (stops or {}).get(oldest, cursor.seam)):
            del self._cursors[oldest]
        return {oldest: (records, position)}


@dataclasses.dataclass
class _Cursor:
    chunks: Iterator[list[Record]]
    seam: int
    ahead: collections.deque[Record] = dataclasses.field(default_factory=collections.deque)

    def __post_init__(self) -> None:
        self._look_ahead()

    @property
    def head_ms(self) -> int:
        return self.ahead[0].timestamp if self.ahead else -1

    def take(self, most: int) -> tuple[list[Record], int]:
        """Up to so many records; the position behind them is the seam where none is left."""
        taken = [self.ahead.popleft() for _ in range(min(most, len(self.ahead)))]
        if not self.ahead:
            self._look_ahead()
        return taken, self.ahead[0].offset if self.ahead else self.seam

    def _look_ahead(self) -> None:
        self.ahead.extend(next(self.chunks, ()))


def write_segment(path: pathlib.Path, table: pa.Table, stop: int) -> Segment:
    """Write records of one partition, in the order of offsets, durably."""
    pyarrow.parquet.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=["forgotten", "user", "key"],
    )
    sync(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Segment(
        file=path.name,
        start=table["offset"][0].as_py(),
        stop=stop,
        records=len(table),
        newest_ms=pc.max(table["timestamp_ms"]).as_py(),
        sha256=digest,
    )


def write_manifest(path: pathlib.Path, manifest: Manifest) -> None:
    """Put the manifest in place at once, replacing one that is there."""
    _replace(path / MANIFEST, lambda scratch: scratch.write_text(manifest.model_dump_json(indent=1)))


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Put a file in place durably and at once."""
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        write(scratch)
        sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)
