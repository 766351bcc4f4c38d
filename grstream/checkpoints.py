"""Checkpoints: what a trainer has learned and which offsets it learned it from, in one atomic directory.

A checkpoint `c0000000042` of a `CheckpointStore` holds the learner's own files, the ledger as Arrow IPC and
`checkpoint.json`, which names every file with its SHA-256. Of several ranks each writes its own files, as a
part that rank 0 moves into the checkpoint. Numbers form one chain: a trainer that resumes
takes the number after the newest at once, and if that is taken by the time it writes, another trainer has
gone on from the same place and it must start again (law 4: no two may continue one history).
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable

import pyarrow as pa
import pydantic

from grstream.directories import SCRATCH, DirectoryExists, appearing, disappear, sweep
from grstream.ledger import Ledger

logger = logging.getLogger(__name__)

FORMAT = 1  # of a checkpoint's files; a reader refuses another
PARTS_WAIT_S = 600.0  # a part that has not come by then will not
_LOOK_S = 0.02  # how often it is looked for
RECORD, LEDGER = "checkpoint.json", "ledger.arrow"
_NAME = re.compile(r"c(\d{10})")


class CheckpointError(RuntimeError):
    """Something is wrong with a checkpoint."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint's bytes are not those that were written; the one before it must be used."""

    def __init__(self, number: int, file: str, problem: str) -> None:
        super().__init__(number, file, problem)
        self.number, self.file, self.problem = number, file, problem

    def __str__(self) -> str:
        return f"checkpoint {self.number} is corrupt: {self.file} {self.problem}"


class PartMissing(CheckpointError):
    """Another rank has not written its part of a checkpoint."""

    def __init__(self, number: int, rank: int, waited_s: float) -> None:
        super().__init__(number, rank, waited_s)
        self.number, self.rank, self.waited_s = number, rank, waited_s

    def __str__(self) -> str:
        return f"rank {self.rank} did not write its part of checkpoint {self.number} in {self.waited_s:g} s"


class CheckpointConflict(CheckpointError):
    """The number is taken: another trainer writes to the same storage. Start again from its checkpoint."""


class Record(pydantic.BaseModel):
    """What a checkpoint is: its place in the training, and the files it is made of."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    number: int = pydantic.Field(ge=1)
    run: str  # whose journal tells how it came about, see `grstream.journal`
    entries: int = pydantic.Field(ge=0, description="of that journal, which the checkpoint covers")
    step: int = pydantic.Field(ge=0)
    events: int = pydantic.Field(ge=0, description="events trained on, counted apart from the ledger")
    newest_event_ms: int
    created_ms: int
    files: dict[str, str] = {}  # name -> SHA-256


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been verified."""

    directory: pathlib.Path
    record: Record
    ledger: Ledger


class CheckpointStore:
    """Checkpoints in a directory of shared storage."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = pathlib.Path(directory)

    def numbers(self) -> list[int]:
        """The numbers of the checkpoints that are there, oldest first."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def write_part(self, number: int, run: str, rank: int, save: Callable[[pathlib.Path], None]) -> None:
        """Make a rank's files durable, for rank 0 of the same run, who writes the checkpoint."""
        with appearing(self._part(number, run, rank)) as scratch:
            save(scratch)

    def write(
        self, record: Record, ledger: Ledger, save: Callable[[pathlib.Path], None], ranks: int = 1
    ) -> Checkpoint:
        """Make a checkpoint durable and then visible. `save` writes the learner's files into a directory.

        The files of ranks but 0 are waited for. Raises CheckpointConflict where the record's number is not
        above all those of the store, and PartMissing.
        """
        newest = max(self.numbers(), default=0)
        if record.number <= newest:
            raise CheckpointConflict(
                f"checkpoint {record.number} cannot be written: {newest} exists, so another trainer writes "
                f"to {self._directory}; stop one of the two"
            )
        target = self._path(record.number)
        try:
            with appearing(target) as scratch:
                save(scratch)
                for rank in range(1, ranks):
                    self._take_part(record, rank, scratch)
                with pa.OSFile(str(scratch / LEDGER), "wb") as sink:
                    table = ledger.to_table()
                    with pa.ipc.new_file(sink, table.schema) as writer:
                        writer.write_table(table)
                record = record.model_copy(
                    update={
                        "files": {path.name: _digest(path) for path in sorted(scratch.iterdir())},
                        "created_ms": time.time_ns() // 1_000_000,
                    }
                )
                (scratch / RECORD).write_text(record.model_dump_json(indent=1))
        except DirectoryExists as error:
            raise CheckpointConflict(
                f"checkpoint {record.number} was just written by another trainer"
            ) from error
        return Checkpoint(target, record, Ledger.from_table(table))

    def load(self, number: int) -> Checkpoint:
        """Read and verify. Raises CorruptCheckpoint naming the file, FileNotFoundError for no such number."""
        directory = self._path(number)
        if not directory.is_dir():
            raise FileNotFoundError(f"no checkpoint {number} in {self._directory}")
        try:
            record = Record.model_validate_json((directory / RECORD).read_text())
        except (OSError, pydantic.ValidationError) as error:
            raise CorruptCheckpoint(number, RECORD, f"cannot be read: {error}") from error
        if record.format != FORMAT or record.number != number:
            raise CorruptCheckpoint(number, RECORD, f"says format {record.format}, number {record.number}")
        for name, digest in record.files.items():
            try:
                found = _digest(directory / name)
            except OSError as error:
                raise CorruptCheckpoint(number, name, f"cannot be read: {error}") from error
            if found != digest:
                raise CorruptCheckpoint(number, name, "does not match its SHA-256")
        return Checkpoint(directory, record, _read_ledger(directory))

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, or None. A corrupt one is reported and passed over."""
        for number in reversed(self.numbers()):
            try:
                return self.load(number)
            except CorruptCheckpoint as error:
                logger.error("%s; the one before it is used", error)
            except FileNotFoundError:  # pruned since it was listed
                logger.info("checkpoint %d was pruned while it was being read", number)
        return None

    def ledgers(self) -> list[Ledger]:
        """What the checkpoints have consumed, oldest first: a trainer may yet have to go on from any of them.

        Only the ledgers are read, and they are not verified.
        """
        found = []
        for number in self.numbers():
            with contextlib.suppress(FileNotFoundError):  # pruned since it was listed
                found.append(_read_ledger(self._path(number)))
        return found

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints and what dead writers left."""
        for number in self.numbers()[:-keep]:
            disappear(self._path(number))
        sweep(self._directory)

    def _path(self, number: int) -> pathlib.Path:
        return self._directory / f"c{number:010d}"

    def _part(self, number: int, run: str, rank: int) -> pathlib.Path:
        # Swept, if nobody ever takes it.
        return self._directory / f"{SCRATCH}c{number:010d}-{run}-part-{rank}"

    def _take_part(self, record: Record, rank: int, into: pathlib.Path) -> None:
        part, deadline = self._part(record.number, record.run, rank), time.monotonic() + PARTS_WAIT_S
        while not part.is_dir():
            if time.monotonic() > deadline:
                raise PartMissing(record.number, rank, PARTS_WAIT_S)
            time.sleep(_LOOK_S)
        for file in part.iterdir():
            file.rename(into / file.name)
        part.rmdir()


def _read_ledger(directory: pathlib.Path) -> Ledger:
    with pa.OSFile(str(directory / LEDGER), "rb") as source:
        return Ledger.from_table(pa.ipc.open_file(source).read_all())


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
