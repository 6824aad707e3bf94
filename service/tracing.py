"""W3C Trace Context: the trace that a request belongs to, for the log, and its span for OpenTelemetry where asked for.

FastAPI writes the span, by the conventions for HTTP servers; here is where it goes and what we add to it. An answer
carries no trace: the recommendation defines its headers for requests alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service import __version__
from service.errors import SettingsError
from service.logs import QUIET_PATHS, Call
from service.settings import Settings

# Whatever the environment says to FastAPI: its metrics are not ours, and its logs hold messages of exceptions.
NOTHING: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
FLUSH_SECONDS = 3.0  # at shutdown, for the spans that are not yet sent
_CONTEXT = TraceContextTextMapPropagator()


def trace_id(headers: Mapping[str, str]) -> str | None:
    """The trace of the present span, else of a `traceparent`; None where there is none, or no valid one."""
    found = trace.get_current_span().get_span_context()
    if not found.is_valid:
        found = trace.get_current_span(_CONTEXT.extract(headers)).get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else None


def name_span(call: Call) -> None:
    """Name the span of a request that goes past FastAPI's router, which names the others."""
    span = trace.get_current_span()
    span.update_name(f"{call.method} {call.path}")
    span.set_attribute("http.route", call.path)


def describe(call: Call) -> None:
    """Add what is known of a request to its span, which ends with the answer."""
    known = {
        "id": call.id,
        "code": call.error,
        "task": call.task,
        "architecture": call.architecture,
        "texts": call.texts,
        "tokens": call.tokens,
        "iterations": call.iterations,
        **{f"{stage}_ms": milliseconds for stage, milliseconds in call.timings_ms.items()},
    }
    attributes = {f"refrain.{name}": value for name, value in known.items() if value is not None}
    trace.get_current_span().set_attributes(attributes)


class Tracing:
    """Spans on their way to a collector: they wait in a bounded queue that another thread sends.

    When it is full the oldest are lost; no request ever waits for it.
    """

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = Resource({"service.name": "refrain", "service.version": __version__})
        resource = ours.merge(OTELResourceDetector().detect())  # what OTEL_SERVICE_NAME and the like say goes first
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.config: TelemetryConfig = {
            **NOTHING,
            "tracing": True,
            "tracer_provider": self._provider,
            "operation_spans": False,
            "exclude": lambda scope: scope["path"] in QUIET_PATHS,
        }

    def stop(self) -> None:
        """Send what waits, and give up after FLUSH_SECONDS; blocks so long at most."""
        flushing = threading.Thread(target=self._provider.shutdown, name="flush-spans", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)


def start_tracing(settings: Settings) -> Tracing | None:
    """Make the way to the collector, if the settings want it; raises SettingsError where the extra is not installed."""
    if settings.tracing == "off":
        return None
    try:
        return Tracing()
    except ImportError as error:
        raise SettingsError(
            f"REFRAIN_TRACING={settings.tracing}: {error.name} is not installed; install the extra 'otel'"
        ) from None
