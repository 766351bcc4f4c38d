"""Every metric that a grstream system exports through Ray, by name.

Ray puts `ray_` before a name, and `_total` behind a counter's, on its way to Prometheus. Names and labels are
an interface: dashboards and alerts are written against them. What Ray Serve measures itself (requests by
route and status, replicas, its own queues) is not measured again.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Kind(enum.Enum):
    COUNTER = "counter"  # only grows, from zero with each start of the process
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Part(enum.Enum):
    """Which process exports a metric."""

    JOB = "training job"  # an actor that lives as long as the job does
    TRAINER = "trainer"  # rank 0
    READER = "reader"
    SHARD = "history shard"
    SCORER = "scorer"
    GATEWAY = "gateway"


class Metric(NamedTuple):
    """What is exported under a name."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()  # of a histogram
    # Of a counter with labels: the values that are exported as 0 from the start. A rate can only be told from
    # a counter that was there before it grew.
    known: tuple[tuple[str, ...], ...] = ()

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
    known=tuple(
        (d,)
        for d in (
            *("trained", "duplicate", "dead_letter", "tombstone"),
            *("control", "lost", "joined", "correction"),
        )
    ),
)
INPUT_WAIT = Metric(
    "grstream_train_input_wait_seconds", Kind.COUNTER, "Seconds that rank 0 waited for micro-batches."
)
EXECUTIONS = Metric(
    "grstream_train_executions",
    Kind.COUNTER,
    "Executions of Ray Data begun: one at the start, and another each time that one was recycled.",
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
    "Offsets from the first that is not settled to the log's end; none while the broker does not answer.",
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
PUBLISHED = Metric("grstream_weights_published", Kind.COUNTER, "Weights versions published.")
PUBLISH_FAILURES = Metric(
    "grstream_weights_publish_failures",
    Kind.COUNTER,
    "Times that no weights version could be published because storage failed.",
)
CHECKPOINT = Metric("grstream_checkpoint", Kind.GAUGE, "Newest checkpoint written.")
CHECKPOINT_SECONDS = Metric(
    "grstream_checkpoint_seconds",
    Kind.HISTOGRAM,
    "Seconds of writing a checkpoint, beside the steps.",
    boundaries=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
CHECKPOINT_STALL = Metric(
    "grstream_checkpoint_stall_seconds",
    Kind.HISTOGRAM,
    "Seconds that the steps stood still for a checkpoint's copy.",
    boundaries=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
GATE = Metric(
    "grstream_gate_open",
    Kind.GAUGE,
    "1 while weights are fit to be published and saved, 0 while they are not.",
)
STRAYS = Metric(
    "grstream_stray_users", Kind.GAUGE, "Users, one in 16 looked at, whose events came by several partitions."
)

# -- the training job, over all lives of its ranks ----------------------------------------------------------

RESTARTS = Metric(
    "grstream_train_restarts", Kind.COUNTER, "Starts of the worker group after the first: its last one died."
)
REVERTS = Metric(
    "grstream_train_reverts",
    Kind.COUNTER,
    "Returns to the newest checkpoint because the weights had gone bad.",
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

HISTORY_VISIBLE = Metric(
    "grstream_history_visible_seconds",
    Kind.HISTOGRAM,
    "Seconds from a record's time in the log until it is in a history that scores are computed from; of the "
    "oldest record of each read, once the shard has caught up.",
    boundaries=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
)
HISTORY_CONNECTED = Metric(
    "grstream_history_connected", Kind.GAUGE, "1 while a shard reaches the broker, 0 while not.", ("shard",)
)
HISTORY_CAUGHT_UP = Metric(
    "grstream_history_caught_up",
    Kind.GAUGE,
    "1 once a shard has been at the log's end and so answers, 0 before.",
    ("shard",),
)
HISTORY_LOST = Metric(
    "grstream_history_lost_offsets", Kind.COUNTER, "Offsets that the log no longer had when they were due."
)
HISTORY_REJECTED = Metric(
    "grstream_history_rejected_records", Kind.COUNTER, "Records that are no events, and were passed over."
)

# -- scorers ------------------------------------------------------------------------------------------------

SERVED_VERSION = Metric(
    "grstream_served_version", Kind.GAUGE, "Newest weights version that a scorer serves; 0 before the first."
)
SERVED_AGE = Metric("grstream_served_version_age_seconds", Kind.GAUGE, "Since that version was published.")
SERVED_EVENT_AGE = Metric(
    "grstream_served_event_age_seconds",
    Kind.GAUGE,
    "Age of the newest event that that version has learned from.",
)
VERSIONS_REFUSED = Metric(
    "grstream_weights_refused",
    Kind.COUNTER,
    "Weights versions that a scorer would not serve: corrupt, or unusable (not finite, another schema).",
    ("reason",),
    known=(("corrupt",), ("unusable",)),
)
WEIGHTS_ERRORS = Metric(
    "grstream_weights_read_errors",
    Kind.COUNTER,
    "Looks for a newer version that failed because storage or its orders could not be read.",
)
ENGINE_WAITING = Metric("grstream_engine_waiting_requests", Kind.GAUGE, "Requests that an engine holds.")
ENGINE_STEPS = Metric("grstream_engine_steps", Kind.COUNTER, "Steps of the engine, each shared by requests.")
ENGINE_REQUESTS = Metric(
    "grstream_engine_requests",
    Kind.COUNTER,
    "Requests answered, by what the cache of keys and values spared: hit, extend (all but the newest "
    "events), miss.",
    ("reuse",),
    known=(("hit",), ("extend",), ("miss",)),
)
ENGINE_CANDIDATES = Metric(
    "grstream_engine_candidates", Kind.COUNTER, "Query tokens scored, candidates mostly."
)
ENGINE_TOKENS = Metric(
    "grstream_engine_tokens",
    Kind.COUNTER,
    "Memory tokens of histories: encoded, or found in the cache by requests that were answered.",
    ("source",),
    known=(("encoded",), ("cached",)),
)
ENGINE_EXPIRED = Metric(
    "grstream_engine_expired_requests", Kind.COUNTER, "Requests whose time was over before their turn came."
)
ENGINE_REBUILT = Metric(
    "grstream_engine_rebuilt_histories",
    Kind.COUNTER,
    "Histories encoded anew under a newer version in idle steps.",
)
CACHE_EVICTED = Metric("grstream_cache_evicted_pages", Kind.COUNTER, "Pages that made room for others.")
CACHE_PAGES = Metric("grstream_cache_pages", Kind.GAUGE, "Pages of keys and values in use.")
CACHE_BYTES = Metric("grstream_cache_bytes", Kind.GAUGE, "Bytes of pages in use.")
CACHE_BUDGET = Metric(
    "grstream_cache_budget_bytes", Kind.GAUGE, "Bytes that pages may take: serve.cache_bytes."
)
ITEMS_LAG = Metric(
    "grstream_items_lag_offsets",
    Kind.GAUGE,
    "Offsets of the topic of items that a scorer has not read; only where there is such a topic.",
)

# -- gateways -----------------------------------------------------------------------------------------------

STAGE_SECONDS = Metric(
    "grstream_request_stage_seconds",
    Kind.HISTOGRAM,
    "Seconds of a request for scores, by stage: histories (asking the shard), scorer (asking the scorer), "
    "and within that queue (until the engine began), encode (until all of the history was encoded) and "
    "score; gateway is all of it, from the request's first byte at the gateway to its answer.",
    ("stage",),
    boundaries=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
REFUSALS = Metric(
    "grstream_refusals",
    Kind.COUNTER,
    "Requests, and elements of batches, that got an error, by its status and type.",
    ("status", "reason"),
    known=(
        ("401", "unauthorized"),
        ("409", "not_yet_visible"),
        ("413", "body_too_large"),
        ("413", "too_many"),
        ("422", "invalid_request"),
        ("429", "too_many_requests"),
        ("500", "internal"),
        ("500", "unusable_weights"),
        ("503", "broker_unavailable"),
        ("503", "history_shard_unavailable"),
        ("503", "log_refused"),
        ("503", "not_ready"),
        ("503", "queue_full"),
        ("503", "schema_changing"),
        ("503", "scorer_unavailable"),
        ("503", "timeout"),
        ("503", "topic_missing"),
    ),
)
STALE = Metric(
    "grstream_stale_answers",
    Kind.COUNTER,
    "Histories that were answered as last seen, because their shard was away.",
)
POSTED = Metric(
    "grstream_actions_posted", Kind.COUNTER, "Events that clients posted and the log acknowledged."
)
EXPOSURES_DROPPED = Metric(
    "grstream_exposures_dropped",
    Kind.COUNTER,
    "Impressions that are not in the log, since it did not keep up or was away.",
)

_EXPORTED_BY: tuple[tuple[Part, tuple[Metric, ...]], ...] = (
    (Part.JOB, (RESTARTS, REVERTS)),
    (
        Part.TRAINER,
        (
            *(EVENTS, STEPS, TOKENS, SETTLED, INPUT_WAIT, EXECUTIONS, STEP_SECONDS, LEARNED_SECONDS),
            *(RANKING_LOSS, RETRIEVAL_LOSS, LAG, FRESHNESS, ENTROPY, CALIBRATION, GAUC, HIT_RATE),
            *(WINDOW_EVENTS, MISSED, KEYS, EVICTIONS, VERSION, PUBLISHED, PUBLISH_FAILURES),
            *(CHECKPOINT, CHECKPOINT_SECONDS, CHECKPOINT_STALL, GATE, STRAYS),
        ),
    ),
    (
        Part.READER,
        (
            *(USERS, HISTORY_EVENTS, HISTORY_BYTES, USERS_EVICTED, LATE, TOO_LATE),
            *(OPEN_EXPOSURES, CLOSED_EARLY),
        ),
    ),
    (
        Part.SHARD,
        (
            *(HISTORY_LAG, HISTORY_AGE, HISTORY_VISIBLE, HISTORY_CONNECTED, HISTORY_CAUGHT_UP),
            *(HISTORY_LOST, HISTORY_REJECTED),
        ),
    ),
    (
        Part.SCORER,
        (
            *(SERVED_VERSION, SERVED_AGE, SERVED_EVENT_AGE, VERSIONS_REFUSED, WEIGHTS_ERRORS),
            *(ENGINE_WAITING, ENGINE_STEPS, ENGINE_REQUESTS, ENGINE_CANDIDATES, ENGINE_TOKENS),
            *(ENGINE_EXPIRED, ENGINE_REBUILT, CACHE_EVICTED, CACHE_PAGES, CACHE_BYTES, CACHE_BUDGET),
            ITEMS_LAG,
        ),
    ),
    (Part.GATEWAY, (STAGE_SECONDS, REFUSALS, STALE, POSTED, EXPOSURES_DROPPED)),
)
BY_PART: Mapping[Part, tuple[Metric, ...]] = MappingProxyType(dict(_EXPORTED_BY))
METRICS = tuple(metric for metrics in BY_PART.values() for metric in metrics)


def table() -> str:
    """All metrics as a table in Markdown, as they are known to Prometheus."""
    lines = ["| metric | kind | labels | by | |", "|---|---|---|---|---|"]
    for part, metrics in BY_PART.items():
        for metric in metrics:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            cells = (f"`{metric.exported}`", metric.kind.value, labels, part.value, metric.description)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
