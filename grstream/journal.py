"""The journal of a training run: a JSON line per step, written apart from the checkpoints.

A run is one life of a worker group. Its journal `metrics/<run>.jsonl` opens with the checkpoint that it
resumed from, and each step names the offsets that it settled. What happened after the checkpoint that a
later run resumed from was undone; `lineage` leaves that out, which makes the journal a second, independent
account of what the newest checkpoint has learned from.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grstream.ledger import Disposition, OffsetRange


def new_run() -> str:
    """A name for a run; names sort by the time they were given."""
    return f"{time.time_ns() // 1_000_000:013d}-{secrets.token_hex(4)}"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A place in the journals: a run and how many of its entries were written."""

    run: str
    entries: int


class Journal:
    """Appends to one run's journal. Lines are in the file when `sync` returns, and in its cache before."""

    def __init__(self, directory: pathlib.Path, run: str, resumed: Mark | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.mark = Mark(run, 0)
        self._file = open(_path(directory, run), "x", buffering=1)  # noqa: SIM115 - closed by `close`
        self._write({"resumed": dataclasses.asdict(resumed) if resumed else None})

    def settled(self, ranges: Sequence[OffsetRange], **figures: Any) -> None:
        """Record the offsets that one step settled, and what else is known of it."""
        self.mark = Mark(self.mark.run, self.mark.entries + 1)
        self._write({**figures, "ranges": [tuple(map(int, r)) for r in ranges]})

    def note(self, what: Mapping[str, Any]) -> None:
        """Record something that settles no offset."""
        self._write(what)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"at_ms": time.time_ns() // 1_000_000, **entry}) + "\n")


def newest_run(directory: pathlib.Path) -> str | None:
    """The last run that began a journal there."""
    return max((path.stem for path in directory.glob("*.jsonl")), default=None)


def ancestry(directory: pathlib.Path, mark: Mark) -> Iterator[Mark]:
    """The runs on the way to a mark, newest first, each with how many of its entries were built upon.

    FileNotFoundError for a lost journal.
    """
    at: Mark | None = mark
    while at:
        yield at
        with open(_path(directory, at.run)) as file:
            head = json.loads(next(file))
        at = Mark(**head["resumed"]) if head["resumed"] else None


def lineage(directory: pathlib.Path, mark: Mark) -> Iterator[OffsetRange]:
    """Every range settled on the way to a mark, newest run first. FileNotFoundError for a lost journal."""
    for at in ancestry(directory, mark):
        entries = 0
        with open(_path(directory, at.run)) as file:
            for line in file:
                if entries == at.entries:
                    break
                entry = json.loads(line)
                if "ranges" not in entry:
                    continue
                entries += 1
                for partition, start, stop, disposition in entry["ranges"]:
                    yield OffsetRange(partition, start, stop, Disposition(disposition))
        if entries < at.entries:
            raise ValueError(f"the journal of run {at.run} ends after {entries} of {at.entries} entries")


def _path(directory: pathlib.Path, run: str) -> pathlib.Path:
    return directory / f"{run}.jsonl"
