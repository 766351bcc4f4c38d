"""The dashboards: the stream and training, serving, and what has gone wrong."""

from grstream import telemetry as t
from jobs.monitoring import queries as ray
from jobs.monitoring.panels import Dashboard, Panel, Row, Unit
from jobs.monitoring.queries import CLUSTER, HEALTHY, PROXY_HEALTHY, SCORES, WINDOW, Queries

_q = Queries(CLUSTER, WINDOW)
_ALL = 'slice="all"'


def _quantiles(metric: t.Metric | str, *matchers: str, by: str = "") -> dict[str, str]:
    name = f"{{{{{by}}}}} " if by else ""
    return {f"{name}p{q * 100:g}": _q.quantile(q, metric, *matchers, by=by) for q in (0.5, 0.99)}


def _gauge(metric: t.Metric, title: str, unit: Unit, by: str = "partition") -> Panel:
    return Panel(title, metric.description, unit, {f"{{{{{by}}}}}": _q.largest(metric, by=by)})


TRAINING = Dashboard(
    "grstream-training",
    "grstream: stream and training",
    "How far behind the log training is, how well it predicts what it has not learned yet, what it costs.",
    [
        Row(
            "Stream",
            [
                Panel(
                    "Lag",
                    t.LAG.description + " It grows where readers, or the trainer, are slower than producers.",
                    "short",
                    {"partition {{partition}}": _q.largest(t.LAG, by="partition")},
                    warn=10_000,
                    bad=100_000,
                ),
                Panel(
                    "Read to learned",
                    t.LEARNED_SECONDS.description,
                    "s",
                    _quantiles(t.LEARNED_SECONDS),
                    warn=5,
                    bad=30,
                ),
                Panel(
                    "Posted to visible",
                    t.HISTORY_VISIBLE.description,
                    "s",
                    _quantiles(t.HISTORY_VISIBLE),
                    warn=1,
                    bad=5,
                ),
                Panel(
                    "Offsets settled",
                    "By what became of them. Dead letters are records that are no events; lost ones were "
                    "gone before they were read.",
                    "ops",
                    {"{{disposition}}": _q.rate(t.SETTLED, by="disposition")},
                ),
                Panel(
                    "Age of the newest event",
                    "Of what was trained on, by the event's own time. It grows, too, while nothing is sent.",
                    "s",
                    {"partition {{partition}}": _q.largest(t.FRESHNESS, by="partition")},
                ),
                Panel(
                    "Share of time waiting for input",
                    t.INPUT_WAIT.description + " Near 1 the trainer keeps up; near 0 it is what is slow.",
                    "percentunit",
                    {"waiting": _q.rate(t.INPUT_WAIT)},
                    warn=0.2,
                    bad=0.05,
                    below=True,
                    most=1,
                ),
            ],
        ),
        Row(
            "Quality, of predictions made before learning",
            [
                Panel(
                    "Normalized entropy",
                    t.ENTROPY.description,
                    "none",
                    {"{{action}} {{window}}": _q.largest(t.ENTROPY, _ALL, by="action, window")},
                    warn=1,
                    bad=1.2,
                ),
                Panel(
                    "Normalized entropy by what is known of the user",
                    "By the number of events before the one predicted, and of events that came late.",
                    "none",
                    {"{{action}} {{window}} {{slice}}": _q.largest(t.ENTROPY, by="action, window, slice")},
                ),
                Panel(
                    "Calibration",
                    t.CALIBRATION.description + " 1 is right; a value far from it misleads whoever adds up "
                    "probabilities.",
                    "none",
                    {"{{action}} {{window}}": _q.largest(t.CALIBRATION, _ALL, by="action, window")},
                    warn=1.1,
                    bad=1.25,
                ),
                Panel(
                    "GAUC",
                    t.GAUC.description + " 0.5 is chance.",
                    "none",
                    {"{{action}} {{window}}": _q.largest(t.GAUC, _ALL, by="action, window")},
                    warn=0.55,
                    bad=0.5,
                    below=True,
                    least=None,
                    most=1,
                ),
                Panel(
                    "Hit rate",
                    t.HIT_RATE.description,
                    "percentunit",
                    {"@{{k}} {{window}}": _q.largest(t.HIT_RATE, _ALL, by="k, window")},
                ),
                Panel(
                    "Events in the windows",
                    "Few events make every figure beside this one uncertain. Missed ones came after a window "
                    "had moved on.",
                    "short",
                    {
                        "{{window}}": _q.largest(t.WINDOW_EVENTS, _ALL, by="window"),
                        "missed {{window}}": _q.largest(t.MISSED, by="window"),
                    },
                ),
            ],
        ),
        Row(
            "Training",
            [
                Panel("Events", t.EVENTS.description, "ops", {"events": _q.rate(t.EVENTS)}),
                Panel("Tokens", t.TOKENS.description, "ops", {"tokens": _q.rate(t.TOKENS)}),
                Panel("Steps", t.STEPS.description, "ops", {"steps": _q.rate(t.STEPS)}),
                Panel("Step", t.STEP_SECONDS.description, "s", _quantiles(t.STEP_SECONDS), warn=1, bad=5),
                Panel(
                    "Loss",
                    "Of the last step, nats an event: for the direction, not the level.",
                    "none",
                    {"ranking": _q.largest(t.RANKING_LOSS), "retrieval": _q.largest(t.RETRIEVAL_LOSS)},
                ),
                Panel(
                    "Vocabulary",
                    "Keys with an embedding row, and those that lost theirs, a second: where evictions are "
                    "steady, train.vocabulary_rows is too small or train.admit_after too low.",
                    "short",
                    {"keys": _q.largest(t.KEYS), "evicted/s": _q.rate(t.EVICTIONS)},
                ),
                Panel(
                    "Versions published",
                    "An hour. With none, scores do not learn; see the gate and publish failures.",
                    "short",
                    {"an hour": f"3600 * {_q.rate(t.PUBLISHED)}"},
                ),
                Panel(
                    "Newest version and checkpoint",
                    "Their numbers only go up.",
                    "none",
                    {"version": _q.largest(t.VERSION), "checkpoint": _q.largest(t.CHECKPOINT)},
                    least=None,
                ),
                Panel(
                    "Checkpoints",
                    t.CHECKPOINT_SECONDS.description + " And the copy, for which steps stand still.",
                    "s",
                    {
                        "written p99": _q.quantile(0.99, t.CHECKPOINT_SECONDS),
                        "steps stood still p99": _q.quantile(0.99, t.CHECKPOINT_STALL),
                    },
                    warn=10,
                    bad=60,
                ),
            ],
        ),
        Row(
            "Readers",
            [
                _gauge(t.USERS, "Users", "short"),
                _gauge(t.HISTORY_EVENTS, "Events in histories", "short"),
                _gauge(t.HISTORY_BYTES, "Bytes of histories", "bytes"),
                Panel(
                    "Late events",
                    "Ever: placed before others, and those too late for their place (histories.lateness_ms).",
                    "short",
                    {
                        "late, partition {{partition}}": _q.largest(t.LATE, by="partition"),
                        "too late, partition {{partition}}": _q.largest(t.TOO_LATE, by="partition"),
                    },
                ),
                _gauge(t.USERS_EVICTED, "Users evicted", "short"),
                Panel(
                    "Exposures",
                    "Open ones wait for labels; those closed early had no room (events.exposures.max_open).",
                    "short",
                    {
                        "open, partition {{partition}}": _q.largest(t.OPEN_EXPOSURES, by="partition"),
                        "closed early, partition {{partition}}": _q.largest(t.CLOSED_EARLY, by="partition"),
                    },
                ),
            ],
        ),
    ],
)

_REQUESTS = _q.rate(t.ENGINE_REQUESTS)
SERVING = Dashboard(
    "grstream-serving",
    "grstream: serving",
    "What is asked, how fast it is answered and by which stage, what the cache spares, and how fresh it is.",
    [
        Row(
            "Requests",
            [
                Panel(
                    "Requests",
                    "At Serve's proxies, by route.",
                    "ops",
                    {"{{method}} {{route}}": _q.rate(ray.HTTP_REQUESTS, by="method, route")},
                ),
                Panel(
                    "Latency at the proxy",
                    "Of requests for scores, by route, as Serve's proxies measure it.",
                    "ms",
                    _quantiles(ray.HTTP_LATENCY_MS, SCORES, by="route"),
                    warn=100,
                    bad=250,
                ),
                Panel(
                    "Refusals",
                    t.REFUSALS.description + " docs/api.md says what each means.",
                    "ops",
                    {"{{status}} {{reason}}": _q.rate(t.REFUSALS, by="status, reason") + " > 0"},
                ),
                Panel(
                    "Stages, p99",
                    t.STAGE_SECONDS.description,
                    "s",
                    {"{{stage}}": _q.quantile(0.99, t.STAGE_SECONDS, by="stage")},
                    warn=0.1,
                    bad=0.25,
                ),
                Panel(
                    "Stages, median",
                    t.STAGE_SECONDS.description,
                    "s",
                    {"{{stage}}": _q.quantile(0.5, t.STAGE_SECONDS, by="stage")},
                ),
                Panel(
                    "Events posted",
                    t.POSTED.description + " And impressions that could not be logged.",
                    "ops",
                    {"posted": _q.rate(t.POSTED), "impressions dropped": _q.rate(t.EXPOSURES_DROPPED)},
                ),
            ],
        ),
        Row(
            "Engine",
            [
                Panel(
                    "Waiting requests",
                    t.ENGINE_WAITING.description + " At serve.queue they get a 503.",
                    "short",
                    {"{{WorkerId}}": _q.largest(t.ENGINE_WAITING, by="WorkerId")},
                    warn=64,
                    bad=200,
                ),
                Panel(
                    "A step",
                    "Mean over steps: requests answered, and candidates scored.",
                    "short",
                    {
                        "requests": f"{_REQUESTS} / {_q.rate(t.ENGINE_STEPS)}",
                        "candidates": f"{_q.rate(t.ENGINE_CANDIDATES)} / {_q.rate(t.ENGINE_STEPS)}",
                    },
                ),
                Panel(
                    "Expired and rebuilt",
                    "Requests whose time was over before their turn; histories encoded anew in idle steps.",
                    "ops",
                    {"expired": _q.rate(t.ENGINE_EXPIRED), "rebuilt": _q.rate(t.ENGINE_REBUILT)},
                ),
                Panel(
                    "Cache, share of requests",
                    t.ENGINE_REQUESTS.description + " Each new version makes misses, until it is rebuilt.",
                    "percentunit",
                    {
                        "{{reuse}}": f"{_q.rate(t.ENGINE_REQUESTS, by='reuse')} / ignoring (reuse) "
                        f"group_left () {_REQUESTS}"
                    },
                    most=1,
                ),
                Panel(
                    "Memory tokens",
                    t.ENGINE_TOKENS.description,
                    "ops",
                    {"{{source}}": _q.rate(t.ENGINE_TOKENS, by="source")},
                ),
                Panel(
                    "Cache",
                    "Bytes of pages in use, by scorer, and what they may take; beyond it pages are evicted.",
                    "bytes",
                    {
                        "{{WorkerId}}": _q.largest(t.CACHE_BYTES, by="WorkerId"),
                        "budget": _q.largest(t.CACHE_BUDGET),
                    },
                ),
                Panel(
                    "Pages",
                    "In use, over all scorers, and evicted a second.",
                    "short",
                    {"in use": _q.total(t.CACHE_PAGES), "evicted/s": _q.rate(t.CACHE_EVICTED)},
                ),
                Panel(
                    "Requests at replicas",
                    "Being answered, by deployment.",
                    "short",
                    {"{{deployment}}": _q.total(ray.REPLICA_QUERIES, by="deployment")},
                ),
            ],
        ),
        Row(
            "Freshness",
            [
                Panel(
                    "Version served",
                    t.SERVED_VERSION.description + " More than one line for long: a scorer does not follow.",
                    "none",
                    {"{{WorkerId}}": _q.largest(t.SERVED_VERSION, by="WorkerId")},
                    least=None,
                ),
                Panel(
                    "Age of the version served",
                    t.SERVED_AGE.description,
                    "s",
                    {"oldest": _q.largest(t.SERVED_AGE)},
                    warn=60,
                    bad=600,
                ),
                Panel(
                    "Age of what it has learned",
                    t.SERVED_EVENT_AGE.description + " It grows, too, while nothing is sent.",
                    "s",
                    {"oldest": _q.largest(t.SERVED_EVENT_AGE)},
                    warn=300,
                    bad=900,
                ),
                Panel(
                    "Lag of histories",
                    t.HISTORY_LAG.description,
                    "short",
                    {"partition {{partition}}": _q.largest(t.HISTORY_LAG, by="partition")},
                    warn=1_000,
                    bad=10_000,
                ),
                Panel(
                    "Age of histories",
                    t.HISTORY_AGE.description,
                    "s",
                    {"partition {{partition}}": _q.largest(t.HISTORY_AGE, by="partition")},
                ),
                Panel(
                    "Lag of items, and stale answers",
                    "Offsets of the topic of items that are not read; histories answered as last seen.",
                    "short",
                    {"items": _q.largest(t.ITEMS_LAG), "stale/s": _q.rate(t.STALE)},
                ),
            ],
        ),
    ],
)

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
                    {"open": _q.least(t.GATE)},
                    bad=1,
                    below=True,
                    most=1,
                ),
                Panel(
                    "Restarts and reverts",
                    "Of the worker group, since the job began.",
                    "short",
                    {"restarts": _q.total(t.RESTARTS), "reverts": _q.total(t.REVERTS)},
                    warn=1,
                    bad=10,
                ),
                Panel(
                    "Lost offsets",
                    "By the trainer (source.on_gap: skip), and by history shards, since each began.",
                    "short",
                    {
                        "trainer": _q.total(t.SETTLED, 'disposition="lost"'),
                        "histories": _q.total(t.HISTORY_LOST),
                    },
                    bad=1,
                ),
                Panel(
                    "Dead letters",
                    "Records that are no events, a second; and those that history shards passed over.",
                    "ops",
                    {
                        "dead letters": _q.rate(t.SETTLED, 'disposition="dead_letter"'),
                        "passed over by histories": _q.rate(t.HISTORY_REJECTED),
                    },
                    warn=1,
                    bad=100,
                ),
                Panel(
                    "Executions begun",
                    t.EXECUTIONS.description + " An hour.",
                    "short",
                    {"an hour": f"3600 * {_q.rate(t.EXECUTIONS)}"},
                ),
                Panel(
                    "Users in several partitions",
                    t.STRAYS.description + " Some producer does not hash keys as Java's client does, or the "
                    "topic got partitions.",
                    "short",
                    {"users": _q.largest(t.STRAYS)},
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
                    {"{{reason}}": _q.total(t.VERSIONS_REFUSED, by="reason")},
                    bad=1,
                ),
                Panel(
                    "Storage fails",
                    "Versions that could not be published, and looks for newer ones that failed, a second.",
                    "ops",
                    {"publishing": _q.rate(t.PUBLISH_FAILURES), "reading": _q.rate(t.WEIGHTS_ERRORS)},
                    bad=0.01,
                ),
                Panel(
                    "Object store",
                    "Share of Ray's object store in use, by node.",
                    "percentunit",
                    {
                        "{{NodeAddress}}": f"{_q.largest(ray.STORE_USED, by='NodeAddress')} / "
                        f"({_q.largest(ray.STORE_USED, by='NodeAddress')} + "
                        f"{_q.largest(ray.STORE_FREE, by='NodeAddress')})"
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
                        "connected {{shard}}": _q.least(t.HISTORY_CONNECTED, by="shard"),
                        "caught up {{shard}}": _q.least(t.HISTORY_CAUGHT_UP, by="shard"),
                    },
                    bad=1,
                    below=True,
                    most=1,
                ),
                Panel(
                    "Deployments",
                    f"Serve's status: {HEALTHY} healthy, 5 and 4 scaling, 3 updating, 2 unhealthy, 1 failed.",
                    "none",
                    {"{{deployment}}": _q.least(ray.DEPLOYMENT_STATUS, by="deployment")},
                    warn=HEALTHY,
                    bad=3,
                    below=True,
                ),
                Panel(
                    "Proxies",
                    f"Serve's status, by node: {PROXY_HEALTHY} healthy, 1 starting, 3 unhealthy, 4 draining.",
                    "none",
                    {"{{node_ip_address}}": _q.largest(ray.PROXY_STATUS, by="node_ip_address")},
                    bad=PROXY_HEALTHY + 1,
                ),
                Panel(
                    "Replicas started",
                    "An hour, by deployment: after a start, each is one that died or was replaced.",
                    "short",
                    {"{{deployment}}": f"3600 * {_q.rate(ray.REPLICA_STARTS, by='deployment')}"},
                    warn=2,
                    bad=10,
                ),
                Panel(
                    "Refused for now",
                    "503, 429 and 409, a second: clients are told to come again.",
                    "ops",
                    {
                        "{{status}} {{reason}}": _q.rate(
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
                    {"{{route}}": _q.rate(ray.HTTP_REQUESTS, 'status_code="500"', by="route")},
                    bad=0.001,
                ),
            ],
        ),
    ],
)

DASHBOARDS = (TRAINING, SERVING, FAULTS)
