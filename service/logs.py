"""Logs as JSON lines on stdout: one canonical line for each request, and everything else in the same form."""

from __future__ import annotations

import atexit
import json
import logging
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TextIO, cast

import structlog
from pydantic_core import to_json

from service.log_lines import LogLines

DRAIN_SECONDS = 1.0
"""How long the end of a process waits for a reader of its log."""
# Probes and scrapes: asked every few seconds, so logged at debug only.
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})

_log = structlog.get_logger()


@dataclass(slots=True)
class Call:
    """What is known of a request in hand; the handler fills it in, the front writes it down."""

    id: str
    method: str
    path: str
    started: float  # time.monotonic()
    code: int = 500  # stays so when no answer was begun
    error: str | None = None
    trace_id: str | None = None
    task: str | None = None
    architecture: str | None = None
    texts: int | None = None
    tokens: int | None = None
    iterations: int | None = None
    passed_on: int | None = None  # texts that a cascade's first model left to its second
    timings_ms: dict[str, float] = field(default_factory=dict)


def configure_logs(level: str) -> None:
    """Send structlog's and the standard library's records (uvicorn's too) to stdout as JSON lines.

    A process that ends by `os._exit` calls `drain_logs` before.
    """
    atexit.register(drain_logs)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _stdout())),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_stdout())
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[remove_meta, *render], foreign_pre_chain=shared)
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def _to_json(line: object, **options: Any) -> str:
    """Write one line in half the time that json takes, or by json what is not ASCII, such as what a terminal obeys."""
    try:
        return to_json(line, fallback=repr).decode("ascii").replace("\x7f", r"\u007f")
    except ValueError:
        return json.dumps(line, **options)


@cache
def _stdout() -> LogLines:
    return LogLines(sys.stdout.fileno())


def drain_logs() -> None:
    """Wait, not for long, until every line is written."""
    _stdout().drain(DRAIN_SECONDS)


def write_call(call: Call) -> None:
    """Write the one line of a request; it holds no text, no key and no header but the request's id."""
    known = {
        "id": call.id,
        "method": call.method,
        "path": call.path,
        "code": call.code,
        "error": call.error,
        "trace_id": call.trace_id,
        "task": call.task,
        "architecture": call.architecture,
        "texts": call.texts,
        "tokens": call.tokens,
        "iterations": call.iterations,
        "passed_on": call.passed_on,
    }
    line = {key: value for key, value in known.items() if value is not None}
    write = _log.debug if call.path in QUIET_PATHS else _log.info
    write("request", **line, timings_ms=call.timings_ms)
