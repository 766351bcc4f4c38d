"""The dashboard of serving."""

from grstream import telemetry as t
from jobs.monitoring import queries as ray
from jobs.monitoring.common import q, quantiles
from jobs.monitoring.panels import Dashboard, Panel, Row
from jobs.monitoring.queries import SCORES

_REQUESTS = q.rate(t.ENGINE_REQUESTS)
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
                    {"{{method}} {{route}}": q.rate(ray.HTTP_REQUESTS, by="method, route")},
                ),
                Panel(
                    "Latency at the proxy",
                    "Of requests for scores, by route, as Serve's proxies measure it.",
                    "ms",
                    quantiles(ray.HTTP_LATENCY_MS, SCORES, by="route"),
                    warn=100,
                    bad=250,
                ),
                Panel(
                    "Refusals",
                    t.REFUSALS.description + " docs/api.md says what each means.",
                    "ops",
                    {"{{status}} {{reason}}": q.rate(t.REFUSALS, by="status, reason") + " > 0"},
                ),
                Panel(
                    "Stages, p99",
                    t.STAGE_SECONDS.description,
                    "s",
                    {"{{stage}}": q.quantile(0.99, t.STAGE_SECONDS, by="stage")},
                    warn=0.1,
                    bad=0.25,
                ),
                Panel(
                    "Stages, median",
                    t.STAGE_SECONDS.description,
                    "s",
                    {"{{stage}}": q.quantile(0.5, t.STAGE_SECONDS, by="stage")},
                ),
                Panel(
                    "Events posted",
                    t.POSTED.description + " And impressions that could not be logged.",
                    "ops",
                    {"posted": q.rate(t.POSTED), "impressions dropped": q.rate(t.EXPOSURES_DROPPED)},
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
                    {"{{WorkerId}}": q.largest(t.ENGINE_WAITING, by="WorkerId")},
                    warn=64,
                    bad=200,
                ),
                Panel(
                    "A step",
                    "Mean over steps: requests answered, and candidates scored.",
                    "short",
                    {
                        "requests": f"{_REQUESTS} / {q.rate(t.ENGINE_STEPS)}",
                        "candidates": f"{q.rate(t.ENGINE_CANDIDATES)} / {q.rate(t.ENGINE_STEPS)}",
                    },
                ),
                Panel(
                    "Expired and rebuilt",
                    "Requests whose time was over before their turn; histories encoded anew in idle steps.",
                    "ops",
                    {"expired": q.rate(t.ENGINE_EXPIRED), "rebuilt": q.rate(t.ENGINE_REBUILT)},
                ),
                Panel(
                    "Cache, share of requests",
                    t.ENGINE_REQUESTS.description + " Each new version makes misses, until it is rebuilt.",
                    "percentunit",
                    {
                        "{{reuse}}": f"{q.rate(t.ENGINE_REQUESTS, by='reuse')} / ignoring (reuse) "
                        f"group_left () {_REQUESTS}"
                    },
                    most=1,
                ),
                Panel(
                    "Memory tokens",
                    t.ENGINE_TOKENS.description,
                    "ops",
                    {"{{source}}": q.rate(t.ENGINE_TOKENS, by="source")},
                ),
                Panel(
                    "Cache",
                    "Bytes of pages in use, by scorer, and what they may take; beyond it pages are evicted.",
                    "bytes",
                    {
                        "{{WorkerId}}": q.largest(t.CACHE_BYTES, by="WorkerId"),
                        "budget": q.largest(t.CACHE_BUDGET),
                    },
                ),
                Panel(
                    "Pages",
                    "In use, over all scorers, and evicted a second.",
                    "short",
                    {"in use": q.total(t.CACHE_PAGES), "evicted/s": q.rate(t.CACHE_EVICTED)},
                ),
                Panel(
                    "Requests at replicas",
                    "Being answered, by deployment.",
                    "short",
                    {"{{deployment}}": q.total(ray.REPLICA_QUERIES, by="deployment")},
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
                    {"{{WorkerId}}": q.largest(t.SERVED_VERSION, by="WorkerId")},
                    least=None,
                ),
                Panel(
                    "Age of the version served",
                    t.SERVED_AGE.description,
                    "s",
                    {"oldest": q.largest(t.SERVED_AGE)},
                    warn=60,
                    bad=600,
                ),
                Panel(
                    "Age of what it has learned",
                    t.SERVED_EVENT_AGE.description + " It grows, too, while nothing is sent.",
                    "s",
                    {"oldest": q.largest(t.SERVED_EVENT_AGE)},
                    warn=300,
                    bad=900,
                ),
                Panel(
                    "Lag of histories",
                    t.HISTORY_LAG.description,
                    "short",
                    {"partition {{partition}}": q.largest(t.HISTORY_LAG, by="partition")},
                    warn=1_000,
                    bad=10_000,
                ),
                Panel(
                    "Age of histories",
                    t.HISTORY_AGE.description,
                    "s",
                    {"partition {{partition}}": q.largest(t.HISTORY_AGE, by="partition")},
                ),
                Panel(
                    "Lag of items, and stale answers",
                    "Offsets of the topic of items that are not read; histories answered as last seen.",
                    "short",
                    {"items": q.largest(t.ITEMS_LAG), "stale/s": q.rate(t.STALE)},
                ),
            ],
        ),
    ],
)
