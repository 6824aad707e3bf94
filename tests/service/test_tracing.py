"""Traces: a caller's trace is carried, and spans reach a collector, or do no harm where none listens."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.testing import capture_logs

from service import tracing
from service.errors import SettingsError
from tests.service.fakes import fake_app, running

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


class Collector(ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does; answers once `gate` is open."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.requests: list[ExportTraceServiceRequest] = []
        self.gate = threading.Event()
        self.gate.set()
        self.came = threading.Event()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.came.set()
        self.server.gate.wait(timeout=30)
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # would send all that FastAPI has, on its own account
        try:
            yield collector
        finally:
            collector.gate.set()
            collector.shutdown()
            thread.join(timeout=10)


def classify(client: TestClient, inputs: Any = "a film", **headers: str) -> Any:
    return client.post("/classify", json={"inputs": inputs}, headers=headers)


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def line_of(lines: list[Any], path: str = "/classify") -> Any:
    (line,) = (line for line in lines if line.get("path") == path)
    return line


@pytest.mark.parametrize(
    ("offered", "kept"),
    [
        (TRACEPARENT, True),
        (f"00-{TRACE}-{CALLER}-00", True),
        (f"cc-{TRACE}-{CALLER}-01-what-a-later-version-adds", True),
        (f"cc-{TRACE}-{CALLER}-01", True),
        (f"00-{TRACE}-{CALLER}-01-more", False),
        (f"cc-{TRACE}-{CALLER}-01more", False),
        (f"ff-{TRACE}-{CALLER}-01", False),
        (f"00-{'0' * 32}-{CALLER}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (TRACEPARENT.upper(), False),
        (TRACEPARENT[:-1], False),
        ("", False),
    ],
)
def test_a_valid_trace_is_carried_into_the_log_and_an_invalid_one_ignored(offered: str, kept: bool) -> None:
    with running(fake_app()) as client, capture_logs() as lines:
        answer = classify(client, traceparent=offered)
    assert answer.status_code == 200 and "traceparent" not in answer.headers
    assert line_of(lines).get("trace_id") == (TRACE if kept else None)


def test_a_classification_is_a_span_of_its_caller_s_trace(collector: Collector) -> None:
    with running(fake_app(tracing="otlp")) as client, capture_logs() as lines:
        answer = classify(client, ["one", "two"], traceparent=TRACEPARENT, tracestate="vendor=value").json()
    (span,) = collector.spans  # and none for the probes that came before
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, CALLER, "vendor=value")
    assert (span.name, span.kind, span.status.code) == ("POST /classify", 2, 0)  # a server's span, of no error
    found = attributes(span)
    assert (
        found.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/classify",
            "network.protocol.version": "1.1",
            "url.path": "/classify",
            "url.scheme": "http",
            "http.response.status_code": 200,
            "refrain.id": answer["id"],
            "refrain.task": "sentiment",
            "refrain.architecture": "recurrent",
            "refrain.texts": 2,
            "refrain.tokens": 8,
            "refrain.iterations": 4,
        }.items()
    )
    for stage, milliseconds in answer["timings_ms"].items():
        assert found[f"refrain.{stage}_ms"] == milliseconds
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 >= answer["timings_ms"]["total"]
    (resource,) = {each.resource.SerializeToString() for each in collector.requests[0].resource_spans}
    assert b"service.name" in resource and b"refrain" in resource
    assert line_of(lines)["trace_id"] == TRACE


def test_without_a_caller_s_trace_a_span_begins_one_and_the_log_names_it(collector: Collector) -> None:
    with running(fake_app(tracing="otlp")) as client, capture_logs() as lines:
        classify(client, traceparent="nonsense")
    (span,) = collector.spans
    assert re.fullmatch("[0-9a-f]{32}", line_of(lines)["trace_id"])
    assert (span.trace_id.hex(), span.parent_span_id) == (line_of(lines)["trace_id"], b"")


def test_a_trace_that_its_caller_does_not_sample_is_not_sent(collector: Collector) -> None:
    with running(fake_app(tracing="otlp")) as client, capture_logs() as lines:
        classify(client, traceparent=f"00-{TRACE}-{CALLER}-00")
    assert collector.spans == [] and line_of(lines)["trace_id"] == TRACE


@pytest.mark.parametrize(
    ("inputs", "status", "code"), [("bad text", 500, "inference_failed"), ("", 422, "input_empty")]
)
def test_a_failure_of_ours_is_an_error_of_the_span_and_a_caller_s_is_not(
    collector: Collector, inputs: str, status: int, code: str
) -> None:
    fake = fake_app(tracing="otlp")
    fake.recurrent.fail_for("bad text")
    with running(fake) as client:
        assert classify(client, inputs).status_code == status
    (span,) = collector.spans
    found = attributes(span)
    assert (found["http.response.status_code"], found["refrain.code"]) == (status, code)
    assert (span.status.code, "error.type" in found) == ((2, True) if status == 500 else (0, False))


def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    collector.gate.clear()

    def serve() -> list[int]:
        with running(fake_app(tracing="otlp")) as client:
            codes = [classify(client).status_code]
            assert collector.came.wait(timeout=10)
            return codes + [classify(client).status_code for _ in range(20)]

    with ThreadPoolExecutor() as pool:
        assert pool.submit(serve).result(timeout=20) == [200] * 21
        assert collector.requests == []  # still hanging, and yet all is over
        collector.gate.set()


def test_nothing_is_sent_unless_it_is_asked_for(collector: Collector) -> None:
    with running(fake_app()) as client:
        assert classify(client, traceparent=TRACEPARENT).status_code == 200
    assert not collector.came.is_set()


def test_where_opentelemetry_is_missing_the_start_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"REFRAIN_TRACING=otlp: .* is not installed; install the extra 'otel'$"):
        fake_app(tracing="otlp")
