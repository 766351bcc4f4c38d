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

from collections.abc import Mapping

from opentelemetry import context, trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator


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
    return [BatchSpanProcessor(OTLPSpanExporter())]


def parent(headers: Mapping[str, str]) -> context.Context | None:
    """What a request's span belongs under: the span of the replica that it came to, if Serve traces.

    Else what the client said, in `traceparent` and `tracestate`. None stands for the first.
    """
    if trace.get_current_span().get_span_context().is_valid:
        return None
    return TraceContextTextMapPropagator().extract(headers)
