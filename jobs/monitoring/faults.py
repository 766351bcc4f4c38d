"""The dashboard of what has gone wrong."""

from grstream import telemetry as t
from jobs.monitoring import queries as ray
from jobs.monitoring.common import q
from jobs.monitoring.panels import Dashboard, Panel, Row
from jobs.monitoring.queries import HEALTHY, PROXY_HEALTHY

FAULTS = Dashboard(
    "grstream-faults",
    "grstream: faults",
    "What has gone wrong, and what the system did about it. Every line at its resting value: nothing has.",
    [
        Row(
            "Training",
            [
                Panel(
                    "Gate",
                    t.GATE.description,
                    "bool_yes_no",
                    {"open": q.least(t.GATE)},
                    bad=1,
                    below=True,
                    most=1,
                ),
                Panel(
                    "Restarts and reverts",
                    "Of the worker group, since the job began.",
                    "short",
                    {"restarts": q.total(t.RESTARTS), "reverts": q.total(t.REVERTS)},
                    warn=1,
                    bad=10,
                ),
                Panel(
                    "Lost offsets",
                    "By the trainer (source.on_gap: skip), and by history shards, since each began.",
                    "short",
                    {
                        "trainer": q.total(t.SETTLED, 'disposition="lost"'),
                        "histories": q.total(t.HISTORY_LOST),
                    },
                    bad=1,
                ),
                Panel(
                    "Dead letters",
                    "Records that are no events, a second; and those that history shards passed over.",
                    "ops",
                    {
                        "dead letters": q.rate(t.SETTLED, 'disposition="dead_letter"'),
                        "passed over by histories": q.rate(t.HISTORY_REJECTED),
                    },
                    warn=1,
                    bad=100,
                ),
                Panel(
                    "Executions begun",
                    t.EXECUTIONS.description + " An hour.",
                    "short",
                    {"an hour": f"3600 * {q.rate(t.EXECUTIONS)}"},
                ),
                Panel(
                    "Users in several partitions",
                    t.STRAYS.description + " Some producer does not hash keys as Java's client does, or the "
                    "topic got partitions.",
                    "short",
                    {"users": q.largest(t.STRAYS)},
                    warn=1,
                ),
            ],
        ),
        Row(
            "Versions and storage",
            [
                Panel(
                    "Versions refused",
                    t.VERSIONS_REFUSED.description + " Since each scorer began.",
                    "short",
                    {"{{reason}}": q.total(t.VERSIONS_REFUSED, by="reason")},
                    bad=1,
                ),
                Panel(
                    "Storage fails",
                    "Versions that could not be published, and looks for newer ones that failed, a second.",
                    "ops",
                    {"publishing": q.rate(t.PUBLISH_FAILURES), "reading": q.rate(t.WEIGHTS_ERRORS)},
                    bad=0.01,
                ),
                Panel(
                    "Object store",
                    "Share of Ray's object store in use, by node.",
                    "percentunit",
                    {
                        "{{NodeAddress}}": f"{q.largest(ray.STORE_USED, by='NodeAddress')} / "
                        f"({q.largest(ray.STORE_USED, by='NodeAddress')} + "
                        f"{q.largest(ray.STORE_FREE, by='NodeAddress')})"
                    },
                    warn=0.8,
                    bad=0.9,
                    most=1,
                ),
            ],
        ),
        Row(
            "Serving",
            [
                Panel(
                    "Shards",
                    "1 while a history shard reaches the broker, and once it has caught up with the log.",
                    "bool_yes_no",
                    {
                        "connected {{shard}}": q.least(t.HISTORY_CONNECTED, by="shard"),
                        "caught up {{shard}}": q.least(t.HISTORY_CAUGHT_UP, by="shard"),
                    },
                    bad=1,
                    below=True,
                    most=1,
                ),
                Panel(
                    "Deployments",
                    f"Serve's status: {HEALTHY} healthy, 5 and 4 scaling, 3 updating, 2 unhealthy, 1 failed.",
                    "none",
                    {"{{deployment}}": q.least(ray.DEPLOYMENT_STATUS, by="deployment")},
                    warn=HEALTHY,
                    bad=3,
                    below=True,
                ),
                Panel(
                    "Proxies",
                    f"Serve's status, by node: {PROXY_HEALTHY} healthy, 1 starting, 3 unhealthy, 4 draining.",
                    "none",
                    {"{{node_ip_address}}": q.largest(ray.PROXY_STATUS, by="node_ip_address")},
                    bad=PROXY_HEALTHY + 1,
                ),
                Panel(
                    "Replicas started",
                    "An hour, by deployment: after a start, each is one that died or was replaced.",
                    "short",
                    {"{{deployment}}": f"3600 * {q.rate(ray.REPLICA_STARTS, by='deployment')}"},
                    warn=2,
                    bad=10,
                ),
                Panel(
                    "Refused for now",
                    "503, 429 and 409, a second: clients are told to come again.",
                    "ops",
                    {
                        "{{status}} {{reason}}": q.rate(
                            t.REFUSALS, 'status=~"503|429|409"', by="status, reason"
                        )
                        + " > 0"
                    },
                    warn=0.1,
                    bad=10,
                ),
                Panel(
                    "Broken",
                    "500 at the proxies, a second: a bug, or weights that give no numbers.",
                    "ops",
                    {"{{route}}": q.rate(ray.HTTP_REQUESTS, 'status_code="500"', by="route")},
                    bad=0.001,
                ),
            ],
        ),
    ],
)
