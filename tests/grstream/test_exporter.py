"""What Ray is given, and how often."""

import time

import pytest

from grstream import exporter as exporters
from grstream import telemetry
from grstream.exporter import Exporter
from grstream.telemetry import Kind, Metric, Part


class RayMetric:
    """Keeps what it is told, as `ray.util.metrics` would."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: object = ()):
        self.told: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self._record(value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags)

    def _record(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((value, tags))


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(exporters.ray_metrics, kind, RayMetric)
    return Exporter()


def told(out: Exporter, metric: Metric) -> list[tuple[float, dict[str, str]]]:
    return list(out._held[metric.name].told)


def test_a_parts_counters_begin_at_0_once(out: Exporter) -> None:
    out.begin(Part.SCORER)
    counters = {m.name for m in telemetry.BY_PART[Part.SCORER] if m.kind is Kind.COUNTER}
    assert out._held.keys() == counters
    out.add(telemetry.VERSIONS_REFUSED, 0, reason="corrupt")
    out.add(telemetry.VERSIONS_REFUSED, 2, reason="corrupt")
    assert told(out, telemetry.VERSIONS_REFUSED) == [
        (0, {"reason": "corrupt"}),
        (0, {"reason": "unusable"}),
        (2, {"reason": "corrupt"}),
    ]


def test_a_total_is_counted_to_by_differences_and_may_begin_anew(out: Exporter) -> None:
    for total in (0, 5, 5, 8, 2, 4):
        out.count_to(telemetry.CACHE_EVICTED, total)
    assert [value for value, _ in told(out, telemetry.CACHE_EVICTED)] == [0, 5, 3, 2]


def test_gauges_are_set_again_but_for_those_that_are_no_more(out: Exporter) -> None:
    out.set_all(telemetry.LAG, {(0,): 5, (1,): 6})
    out.set_all(telemetry.LAG, {(1,): 7})
    out.set(telemetry.KEYS, 9)
    before = len(told(out, telemetry.LAG))
    out.refresh()
    assert told(out, telemetry.LAG)[before:] == [(7, {"partition": "1"})]
    assert told(out, telemetry.KEYS) == [(9, {}), (9, {})]
    out.keep_fresh(0.01)
    deadline = time.monotonic() + 10
    while len(told(out, telemetry.KEYS)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told(out, telemetry.KEYS)[-1] == (9, {})
    assert len(told(out, telemetry.KEYS)) >= 4
