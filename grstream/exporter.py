"""`Exporter`: gives the metrics of `grstream.telemetry` to Ray, whose agent on each node exports them.

Ray 2.60 forgets a gauge that was not set for two of its report intervals (10 s each, by default). So whoever
sets gauges more seldom calls `refresh` in between, or has a thread do it.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from grstream.telemetry import BY_PART, Kind, Metric, Part


class Exporter:
    """Of one process. Costs some microseconds a call. Each metric belongs to one thread."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._shown: dict[Metric, set[tuple[str, ...]]] = {}
        self._totals: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def begin(self, part: Part) -> None:
        """Export the counters of a part as 0, so that the first thing they count is seen as a growth."""
        for metric in BY_PART[part]:
            if metric.kind is Kind.COUNTER:
                for values in metric.known or ((),) * (not metric.labels):
                    self.add(metric, 0, **dict(zip(metric.labels, values, strict=True)))

    def add(self, metric: Metric, count: float, **labels: object) -> None:
        """Count on."""
        if count > 0:
            self._of(metric).inc(count, _strings(labels))
        elif not self._seen(metric, labels):
            # Ray 2.60's `inc` refuses the 0 from which a counter begins; what is below it does not.
            self._of(metric)._record(0.0, _strings(labels))
        self._see(metric, labels)

    def count_to(self, metric: Metric, total: float, **labels: object) -> None:
        """Count on to a total that somebody else keeps, from 0 or what it was the last time."""
        key = metric, _values(metric, labels)
        self.add(metric, total - self._totals.get(key, 0), **labels)
        self._totals[key] = total

    def set(self, metric: Metric, value: float, **labels: object) -> None:
        self._of(metric).set(value, _strings(labels))
        self._see(metric, labels)
        self._gauges[metric, _values(metric, labels)] = value

    def refresh(self) -> None:
        """Have all gauges be what they are for some more seconds."""
        for (metric, values), value in list(self._gauges.items()):
            self._of(metric).set(value, dict(zip(metric.labels, values, strict=True)))

    def keep_fresh(self, every_s: float) -> None:
        """Have a thread do that, for as long as the process lives."""

        def run() -> None:
            while not never.wait(every_s):
                self.refresh()

        never = threading.Event()
        threading.Thread(target=run, name="metrics", daemon=True).start()

    def set_all(self, metric: Metric, values: Mapping[Any, float]) -> None:
        """All there is of a gauge, by its labels' values; what was there before and is not now is NaN."""
        now = {tuple(map(str, labels)): value for labels, value in values.items()}
        for labels in self._shown.get(metric, set()) - now.keys():
            self.set(metric, float("nan"), **dict(zip(metric.labels, labels, strict=True)))
            self._shown[metric].discard(labels)
            self._gauges.pop((metric, labels), None)  # Ray forgets it
        for labels, value in now.items():
            self.set(metric, value, **dict(zip(metric.labels, labels, strict=True)))

    def observe(self, metric: Metric, value: float, **labels: object) -> None:
        # Ray leaves out what is zero or below.
        self._of(metric).observe(max(value, 1e-9), _strings(labels))

    def observe_all(self, metric: Metric, values: Iterable[float]) -> None:
        for value in values:
            self.observe(metric, value)

    def _seen(self, metric: Metric, labels: Mapping[str, object]) -> bool:
        return _values(metric, labels) in self._shown.get(metric, ())

    def _see(self, metric: Metric, labels: Mapping[str, object]) -> None:
        self._shown.setdefault(metric, set()).add(_values(metric, labels))

    def _of(self, metric: Metric) -> Any:
        if metric.name not in self._held:
            kwargs: dict[str, Any] = {"description": metric.description, "tag_keys": metric.labels}
            if metric.kind is Kind.HISTOGRAM:
                kwargs["boundaries"] = list(metric.boundaries)
            made = {
                Kind.COUNTER: ray_metrics.Counter,
                Kind.GAUGE: ray_metrics.Gauge,
                Kind.HISTOGRAM: ray_metrics.Histogram,
            }[metric.kind]
            self._held[metric.name] = made(metric.name, **kwargs)
        return self._held[metric.name]


def _values(metric: Metric, labels: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(labels[name]) for name in metric.labels)


def _strings(labels: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in labels.items()}
