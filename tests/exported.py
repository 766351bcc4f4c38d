"""An exporter that keeps what Ray would be given."""

from collections.abc import Mapping

from grstream.exporter import Exporter
from grstream.telemetry import Kind, Metric


class Exported(Exporter):
    """`values` by name and labels: sums of counters, numbers of observations, newest values of gauges."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, ...], float] = {}
        self.observed: dict[tuple[str, ...], list[float]] = {}
        self.refreshed = 0

    def add(self, metric: Metric, count: float, **labels: object) -> None:
        assert metric.kind is Kind.COUNTER
        assert count >= 0
        self._note(metric, labels, count, before=True)

    def set(self, metric: Metric, value: float, **labels: object) -> None:
        assert metric.kind is Kind.GAUGE
        self._note(metric, labels, value)
        self._see(metric, labels)

    def refresh(self) -> None:
        self.refreshed += 1

    def observe(self, metric: Metric, value: float, **labels: object) -> None:
        assert metric.kind is Kind.HISTOGRAM
        self._note(metric, labels, 1, before=True)
        self.observed.setdefault((metric.name, *map(str, labels.values())), []).append(value)

    def _note(self, metric: Metric, labels: Mapping[str, object], value: float, before: bool = False) -> None:
        assert tuple(labels) == metric.labels
        key = (metric.name, *map(str, labels.values()))
        self.values[key] = value + (self.values.get(key, 0) if before else 0)
