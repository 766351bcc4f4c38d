"""`Observer`: what a running trainer and server leave for others to see, put together by offset and version.

The trainer's journal tells when an offset was trained on, the manifests which versions cover it and when they
were published, and whoever asks the server says, by `answered`, which version an answer came from.
"""

import dataclasses
import json
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

from grstream.config import Config
from grstream.weight_store import WeightStore
from grstream.weights import CorruptWeights, Manifest, VersionMissing


@dataclasses.dataclass(frozen=True)
class Sample:
    """A trainer's report of itself."""

    at_ms: int
    events: int
    step: int
    positions: Mapping[int, int]  # partition -> first offset not trained on
    figures: Mapping[str, float]
    version: int
    checkpoint: int


@dataclasses.dataclass(frozen=True)
class Learned:
    """An event's way into the scores: wall-clock milliseconds."""

    trained_ms: int
    published_ms: int
    live_ms: int
    version: int  # the first that covers the event and answered


class Observer:
    """Of the system of a configuration. `refresh` reads what is new; all methods are thread-safe."""

    def __init__(self, config: Config) -> None:
        self._metrics = config.storage / "metrics"
        self._store = WeightStore(config.storage / "weights")
        self._lock = threading.RLock()
        self._read: dict[pathlib.Path, int] = {}  # journal -> bytes read
        self._settled: list[tuple[int, int, int, int]] = []  # partition, start, stop, at_ms
        self._answered: dict[int, int] = {}  # version -> first answer, ms
        self.samples: list[Sample] = []
        self.manifests: dict[int, Manifest] = {}

    def refresh(self) -> None:
        with self._lock:
            for journal in sorted(self._metrics.glob("*.jsonl")):
                self._read_on(journal)
            for number in self._store.numbers():
                if number not in self.manifests:
                    try:
                        self.manifests[number] = self._store.manifest(number)
                    except (VersionMissing, CorruptWeights):
                        continue  # pruned since, or the server will say what is wrong with it

    def answered(self, version: int, at_ms: int) -> None:
        """Note that an answer came from a version."""
        with self._lock:
            self._answered.setdefault(version, at_ms)

    @property
    def live(self) -> dict[int, int]:
        """Versions that answered, and when first (ms), oldest first."""
        with self._lock:
            return dict(sorted(self._answered.items()))

    def covering(self, partition: int, offset: int) -> int | None:
        """The first published version that has learned from an offset."""
        with self._lock:
            return min((n for n, m in self.manifests.items() if m.covers(partition, offset)), default=None)

    def learned(self, partition: int, offset: int) -> Learned | None:
        """An event's way, once it is through."""
        with self._lock:
            first = self.covering(partition, offset)
            if first is None:
                return None
            trained = min(
                (at for p, start, stop, at in self._settled if p == partition and start <= offset < stop),
                default=None,
            )
            live = min((v for v in self._answered if v >= first), default=None)
            if trained is None or live is None:
                return None
            return Learned(trained, self.manifests[first].created_ms, self._answered[live], live)

    def _read_on(self, journal: pathlib.Path) -> None:
        with journal.open("rb") as file:
            file.seek(self._read.get(journal, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._read[journal] = self._read.get(journal, 0) + len(line)
                self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        for partition, start, stop, _ in entry.get("ranges", ()):
            self._settled.append((partition, start, stop, entry["at_ms"]))
        if "progress" in entry:
            told = entry["progress"]
            self.samples.append(
                Sample(
                    at_ms=told["at_ms"],
                    events=told["events"],
                    step=told["step"],
                    positions={int(p): offset for p, offset in told["positions"].items()},
                    figures=told["figures"],
                    version=told["version"],
                    checkpoint=told["checkpoint"],
                )
            )
