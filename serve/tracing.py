"""Where traces go: what Serve's `tracing_config` names, for proxies and replicas.

Serve traces a request from its proxy through every replica that it reaches, taking up a client's
`traceparent`; the gateway and the engine add what happens inside. It is off unless a cluster's Serve is given

    tracing_config:
      enabled: true
      exporter_import_path: serve.tracing:span_processors
      sampling_ratio: 0.01

in a declarative configuration, or as `serve.start(tracing_config=...)`. The exporter and the resource are
configured by OpenTelemetry's own variables in the environment of the cluster: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME and so on. Needs `pip install 'grstream[traces]'`.
"""

import re
from collections.abc import Mapping, Sequence

from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_USER = re.compile(r"/v1/users/.*?(/history)?$", re.DOTALL)


class TracesExtraMissing(ImportError):
    """The exporter is not installed."""


def span_processors() -> list[SpanProcessor]:
    """Spans in batches to an OTLP collector over HTTP. Raises TracesExtraMissing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracesExtraMissing(
            "traces are on and their exporter is not installed: pip install 'grstream[traces]'"
        ) from error
    return [BatchSpanProcessor(WithoutUsers(OTLPSpanExporter()))]


class WithoutUsers(SpanExporter):
    """Exports spans by their routes: Ray 2.60's proxy names its own by the path, which may name a user."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_without_user(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def parent(headers: Mapping[str, str]) -> context.Context | None:
    """What a request's span belongs under: the span of the replica that it came to, if Serve traces.

    Else what the client said, in `traceparent` and `tracestate`. None stands for the first.
    """
    if trace.get_current_span().get_span_context().is_valid:
        return None
    return TraceContextTextMapPropagator().extract(headers)


def _without_user(span: ReadableSpan) -> ReadableSpan:
    attributes = dict(span.attributes or {})
    if not any(_USER.search(text) for text in (span.name, *attributes.values()) if isinstance(text, str)):
        return span
    return ReadableSpan(
        name=_routed(span.name),
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes={k: _routed(v) if isinstance(v, str) else v for k, v in attributes.items()},
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _routed(text: str) -> str:
    return _USER.sub(r"/v1/users/{user_id}\1", text)
