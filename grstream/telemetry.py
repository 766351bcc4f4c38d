"""Every metric that a grstream system exports through Ray, by name.

Ray puts `ray_` before a name, and `_total` behind a counter's, on its way to Prometheus. Names and labels are
an interface: dashboards and alerts are written against them.
"""

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.util import metrics as ray_metrics


class Kind(enum.Enum):
    COUNTER = "counter"  # only grows, from zero with each start of the process
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """What is exported under a name."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()  # of a histogram

    @property
    def exported(self) -> str:
        """The name that Prometheus knows; a histogram's gets _bucket, _sum and _count behind it."""
        return f"ray_{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"


_WINDOW = ("window", "slice")  # a length such as 24h; all, late or a range of history lengths

# -- the trainer --------------------------------------------------------------------------------------------

EVENTS = Metric("grstream_train_events", Kind.COUNTER, "Events trained on.")
STEPS = Metric("grstream_train_steps", Kind.COUNTER, "Steps of training.")
TOKENS = Metric("grstream_train_tokens", Kind.COUNTER, "Memory and query tokens encoded in training.")
SETTLED = Metric(
    "grstream_train_offsets",
    Kind.COUNTER,
    "Offsets settled, by what became of them: trained, duplicate, dead_letter, tombstone, control, lost, "
    "joined, correction.",
    ("disposition",),
)
STEP_SECONDS = Metric(
    "grstream_train_step_seconds",
    Kind.HISTOGRAM,
    "Seconds of one step, from its micro-batch to the updated weights.",
    boundaries=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
LEARNED_SECONDS = Metric(
    "grstream_train_learned_seconds",
    Kind.HISTOGRAM,
    "Seconds from reading a micro-batch's oldest new event to having learned from it.",
    boundaries=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
RANKING_LOSS = Metric("grstream_train_ranking_loss", Kind.GAUGE, "Of the last step, nats an event.")
RETRIEVAL_LOSS = Metric("grstream_train_retrieval_loss", Kind.GAUGE, "Of the last step, nats an event.")
LAG = Metric(
    "grstream_train_lag_offsets",
    Kind.GAUGE,
    "Offsets from the first that is not settled to the log's end; NaN while the broker does not answer.",
    ("partition",),
)
FRESHNESS = Metric(
    "grstream_train_freshness_seconds",
    Kind.GAUGE,
    "Age of the newest event that was trained on.",
    ("partition",),
)
ENTROPY = Metric(
    "grstream_quality_normalized_entropy",
    Kind.GAUGE,
    "Log loss of predictions made before learning, over the entropy of the mean label: 1 is the base rate's.",
    (*_WINDOW, "action"),
)
CALIBRATION = Metric(
    "grstream_quality_calibration",
    Kind.GAUGE,
    "Predicted positives over actual ones.",
    (*_WINDOW, "action"),
)
GAUC = Metric(
    "grstream_quality_gauc",
    Kind.GAUGE,
    "AUC within each user, weighted by the user's events.",
    (*_WINDOW, "action"),
)
HIT_RATE = Metric(
    "grstream_quality_hit_rate",
    Kind.GAUGE,
    "Share of events whose item was among the k first retrieved.",
    (*_WINDOW, "k"),
)
WINDOW_EVENTS = Metric(
    "grstream_quality_window_events", Kind.GAUGE, "Events that a window's figures are over.", _WINDOW
)
MISSED = Metric(
    "grstream_quality_missed_events",
    Kind.GAUGE,
    "Events that came after the window had moved on beyond them, ever.",
    ("window",),
)
KEYS = Metric("grstream_vocabulary_keys", Kind.GAUGE, "Keys that have an embedding row.")
EVICTIONS = Metric("grstream_vocabulary_evictions", Kind.COUNTER, "Keys that lost their row to new ones.")
VERSION = Metric("grstream_weights_version", Kind.GAUGE, "Newest weights version published.")
CHECKPOINT = Metric("grstream_checkpoint", Kind.GAUGE, "Newest checkpoint written.")
GATE = Metric(
    "grstream_gate_open",
    Kind.GAUGE,
    "1 while weights are fit to be published and saved, 0 while they are not.",
)
STRAYS = Metric(
    "grstream_stray_users", Kind.GAUGE, "Users, one in 16 looked at, whose events came by several partitions."
)

# -- the trainer's readers ----------------------------------------------------------------------------------

USERS = Metric("grstream_reader_users", Kind.GAUGE, "Users whose histories are held.", ("partition",))
HISTORY_EVENTS = Metric("grstream_reader_events", Kind.GAUGE, "Events in all histories.", ("partition",))
HISTORY_BYTES = Metric("grstream_reader_bytes", Kind.GAUGE, "Allocated for histories.", ("partition",))
USERS_EVICTED = Metric(
    "grstream_reader_users_evicted", Kind.GAUGE, "Users who made room for others, ever.", ("partition",)
)
LATE = Metric(
    "grstream_reader_late_events", Kind.GAUGE, "Events that were placed before others, ever.", ("partition",)
)
TOO_LATE = Metric(
    "grstream_reader_too_late_events",
    Kind.GAUGE,
    "Events that came too late to be placed where they belong, ever.",
    ("partition",),
)
OPEN_EXPOSURES = Metric(
    "grstream_reader_open_exposures", Kind.GAUGE, "Exposures whose window has not ended.", ("partition",)
)
CLOSED_EARLY = Metric(
    "grstream_reader_exposures_closed_early",
    Kind.GAUGE,
    "Exposures that ended before their window, ever, because too many events waited.",
    ("partition",),
)

# -- history shards -----------------------------------------------------------------------------------------

HISTORY_LAG = Metric(
    "grstream_history_lag_offsets",
    Kind.GAUGE,
    "Offsets from the next that a history shard reads to the log's end, as it last knew it.",
    ("partition",),
)
HISTORY_AGE = Metric(
    "grstream_history_age_seconds",
    Kind.GAUGE,
    "Age of the record of the newest event in a shard's histories.",
    ("partition",),
)

METRICS = tuple(value for value in globals().values() if isinstance(value, Metric))


class Exporter:
    """Gives metrics of one process to Ray, which its own agent exports."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._shown: dict[Metric, set[tuple[str, ...]]] = {}

    def add(self, metric: Metric, count: float, **labels: object) -> None:
        """Count on. A counter that never counted is not exported."""
        if count > 0:
            self._of(metric).inc(count, _strings(labels))

    def set(self, metric: Metric, value: float, **labels: object) -> None:
        self._of(metric).set(value, _strings(labels))
        self._shown.setdefault(metric, set()).add(tuple(_strings(labels)[name] for name in metric.labels))

    def set_all(self, metric: Metric, values: Mapping[Any, float]) -> None:
        """All there is of a gauge, by its labels' values; what was there before and is not now is NaN."""
        now = {tuple(map(str, labels)): value for labels, value in values.items()}
        for labels in self._shown.get(metric, set()) - now.keys():
            self.set(metric, float("nan"), **dict(zip(metric.labels, labels, strict=True)))
        for labels, value in now.items():
            self.set(metric, value, **dict(zip(metric.labels, labels, strict=True)))

    def observe(self, metric: Metric, value: float, **labels: object) -> None:
        # Ray leaves out what is zero or below.
        self._of(metric).observe(max(value, 1e-9), _strings(labels))

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


def _strings(labels: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in labels.items()}
