"""`Instruments`: what a gateway measures of requests, as metrics and, where traces are on, as spans."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Tracer

from grstream import telemetry
from grstream.exporter import Exporter
from grstream.scores import Encoded
from grstream.telemetry import Part

TRACER = "grstream"


class Instruments:
    """Of one gateway replica. Spans are made where Serve traces or a tracer is given; else they are free."""

    def __init__(self, exporter: Exporter | None = None, tracer: Tracer | None = None) -> None:
        self.exporter = exporter or Exporter()
        self.exporter.begin(Part.GATEWAY)
        self._tracer = tracer

    def span(
        self,
        name: str,
        parent: Context | None = None,
        kind: SpanKind = SpanKind.CLIENT,
        attributes: Mapping[str, str] | None = None,
    ) -> contextlib.AbstractContextManager[Span]:
        """A span below `parent`, by default the current one, and current itself within."""
        tracer = self._tracer
        if tracer is None:
            if not isinstance(trace.get_tracer_provider(), TracerProvider):
                return contextlib.nullcontext(trace.INVALID_SPAN)
            tracer = trace.get_tracer(TRACER)
        return tracer.start_as_current_span(name, parent, kind, attributes)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A call of what stands behind the gateway: counted if it is answered, a span in any case."""
        with self.span(name):
            began = time.perf_counter()
            yield
            self.took(name, time.perf_counter() - began)

    def took(self, stage: str, seconds: float) -> None:
        self.exporter.observe(telemetry.STAGE_SECONDS, seconds, stage=stage)

    def engine(self, encoded: Encoded | None) -> None:
        """The stages that an answer tells of."""
        if encoded is not None:
            self.took("queue", encoded.waited_ms / 1000)
            self.took("encode", encoded.encode_ms / 1000)
            self.took("score", encoded.score_ms / 1000)

    def refused(self, status: int, reason: str) -> None:
        self.exporter.add(telemetry.REFUSALS, 1, status=status, reason=reason)

    def stale(self) -> None:
        self.exporter.add(telemetry.STALE, 1)

    def posted(self, events: int) -> None:
        self.exporter.add(telemetry.POSTED, events)

    def exposures_dropped(self, total: int) -> None:
        self.exporter.count_to(telemetry.EXPOSURES_DROPPED, total)


def engine_spans(tracer: Tracer, encoded: Encoded | None, answered_ns: int) -> None:
    """An engine's stages as spans below the current one, which end when the answer came."""
    if encoded is None:
        return
    at = answered_ns - int(1e6 * encoded.took_ms)
    attributes = {"grstream.tokens": encoded.tokens, "grstream.cached_tokens": encoded.cached}
    stages = (("queue", encoded.waited_ms), ("encode", encoded.encode_ms), ("score", encoded.score_ms))
    for name, took_ms in stages:
        span = tracer.start_span(f"engine.{name}", start_time=at, attributes=attributes)
        at += int(1e6 * took_ms)
        span.end(at)
