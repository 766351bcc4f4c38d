"""The alerts, as a PrometheusRule: each names what to do in docs/operations.md."""

import dataclasses
from typing import Any, Literal

from grstream import telemetry as t
from jobs.monitoring import queries as ray
from jobs.monitoring.queries import HEALTHY, PROXY_HEALTHY, SCORES, Queries

RUNBOOKS = "docs/operations.md"  # another place is given where the files are made

# Where a bound is not a matter of taste but of load, set it for the system at hand.
LAG = 10_000  # offsets
LEARNED_S, VISIBLE_S = 30, 5
SERVED_S = 900  # beyond `publish_every_s` and, where exposures are joined, their window
CALIBRATION = (0.8, 1.25)
MISSES = 0.5  # share of requests
REFUSED = 0.01  # share of requests that get a 503
LATENCY_MS = 250
WAITING = 100  # requests in an engine; serve.queue is the end
DEAD_LETTERS = 0.01  # share of records
STORE = 0.9  # share of the object store


@dataclasses.dataclass(frozen=True)
class Alert:
    """`runbook`: an anchor of docs/operations.md. `lasts`: how long it must be so."""

    name: str
    severity: Literal["info", "warning", "critical"]
    expr: str
    lasts: str
    summary: str
    runbook: str


def _in(window: str) -> Queries:
    return Queries("", window, within="namespace")  # a system lives in one; its clusters may be several


_now, _5m, _10m, _15m, _30m, _1h = (_in(window) for window in ("5m", "5m", "10m", "15m", "30m", "1h"))
_MISS = 'reuse="miss"'
_DEAD, _LOST = 'disposition="dead_letter"', 'disposition="lost"'
_ALL = 'slice="all"'
_UNAVAILABLE, _BROKEN = 'status_code="503"', 'status_code="500"'
_ASKED = 'route!~"/readyz|/healthz"'
_SHARDS = 'deployment=~"history-.*"'

ALERTS = (
    # -- the stream
    Alert(
        "GrstreamLagGrows",
        "warning",
        f"{_now.total(t.LAG)} > {LAG} and deriv({_now.total(t.LAG)}[15m:1m]) > 0",
        "10m",
        "Training is {{ $value }} offsets behind the log, and falls further behind.",
        "lag-grows",
    ),
    Alert(
        "GrstreamLearnsLate",
        "warning",
        f"{_10m.quantile(0.99, t.LEARNED_SECONDS)} > {LEARNED_S}",
        "10m",
        "One event in a hundred is learned {{ $value | humanizeDuration }} after it was read.",
        "lag-grows",
    ),
    Alert(
        "GrstreamVisibleLate",
        "warning",
        f"{_10m.quantile(0.99, t.HISTORY_VISIBLE)} > {VISIBLE_S}",
        "10m",
        "Actions are in scores only {{ $value | humanizeDuration }} after they were sent.",
        "histories-lag",
    ),
    Alert(
        "GrstreamServedWeightsOld",
        "critical",
        f"{_now.largest(t.SERVED_EVENT_AGE)} > {SERVED_S} and "
        f"{_10m.rate(t.HISTORY_VISIBLE, suffix='_count')} > 0",
        "5m",
        "Events come in, and the served weights have learned from none of the last "
        "{{ $value | humanizeDuration }}.",
        "nothing-is-published",
    ),
    Alert(
        "GrstreamBrokerAway",
        "critical",
        f"{_now.least(t.HISTORY_CONNECTED, by='shard')} == 0",
        "1m",
        "History shard {{ $labels.shard }} does not reach the broker, or a partition has no leader.",
        "the-broker-is-away",
    ),
    Alert(
        "GrstreamOffsetsLost",
        "critical",
        f"{_1h.increase(t.SETTLED, _LOST)} > 0 or {_1h.increase(t.HISTORY_LOST)} > 0",
        "0m",
        "{{ $value }} offsets were gone from the log before they were read.",
        "offsets-were-lost",
    ),
    Alert(
        "GrstreamDeadLetters",
        "warning",
        f"{_10m.rate(t.SETTLED, _DEAD)} / {_10m.rate(t.SETTLED)} > {DEAD_LETTERS}",
        "10m",
        "{{ $value | humanizePercentage }} of the records are no events.",
        "dead-letters",
    ),
    Alert(
        "GrstreamStrayUsers",
        "info",
        f"{_now.largest(t.STRAYS)} > 0",
        "0m",
        "Users come by several partitions, and each of these holds a part of their history.",
        "partitions-were-added",
    ),
    # -- training
    Alert(
        "GrstreamGateClosed",
        "critical",
        f"{_now.least(t.GATE)} == 0",
        "1m",
        "Events are predicted much worse than they were: no weights are published or saved.",
        "the-gate-is-closed",
    ),
    Alert(
        "GrstreamWorseThanBaseRate",
        "warning",
        f"{_now.largest(t.ENTROPY, _ALL, by='window, action')} > 1",
        "30m",
        "{{ $labels.action }} is predicted worse than its base rate would: {{ $value }} over "
        "{{ $labels.window }}.",
        "the-gate-is-closed",
    ),
    Alert(
        "GrstreamCalibrationOff",
        "warning",
        f"{_now.largest(t.CALIBRATION, _ALL, by='window, action')} > {CALIBRATION[1]} or "
        f"{_now.largest(t.CALIBRATION, _ALL, by='window, action')} < {CALIBRATION[0]}",
        "30m",
        "Of {{ $labels.action }}, {{ $value }} times as many are predicted as happen, over "
        "{{ $labels.window }}.",
        "the-gate-is-closed",
    ),
    Alert(
        "GrstreamNothingPublished",
        "critical",
        f"{_15m.increase(t.PUBLISHED)} == 0 and {_15m.increase(t.EVENTS)} > 0",
        "5m",
        "Events are learned, and no version was published for 15 minutes.",
        "nothing-is-published",
    ),
    Alert(
        "GrstreamPublishFails",
        "warning",
        f"{_10m.increase(t.PUBLISH_FAILURES)} > 2",
        "0m",
        "Storage did not take a weights version {{ $value }} times in 10 minutes.",
        "storage-is-full-or-away",
    ),
    Alert(
        "GrstreamTrainerRestarts",
        "warning",
        f"{_30m.increase(t.RESTARTS)} > 2",
        "0m",
        "The worker group was started again {{ $value }} times in 30 minutes.",
        "the-trainer-was-killed",
    ),
    Alert(
        "GrstreamTrainerReverts",
        "critical",
        f"{_1h.increase(t.REVERTS)} > 0",
        "0m",
        "Training went back to its newest checkpoint because the weights had gone bad.",
        "the-gate-is-closed",
    ),
    Alert(
        "GrstreamTrainerGone",
        "critical",
        f"absent({_now.of(t.GATE)})",
        "5m",
        "No trainer tells of itself.",
        "the-trainer-was-killed",
    ),
    # -- weights on their way to scorers
    Alert(
        "GrstreamVersionRefused",
        "critical",
        f"{_15m.increase(t.VERSIONS_REFUSED, by='reason')} > 0",
        "0m",
        "A scorer refused a weights version: it is {{ $labels.reason }}. The one before goes on serving.",
        "a-version-is-corrupt",
    ),
    Alert(
        "GrstreamStorageUnreadable",
        "warning",
        f"{_5m.increase(t.WEIGHTS_ERRORS)} > 5",
        "5m",
        "Scorers cannot read the weights' storage; they serve what they have.",
        "storage-is-full-or-away",
    ),
    # -- serving
    Alert(
        "GrstreamRefuses",
        "critical",
        f"{_5m.rate(ray.HTTP_REQUESTS, _UNAVAILABLE, _ASKED)} / {_5m.rate(ray.HTTP_REQUESTS, _ASKED)} "
        f"> {REFUSED}",
        "5m",
        "{{ $value | humanizePercentage }} of requests are answered with a 503.",
        "requests-are-refused",
    ),
    Alert(
        "GrstreamQueueLong",
        "warning",
        f"{_now.largest(t.ENGINE_WAITING)} > {WAITING}",
        "5m",
        "An engine holds {{ $value }} requests.",
        "requests-are-refused",
    ),
    Alert(
        "GrstreamSlow",
        "warning",
        f"{_5m.quantile(0.99, ray.HTTP_LATENCY_MS, SCORES)} > {LATENCY_MS}",
        "10m",
        "One request for scores in a hundred takes {{ $value }} ms or more.",
        "answers-are-slow",
    ),
    Alert(
        "GrstreamBroken",
        "critical",
        f"{_5m.rate(ray.HTTP_REQUESTS, _BROKEN)} > 0",
        "5m",
        "Requests end with a 500.",
        "requests-are-refused",
    ),
    Alert(
        "GrstreamCacheMisses",
        "warning",
        f"{_15m.rate(t.ENGINE_REQUESTS, _MISS)} / {_15m.rate(t.ENGINE_REQUESTS)} > {MISSES}",
        "15m",
        "{{ $value | humanizePercentage }} of requests find nothing of their history in the cache.",
        "the-cache-misses",
    ),
    Alert(
        "GrstreamShardAway",
        "critical",
        f"{_now.least(ray.DEPLOYMENT_STATUS, _SHARDS, by='deployment')} < {HEALTHY} or "
        f"{_now.least(t.HISTORY_CAUGHT_UP, by='shard')} == 0",
        "5m",
        "A history shard is away, or reads its histories anew: its users get no scores.",
        "a-shard-is-away",
    ),
    Alert(
        "GrstreamStaleAnswers",
        "warning",
        f"{_5m.rate(t.STALE)} > 0",
        "5m",
        "{{ $value }} answers a second are made from histories as they were last seen.",
        "a-shard-is-away",
    ),
    Alert(
        "GrstreamReplicaDown",
        "critical",
        f"{_now.least(ray.DEPLOYMENT_STATUS, by='deployment')} < {HEALTHY}",
        "10m",
        "Deployment {{ $labels.deployment }} is not as it should be: status {{ $value }}.",
        "a-replica-or-proxy-was-killed",
    ),
    Alert(
        "GrstreamReplicasRestart",
        "warning",
        f"{_15m.increase(ray.REPLICA_STARTS, by='deployment')} > 3",
        "0m",
        "Replicas of {{ $labels.deployment }} were started {{ $value }} times in 15 minutes.",
        "a-replica-or-proxy-was-killed",
    ),
    Alert(
        "GrstreamProxyDown",
        "critical",
        f"{_now.largest(ray.PROXY_STATUS, by='node_ip_address')} != {PROXY_HEALTHY}",
        "2m",
        "The proxy on {{ $labels.node_ip_address }} is not healthy: status {{ $value }}.",
        "a-replica-or-proxy-was-killed",
    ),
    Alert(
        "GrstreamObjectStoreFull",
        "warning",
        f"{_now.largest(ray.STORE_USED, by='NodeAddress')} / "
        f"({_now.largest(ray.STORE_USED, by='NodeAddress')} + "
        f"{_now.largest(ray.STORE_FREE, by='NodeAddress')}) > {STORE}",
        "10m",
        "Ray's object store on {{ $labels.NodeAddress }} is {{ $value | humanizePercentage }} full.",
        "out-of-memory",
    ),
    Alert(
        "GrstreamImpressionsDropped",
        "warning",
        f"{_10m.increase(t.EXPOSURES_DROPPED)} > 0",
        "5m",
        "{{ $value }} listed items were not logged in 10 minutes.",
        "the-broker-is-away",
    ),
)


def rule(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The PrometheusRule; `runbooks`: where docs/operations.md is to be read."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook_url": f"{runbooks}#{alert.runbook}"},
        }
        for alert in ALERTS
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "grstream", "labels": {"app.kubernetes.io/part-of": "grstream"}},
        "spec": {"groups": [{"name": "grstream", "interval": "30s", "rules": rules}]},
    }
