"""What a trainer tells of itself beside its journal: Ray metrics at every report, and the log of quality."""

import collections
import time
from collections.abc import Iterable, Mapping

from grstream import telemetry
from grstream.board import Progress
from grstream.config import Config
from grstream.exporter import Exporter
from grstream.journal import Mark
from grstream.lag import LogEnds, behind
from grstream.learner import Learner, StepReport
from grstream.quality import Figure, window_name
from grstream.quality_log import QualityLog, Row
from grstream.telemetry import Metric, Part

DIRECTORY = "quality"  # of the log, in a system's storage
# Figures are computed again no sooner than so many times as long as they took: they cost 1 % at the most.
PATIENCE = 100
_GAUGES = {"ne": telemetry.ENTROPY, "calibration": telemetry.CALIBRATION, "gauc": telemetry.GAUC}


class Monitor:
    """Of rank 0. `settled` at each turn costs microseconds; `report` every few seconds some milliseconds."""

    def __init__(self, config: Config, run: str, settled: Mapping[str, int], version: int) -> None:
        """Before this run: offsets by disposition, and the newest version."""
        self._every_s = config.quality.every_s
        self._least_ms = min(config.quality.windows_h) * 3_600_000
        self._windows = [window_name(hours) for hours in config.quality.windows_h]
        self._log = QualityLog(config.storage / DIRECTORY, run, config.quality.keep_days)
        self._ends = LogEnds(config.kafka)
        self._exporter = Exporter()
        self._exporter.begin(Part.TRAINER)
        self._counted: dict[tuple[Metric, str], float] = collections.defaultdict(float)
        self._counted |= {(telemetry.SETTLED, name): n for name, n in settled.items()}
        self._counted[telemetry.PUBLISHED, ""] = version
        self._steps = self._tokens = self._events = 0  # of this run
        self._publish_failures = 0
        self._waited_s = 0.0
        self._last: StepReport | None = None
        self._learned: dict[int, list[float]] = collections.defaultdict(list)  # seconds, since the last entry
        self._due = self._soonest = time.monotonic()
        self._clock = 0  # event time of the last entry, ms: the mean of where its windows end

    def settled(self, report: StepReport | None, seconds: float, read: Iterable[tuple[int, int]]) -> None:
        """A turn. `read`: for each micro-batch its partition, and the wall clock when it was read, ms."""
        if report is None:
            return
        self._last = report
        self._steps += 1
        self._tokens += report.tokens
        self._events += len(report.predictions)
        self._exporter.observe(telemetry.STEP_SECONDS, seconds)
        now = time.time() * 1000
        for partition, read_ms in read:
            taken = max(0.0, (now - read_ms) / 1000)
            self._learned[partition].append(taken)
            self._exporter.observe(telemetry.LEARNED_SECONDS, taken)

    def waited(self, seconds: float) -> None:
        """For a micro-batch, or in vain."""
        self._waited_s += seconds

    def execution(self) -> None:
        """Another execution of Ray Data begins."""
        self._exporter.add(telemetry.EXECUTIONS, 1)

    def stalled(self, seconds: float) -> None:
        """The steps stood still for a checkpoint's copy."""
        self._exporter.observe(telemetry.CHECKPOINT_STALL, seconds)

    def saved(self, seconds: float) -> None:
        """A checkpoint was written. Called by the thread that wrote it."""
        self._exporter.observe(telemetry.CHECKPOINT_SECONDS, seconds)

    def report(
        self,
        progress: Progress,
        learner: Learner,
        mark: Mark,
        gate_open: bool,
        last: bool,
        publish_failures: int = 0,
    ) -> None:
        """Export how it goes, and make an entry of the log if it is time for one, or the `last`.

        `publish_failures`: versions that storage did not take, in this run.
        """
        self._publish_failures = publish_failures
        moment = self._moment(progress, learner, gate_open)
        self._exporter.refresh()  # figures of quality are set more seldom
        self._export(progress, learner, moment)
        now = time.monotonic()
        caught_up = [row.partition for row in moment if row.figure == "lag" and row.value == 0]
        ends = learner.quality.ends(caught_up).values()
        clock = sum(ends) // max(1, len(ends))
        moved = clock - self._clock >= self._least_ms and now >= self._soonest
        if not (moved or now >= self._due or last):
            return
        figures = learner.quality.figures(caught_up)
        self._export_quality(figures, learner.quality.missed)
        rows = [Row(f.name, f.value, f.window, f.slice, f.action, events=f.events) for f in figures]
        rows += [Row("missed", count, window) for window, count in learner.quality.missed.items()]
        for partition, seconds in self._learned.items():
            mean = sum(seconds) / len(seconds)
            rows.append(Row("learned_s", mean, partition=partition, events=len(seconds)))
            rows.append(Row("learned_s_max", max(seconds), partition=partition, events=len(seconds)))
        self._learned.clear()
        self._log.append(mark, clock, [*rows, *moment], progress.at_ms)
        self._clock = clock
        done = time.monotonic()
        self._soonest, self._due = done + PATIENCE * (done - now), now + self._every_s

    def close(self) -> None:
        self._ends.close()
        self._log.close()

    def _moment(self, progress: Progress, learner: Learner, gate_open: bool) -> list[Row]:
        """What is so at this moment."""
        ends = self._ends.now()
        lags = behind(ends, progress.positions) if ends is not None else {}
        return [
            *(Row("lag", lag, partition=p) for p, lag in lags.items()),
            *(
                Row("freshness_s", (progress.at_ms - newest) / 1000, partition=p)
                for p, newest in learner.quality.newest.items()
            ),
            *(Row(f"settled/{name}", count) for name, count in progress.settled.items()),
            Row("trained_events", progress.events),
            Row("step", progress.step),
            Row("version", progress.version),
            Row("checkpoint", progress.checkpoint),
            Row("gate_open", int(gate_open)),
            Row("strays", progress.strays),
            Row("vocabulary_keys", learner.keys),
            Row("vocabulary_evictions", learner.evicted),
        ]

    # -- Ray ----------------------------------------------------------------------------------------------

    def _export(self, progress: Progress, learner: Learner, moment: list[Row]) -> None:
        out = self._exporter
        self._count(telemetry.EVENTS, self._events)
        self._count(telemetry.STEPS, self._steps)
        self._count(telemetry.TOKENS, self._tokens)
        self._count(telemetry.EVICTIONS, learner.evicted)
        self._count(telemetry.INPUT_WAIT, self._waited_s)
        self._count(telemetry.PUBLISHED, progress.version)
        self._count(telemetry.PUBLISH_FAILURES, self._publish_failures)
        for name, count in progress.settled.items():
            self._count(telemetry.SETTLED, count, name)
        if self._last:
            out.set(telemetry.RANKING_LOSS, self._last.ranking_loss)
            out.set(telemetry.RETRIEVAL_LOSS, self._last.retrieval_loss)
        for figure, metric in (("lag", telemetry.LAG), ("freshness_s", telemetry.FRESHNESS)):
            out.set_all(metric, {(row.partition,): row.value for row in moment if row.figure == figure})
        singles = {row.figure: row.value for row in moment if row.partition is None}
        out.set(telemetry.KEYS, singles["vocabulary_keys"])
        out.set(telemetry.VERSION, singles["version"])
        out.set(telemetry.CHECKPOINT, singles["checkpoint"])
        out.set(telemetry.GATE, singles["gate_open"])
        out.set(telemetry.STRAYS, singles["strays"])

    def _count(self, metric: Metric, total: float, label: str = "") -> None:
        labels = {metric.labels[0]: label} if metric.labels else {}
        self._exporter.add(metric, total - self._counted[metric, label], **labels)
        self._counted[metric, label] = total

    def _export_quality(self, figures: list[Figure], missed: dict[str, int]) -> None:
        out = self._exporter
        for name, metric in _GAUGES.items():
            out.set_all(metric, {(f.window, f.slice, f.action): f.value for f in figures if f.name == name})
        hits = {(f.window, f.slice, f.name[3:]): f.value for f in figures if f.name.startswith("hr@")}
        out.set_all(telemetry.HIT_RATE, hits)
        counts = {(f.window, f.slice): f.value for f in figures if f.name == "events"}
        out.set_all(telemetry.WINDOW_EVENTS, counts)
        out.set_all(telemetry.MISSED, {(window,): count for window, count in missed.items()})
