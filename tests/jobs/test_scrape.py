"""A running system tells what its dashboards and alerts ask for, traces its requests, and logs as JSON."""

import contextlib
import dataclasses
import gzip
import http.server
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from grstream import telemetry
from grstream.kafka import create_topic
from jobs.stack import ROOT, LocalStack
from tests.jobs.promql import QUERIES, metrics_of

PATIENCE_S = 240.0
REPORT_S = 3  # Ray's agent forgets a gauge after two of these; its default is 10
USER, REQUEST_ID = "a-user-nobody-may-see", "one-request"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

pytestmark = pytest.mark.ray_cluster


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, as an OpenTelemetry collector would."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), Taking)

    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            span
            for request in requests
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]


class Taking(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        packed = self.headers.get("Content-Encoding") == "gzip"
        self.server.bodies.append(gzip.decompress(body) if packed else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@dataclasses.dataclass
class Scrapes:
    """What was scraped so far: the newest value of each series, and all names ever seen."""

    url: str
    values: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)

    def look(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            for line in httpx.get(self.url, timeout=30).text.splitlines():
                found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
                if found:
                    self.values[found[1], found[2] or ""] = float(found[3])

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.values}

    def total(self, metric: telemetry.Metric, *labels: str, suffix: str = "") -> float:
        """Over all processes; a series that is not there is a KeyError."""
        found = [
            value
            for (name, own), value in self.values.items()
            if name == metric.exported + suffix and all(label in own for label in labels)
        ]
        if not found:
            raise KeyError((metric.exported, *labels))
        return sum(found)


@dataclasses.dataclass
class System:
    stack: LocalStack
    collector: Collector
    scrapes: Scrapes

    def logs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Lines of JSON among all logs, and whose they are."""
        assert self.stack._ray_home is not None
        paths = [*(self.stack.home / "logs").glob("*.log")]
        paths += self.stack._ray_home.glob("session_2*/logs/worker-*.err")
        for path in paths:
            for line in path.read_text(errors="replace").splitlines():
                if line.startswith("{"):
                    yield path.name, json.loads(line)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Broker, stream, trainer and server, after some traffic."""
    settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    settings["logs"] = {"format": "json"}
    settings["kafka"] = {"items_topic": "items"}
    settings["quality"] = {"every_s": 2}
    settings["train"] |= {"checkpoint_every_s": 2, "publish_every_s": 1, "recent_events": 500}
    settings["serve"] = {"gateways": 1}
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        environment = {
            "RAY_metrics_report_interval_ms": str(1000 * REPORT_S),
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve.tracing:span_processors",
            "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        home = tmp_path_factory.mktemp("stack")
        stream = ["--data", "synthetic", "--speed", "200"]
        with LocalStack(settings, home, stream, environment=environment) as stack:
            stack.start()
            create_topic(stack.config.kafka, 1, "items")
            made = System(stack, collector, Scrapes(f"http://127.0.0.1:{stack.metrics_port}/metrics"))
            traffic(stack)
            yield made
            collector.shutdown()


def eventually(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(1)
    return found


def traffic(stack: LocalStack) -> None:
    """A post, scores for its user, a refusal; the user's name in a path and in bodies."""
    body = {"user_id": USER, "candidates": [1, 2, 3]}
    event = {"user_id": USER, "item_id": 1, "actions": ["click"], "timestamp_ms": 1_700_000_000_000}
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": REQUEST_ID}
    with httpx.Client(base_url=f"http://127.0.0.1:{stack.config.serve.port}", timeout=30) as client:
        ready = eventually(lambda: client.get("/readyz").status_code == 200, "a server that is ready")
        assert ready
        assert client.post("/v1/actions", json={"events": [event] * 2}).status_code == 200
        eventually(lambda: client.post("/v1/rank", json=body).status_code == 200, "scores")
        assert client.post("/v1/rank", json=body, headers=headers).status_code == 200
        assert client.get(f"/v1/users/{USER}/history").status_code == 200
        assert client.post("/v1/rank", json=body | {"candidates": []}).status_code == 422


def test_every_metric_that_dashboards_and_alerts_name_is_exported(system: System) -> None:
    asked = {name for query in QUERIES.values() for name in metrics_of(promql_parser.parse(query))}
    assert len(asked) > len(telemetry.METRICS)

    def missing() -> set[str]:
        system.scrapes.look()
        return asked - system.scrapes.names

    with contextlib.suppress(AssertionError):
        eventually(lambda: not missing(), "all metrics")
    assert missing() == set()


def test_counters_count_and_what_did_not_happen_is_0(system: System) -> None:
    look = system.scrapes

    def counted() -> bool:
        look.look()
        refused = look.total(telemetry.REFUSALS, 'status="422"', 'reason="invalid_request"')
        # Each process reports at its own times: a gateway's counts may be there before its scorer's.
        return (
            look.total(telemetry.POSTED) == 2
            and refused == 1
            and look.total(telemetry.ENGINE_REQUESTS) >= 2
            and look.total(telemetry.STAGE_SECONDS, 'stage="score"', suffix="_count") >= 2
            and look.total(telemetry.SETTLED, 'disposition="trained"') > 0
            and look.total(telemetry.PUBLISHED) >= 1
            and look.total(telemetry.EXECUTIONS) == 1
        )

    eventually(counted, "what was done")
    for metric, label in (
        (telemetry.SETTLED, 'disposition="lost"'),
        (telemetry.HISTORY_LOST, ""),
        (telemetry.VERSIONS_REFUSED, 'reason="corrupt"'),
        (telemetry.REFUSALS, 'reason="queue_full"'),
        (telemetry.PUBLISH_FAILURES, ""),
        (telemetry.RESTARTS, ""),
        (telemetry.REVERTS, ""),
    ):
        assert look.total(metric, label) == 0


def test_a_request_is_one_trace_from_the_clients_span_to_the_engines_stages(system: System) -> None:
    wanted = {"POST /v1/rank", "histories", "scorer", "engine.queue", "engine.encode", "engine.score"}

    def traced() -> list[Span]:
        spans = [span for span in system.collector.spans() if span.trace_id.hex() == TRACE]
        return spans if wanted <= {span.name for span in spans} else []

    spans = {span.span_id: span for span in eventually(traced, "the spans of a request")}
    count = Counter(span.name for span in spans.values())
    assert {count[name] for name in wanted} == {1}

    def above(span: Span) -> list[str]:
        return [span.name, *(above(spans[span.parent_span_id]) if span.parent_span_id in spans else [])]

    (score,) = (span for span in spans.values() if span.name == "engine.score")
    path = above(score)
    assert path.index("scorer") < path.index("POST /v1/rank")
    assert path[-1].startswith("proxy_http_request"), "Serve's spans are between the client's and ours"
    outermost = spans[score.span_id]
    while outermost.parent_span_id in spans:
        outermost = spans[outermost.parent_span_id]
    assert outermost.parent_span_id.hex() == CALLER
    told = b"".join(system.collector.bodies)
    assert b"/v1/users/" in told
    assert USER.encode() not in told


def test_what_the_processes_log_is_json_and_names_no_user(system: System) -> None:
    lines = list(system.logs())
    for _, line in lines:
        if "logger" in line:
            assert line.keys() >= {"time", "level", "logger", "message"}
    by_logger = {line["logger"] for _, line in lines if "logger" in line}
    assert by_logger >= {"jobs.train_stream", "grstream.trainer", "grstream.reader", "serve.access"}
    assert by_logger >= {"serve.follower", "grstream.tail"}
    (access,) = (line for _, line in lines if line.get("request_id") == REQUEST_ID)
    assert (access["path"], access["status"], access["reason"]) == ("/v1/rank", 200, None)
    assert access["version"] > 0
    refused = [line for _, line in lines if line.get("reason") == "invalid_request"]
    assert [(line["status"], line["path"]) for line in refused] == [(422, "/v1/rank")]
    trainers = (system.stack.home / "logs" / "trainer.log").read_text().splitlines()
    assert all(line.startswith("{") or "(raylet)" in line for line in trainers)
    progress = [line for _, line in lines if line.get("message") == "progress"]
    assert progress[-1]["positions"]
    assert progress[-1]["step"] > 0
    serving = [line for _, line in lines if line.get("logger") == "serve.follower"]
    assert any(line.get("version") for line in serving)
    assert not any(USER in json.dumps(line) for _, line in lines)
