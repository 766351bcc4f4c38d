"""Where the snapshots of histories lie, which of them to start from and which to keep.

`snapshots/p00003/o00000000000000001234.arrow` is what partition 3's histories held after every offset below
1234; a backfill's offsets may be negative (`o-0000000000000001234.arrow`). Readers write them beside the
checkpoints; trainer and servers start from them. Nothing but time is lost with one: histories are a pure fold
over the log, and without a snapshot they are folded again from its start.

A tombstone takes its user out of histories at once, and so out of every snapshot at a later offset. Those
of before go by age. A new one is written at the end of each execution at the latest, and the next
checkpoint is beyond it; so all that are `source.recycle_s` short of `forget_within_s` old can be deleted, and
are in time.
"""

import bisect
import logging
import os
import pathlib
import re
import time
from collections.abc import Iterable

from grstream.checkpoints import CheckpointStore
from grstream.config import Config
from grstream.histories import RollingHistories
from grstream.ledger import Ledger
from grstream.schema import Schema
from grstream.snapshots import SnapshotError

logger = logging.getLogger(__name__)

SHARE = 0.05  # of a reader's time, at most, goes into snapshots
KEPT = 4  # at least: a damaged one must not cost a reading of the whole log
_FILE = re.compile(r"o(-\d{19}|\d{20})\.arrow")


class SnapshotFiles:
    """The snapshots of one partition."""

    def __init__(self, config: Config, partition: int) -> None:
        self._config, self._partition = config, partition
        self._schema = Schema.of(config.events)
        self._directory = config.storage / "snapshots" / f"p{partition:05d}"

    def offsets(self) -> list[int]:
        """The offsets at which there is a snapshot, lowest first."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_FILE.fullmatch, names) if match)

    def restore(
        self, at_least: int, at_most: int | None = None, track_new: bool = True
    ) -> tuple[RollingHistories, int] | None:
        """Histories from the newest good snapshot within these offsets, and the offset to go on from."""
        for offset in reversed(self.offsets()):
            if offset < at_least or (at_most is not None and offset > at_most):
                continue
            try:
                return RollingHistories.restore(
                    self._path(offset),
                    self._config.histories,
                    schema=self._schema,
                    partition=self._partition,
                    track_new=track_new,
                    exposures=self._config.events.exposures,
                )
            except (SnapshotError, FileNotFoundError) as error:
                logger.warning("a snapshot is passed over: %s", error)
        return None

    def write(self, histories: RollingHistories, offset: int) -> None:
        """Write what `histories` hold before an offset. The same offset always says the same."""
        if not self._path(offset).exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            histories.snapshot(self._path(offset), offset, self._schema)

    def prune(self, base: int, resume: int) -> None:
        """Keep those from which a resume at `base` or later may start, and the newest few, while young.

        Old ones may hold users that were forgotten since, and so may what killed writers left behind. Of
        them stay the newest of all, which stands at the position, and the one that a resume at `resume`
        begins with.
        """
        offsets = self.offsets()
        young = time.time() - (self._config.forget_within_s - self._config.source.recycle_s)
        first = max(0, min(bisect.bisect_right(offsets, base) - 1, len(offsets) - KEPT))
        needed = {*offsets[-1:], *[o for o in offsets if o <= resume][-1:]}
        for i, offset in enumerate(offsets):
            if i < first or (offset not in needed and _written(self._path(offset)) <= young):
                self._path(offset).unlink(missing_ok=True)
        for scratch in self._directory.glob(".*"):
            if _written(scratch) <= young:
                scratch.unlink(missing_ok=True)

    def _path(self, offset: int) -> pathlib.Path:
        return self._directory / f"o{offset:020d}.arrow"


class Snapshooter:
    """Writes the snapshots of a reader's partitions every so often, and deletes what no resume will need."""

    def __init__(self, config: Config) -> None:
        self._config, self._checkpoints = config, CheckpointStore(config.storage / "checkpoints")
        self._every_s = config.train.checkpoint_every_s
        self._next = time.monotonic() + self._every_s

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def write(self, states: Iterable[tuple[int, RollingHistories, int]]) -> None:
        """Write one snapshot each of these partitions' histories as of these offsets."""
        began = time.monotonic()
        needed = self._checkpoints.ledgers() or [Ledger()]
        for partition, histories, offset in states:
            files = SnapshotFiles(self._config, partition)
            files.write(histories, offset)
            files.prune(*(ledger.watermark(partition) or 0 for ledger in (needed[0], needed[-1])))
        ended = time.monotonic()
        self._next = ended + max(self._every_s, (ended - began) / SHARE)


def _written(path: pathlib.Path) -> float:
    """When, in seconds since 1970; 0 for a file that is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
