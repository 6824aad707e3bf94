"""Saying no from a request's head alone while there is no room, so that saying no does not eat what answers need."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response

from service.errors import QueueFull, RefrainError
from service.front import ApiKeys, request_id
from service.logs import Call
from service.problems import problem_response
from service.runtime import Runtime

LARGEST_BODY = 16_384  # bytes; a larger one goes the long way
CHOOSES = (b'"task"', b'"architecture"', b'"routing_key"')  # fields that may lead to a model with room


@dataclass(frozen=True, slots=True)
class EarlyRefusal:
    """What a request is told unless its body chooses another model than the full one."""

    error: QueueFull
    call: Call


class EarlyRefusals:
    """The refusals of one process: counted one by one as all are, but told to the log once a second."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._keys = ApiKeys(runtime.settings.api_keys)
        self._longest = runtime.settings.deadline_ms / 1000
        self._untold: Counter[tuple[str, str]] = Counter()

    def find(self, raw_headers: list[tuple[bytes, bytes]]) -> EarlyRefusal | None:
        """What POST /classify with this head is to be told; None: it goes the long way, where all else is said."""
        headers = Headers(raw=raw_headers)
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY or "expect" in headers or not self._keys.admit(headers):
            return None
        now = time.monotonic()
        call = Call(request_id(headers), "POST", "/classify", now, code=QueueFull.status)
        try:
            self._runtime.check_open()
            model = self._runtime.choose(None, None, call.id, None).first
            model.batcher.check_room(1, 1, now + self._longest)
        except QueueFull as error:
            call.architecture, call.task = model.metric_labels
            return EarlyRefusal(error, call)
        except RefrainError:
            return None
        return None

    def stands(self, body: bytes) -> bool:
        """Whether a request is refused now that its body is there: not where it chooses who is to answer."""
        return not any(field in body for field in CHOOSES)

    def answer(self, refusal: EarlyRefusal) -> Response:
        """Count a refusal, and put it into words."""
        labels = refusal.call.architecture or "", refusal.call.task or ""
        self._runtime.metrics.requests.labels(str(QueueFull.status), *labels).inc()
        self._runtime.metrics.rejected.labels(QueueFull.code).inc()
        self._untold[labels] += 1
        return problem_response(refusal.error, refusal.call)

    def tell(self) -> None:
        """Log how many were refused since it was last told."""
        for (architecture, task), count in self._untold.items():
            structlog.get_logger().warning(
                "requests refused early",
                requests=count,
                code=QueueFull.status,
                error=QueueFull.code,
                architecture=architecture,
                task=task,
            )
        self._untold.clear()
