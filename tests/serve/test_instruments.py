"""What a gateway measures: stages and refusals as metrics, and spans where traces are on."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from grstream import telemetry
from grstream.scores import Encoded
from grstream.tail import TailBehind
from grstream.telemetry import BY_PART, Kind, Part
from serve.errors import Unavailable
from serve.gateway import create_app
from serve.instruments import Instruments, engine_spans
from serve.tracing import WithoutUsers
from tests.exported import Exported
from tests.serve.fake import CONFIG, FakeBackend

BODY = {"user_id": "eve", "candidates": [1, 2]}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REFUSALS, STAGES = telemetry.REFUSALS.name, telemetry.STAGE_SECONDS.name


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def out() -> Exported:
    return Exported()


@pytest.fixture
def client(backend: FakeBackend, out: Exported) -> TestClient:
    app = create_app(CONFIG, backend, instruments=Instruments(out))
    return TestClient(app, raise_server_exceptions=False)


def raising(error: Exception) -> Any:
    async def broken() -> None:
        raise error

    return broken


def test_what_never_happened_is_there_as_0(client: TestClient, out: Exported) -> None:
    counters = {m.name for m in BY_PART[Part.GATEWAY] if m.kind is Kind.COUNTER}
    assert {name for name, *_ in out.values} == counters
    assert set(out.values.values()) == {0}


def test_a_request_for_scores_is_told_by_its_stages(client: TestClient, out: Exported) -> None:
    assert client.post("/v1/rank", json=BODY).status_code == 200
    took = {stage: values for (name, stage), values in out.observed.items() if name == STAGES}
    # The backend says that the engine was waited for for 0.5 ms of 2, and that nothing had to be encoded.
    assert took["queue"] == [pytest.approx(0.0005)]
    assert took["score"] == [pytest.approx(0.0015)]
    assert took["encode"] == [0]
    assert 0 < took["histories"][0] + took["scorer"][0] < took["gateway"][0]
    client.get("/v1/model")
    client.post("/v1/rank", json=BODY | {"candidates": []})
    assert len(out.observed[STAGES, "gateway"]) == 1, "only answered requests for scores are timed"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unavailable("queue_full", "it is"), 503, "queue_full"),
        (TailBehind("not yet"), 409, "not_yet_visible"),
        (KeyError("a bug"), 500, "internal"),
    ],
)
def test_a_refusal_is_counted_by_its_reason(
    client: TestClient, backend: FakeBackend, out: Exported, error: Exception, status: int, reason: str
) -> None:
    backend.broken = raising(error)
    assert client.post("/v1/rank", json=BODY).status_code == status
    assert out.values[REFUSALS, str(status), reason] == 1
    assert sum(n for (name, *_), n in out.values.items() if name == REFUSALS) == 1
    assert (str(status), reason) in telemetry.REFUSALS.known


def test_refused_elements_of_a_batch_are_counted(client: TestClient, out: Exported) -> None:
    client.post("/v1/batch/rank", json={"requests": [BODY, {"user_id": 1}, BODY | {"candidates": []}]})
    assert out.values[REFUSALS, "422", "invalid_request"] == 2


def test_posts_and_stale_answers_are_counted(client: TestClient, backend: FakeBackend, out: Exported) -> None:
    event = {"user_id": 1, "item_id": 2, "actions": ["like"], "timestamp_ms": 3}
    client.post("/v1/actions", json={"events": [event] * 3})
    backend.stale = True
    client.post("/v1/rank", json=BODY)
    assert out.values[telemetry.POSTED.name,] == 3
    assert out.values[telemetry.STALE.name,] == 1


# -- traces -------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exporter.get_finished_spans()
    found = {span.name: span for span in spans}
    assert len(found) == len(spans)
    return found


def test_a_request_is_a_span_under_the_clients_with_its_calls_below(
    backend: FakeBackend, out: Exported, memory: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = memory
    app = create_app(CONFIG, backend, instruments=Instruments(out, provider.get_tracer("test")))
    TestClient(app).post("/v1/rank", json=BODY, headers={"traceparent": CALLER, "X-Request-Id": "one"})
    found = by_name(exporter)
    assert found.keys() == {"POST /v1/rank", "histories", "scorer"}
    request = found["POST /v1/rank"]
    assert request.context.trace_id == int(CALLER.split("-")[1], 16)
    assert request.parent is not None
    assert request.parent.span_id == int(CALLER.split("-")[2], 16)
    for name in ("histories", "scorer"):
        parent = found[name].parent
        assert parent is not None
        assert parent.span_id == request.context.span_id
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/rank",
        "http.response.status_code": 200,
        "grstream.request_id": "one",
        "grstream.version": 4,
    }
    assert '"eve"' not in request.to_json()


def test_a_span_of_a_refused_request_says_why(
    backend: FakeBackend, out: Exported, memory: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = memory
    backend.broken = raising(Unavailable("queue_full", "it is"))
    app = create_app(CONFIG, backend, instruments=Instruments(out, provider.get_tracer("test")))
    TestClient(app).post("/v1/rank", json=BODY)
    found = by_name(exporter)
    assert found["histories"].status.status_code is trace.StatusCode.ERROR
    assert (found["POST /v1/rank"].attributes or {})["error.type"] == "queue_full"


def test_the_engines_stages_are_spans_one_after_another(
    memory: tuple[TracerProvider, InMemorySpanExporter],
) -> None:
    provider, exporter = memory
    tracer, answered = provider.get_tracer("test"), time.time_ns()
    encoded = Encoded(tokens=30, cached=10, waited_ms=1.0, took_ms=10.0, encode_ms=6.0)
    with tracer.start_as_current_span("replica"):
        engine_spans(tracer, encoded, answered)
    found = by_name(exporter)
    took = [found[f"engine.{name}"] for name in ("queue", "encode", "score")]
    assert [s.end_time - s.start_time for s in took] == [1_000_000, 6_000_000, 3_000_000]  # type: ignore[operator]
    assert took[0].end_time == took[1].start_time
    assert took[1].end_time == took[2].start_time
    assert took[2].end_time == answered
    assert {s.parent.span_id for s in took if s.parent} == {found["replica"].context.span_id}


def test_a_span_that_is_named_by_a_path_is_exported_by_its_route() -> None:
    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(WithoutUsers(memory)))
    tracer = provider.get_tracer("test")
    for path in ("/v1/users/ann/history", "/v1/users/a/b c", "/v1/rank"):
        with tracer.start_as_current_span(
            f"proxy GET {path}", attributes={"http.route": path, "n": 3}
        ) as span:
            span.add_event("seen")
    provider.shutdown()
    spans = memory.get_finished_spans()
    assert [span.name for span in spans] == [
        "proxy GET /v1/users/{user_id}/history",
        "proxy GET /v1/users/{user_id}",
        "proxy GET /v1/rank",
    ]
    assert dict(spans[0].attributes or {}) == {"http.route": "/v1/users/{user_id}/history", "n": 3}
    assert [event.name for event in spans[0].events] == ["seen"]
    assert len({span.get_span_context().span_id for span in spans}) == 3


def test_traces_that_are_off_cost_microseconds() -> None:
    """Three spans, as a request has them, against what a request takes: milliseconds."""
    instruments = Instruments(Exported())
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(200):
            for name in ("request", "histories", "scorer"):
                with instruments.span(name) as span:
                    assert not span.is_recording()
        best = min(best, (time.perf_counter() - began) / 200)
    print(f"three spans that are not made: {1e6 * best:.1f} us")
    assert best < 50e-6
