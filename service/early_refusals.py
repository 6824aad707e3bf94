"""Saying no before anything is done while a queue is full, so that saying no does not eat what answers need."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import structlog
from starlette.datastructures import Headers

from service.errors import QueueFull, RefrainError
from service.front import SANE_ID, ApiKeys, new_id
from service.logs import Call
from service.problems import problem_response
from service.runtime import Runtime
from service.scheduling import patience
from service.schemas import parse_request
from service.texts import likely_work

if TYPE_CHECKING:
    from prometheus_client import Counter as Count

LARGEST_BODY = 16_384  # bytes; a larger one goes the long way
LONG_WAY = frozenset({b"expect", b"content-encoding"})  # as does a request with one of these headers
# Whether there is room; a list's texts may each be small.
DECIDING = (
    b'"task"',
    b'"architecture"',
    b'"routing_key"',
    b'"deadline_ms"',
    b'"max_iterations"',
    b'"allow_fewer_iterations"',
    b"[",
)
CROWDED_SECONDS = 0.02  # a queue that was full is looked at again, for each request that may be refused
ANY = 2**62  # more work than any text has
ID = b"0" * 32

RawHeaders = list[tuple[bytes, bytes]]


class EarlyRefusals:
    """The refusals of one process: counted one by one as all are, but told to the log once a second.

    Whatever else may be wrong with a request is said on the long way, through the application. What is done here is
    done for each request of an overload, at the cost of answers, so it is kept short.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._keys = ApiKeys(runtime.settings.api_keys)
        self._longest = runtime.settings.deadline_ms / 1000
        self._crowded_until = 0.0
        self._ahead = 0  # let through in this turn of the event loop, and not yet in a queue
        self._untold: Counter[tuple[str, str]] = Counter()
        self._count = cache(self._children)

    def may_come(self, raw_headers: RawHeaders) -> bool:
        """Whether POST /classify with this head may be refused once its body is there; else it is let through."""
        if self._is_crowded() and self._is_plain(raw_headers):
            return True
        self._let_through()
        return False

    def find(self, raw_headers: RawHeaders, body: bytes) -> bytes | None:
        """Refuse POST /classify, counted, in the bytes of an answer but for the status line and the headers that every
        answer has; None: it is let through.
        """
        call = Call("", "POST", "/classify", time.monotonic(), code=QueueFull.status)
        task = architecture = routing_key = max_iterations = None
        longest, characters, may_be_cut = self._longest, len(body), False
        try:
            if any(field in body for field in DECIDING):
                asked = parse_request(body)
                task, architecture, routing_key = asked.task, asked.architecture, asked.routing_key
                longest = min(longest, (asked.deadline_ms or math.inf) / 1000)
                characters, max_iterations = max(map(len, asked.texts)), asked.max_iterations
                may_be_cut = asked.allow_fewer_iterations
            call.id = _offered_id(raw_headers) or new_id()
            model = self._runtime.choose(task, architecture, call.id, routing_key).first
            work = likely_work(characters, max_iterations, model.manifest)
            wait = patience(longest, may_be_cut=may_be_cut)
            seconds = model.batcher.seconds_to_room(1, 1, work, wait, self._ahead)
        except RefrainError:
            seconds = None
        if seconds is None:
            self._let_through()
            return None
        labels = model.metric_labels
        self._untold[labels] += 1
        for count in self._count(labels):
            count.inc()
        return _answer(math.ceil(seconds), call)

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

    def _children(self, labels: tuple[str, str]) -> tuple[Count, Count]:
        metrics = self._runtime.metrics
        return metrics.requests.labels(str(QueueFull.status), *labels), metrics.rejected.labels(QueueFull.code)

    def _is_crowded(self) -> bool:
        now = time.monotonic()
        if self._runtime.phase != "ready":
            return False
        if now >= self._crowded_until and self._is_any_full():
            self._crowded_until = now + CROWDED_SECONDS
        return now < self._crowded_until

    def _is_any_full(self) -> bool:
        batchers = [model.batcher for model in self._runtime.serving.models.values()]
        wait = patience(self._longest, may_be_cut=False)
        # Where nothing waits there is room, and if not for all who come at once, the long way tells.
        return any(
            one.queue_depth and one.seconds_to_room(1, 1, ANY, wait, self._ahead) is not None for one in batchers
        )

    def _is_plain(self, raw_headers: RawHeaders) -> bool:
        headers = dict(raw_headers)
        length = headers.get(b"content-length", b"")
        small = length.isdigit() and int(length) <= LARGEST_BODY
        return small and LONG_WAY.isdisjoint(headers) and self._keys.admit(Headers(raw=raw_headers))

    def _let_through(self) -> None:
        self._ahead += 1
        asyncio.get_running_loop().call_soon(self._arrived)  # just before the request's own first step

    def _arrived(self) -> None:
        self._ahead -= 1


def _offered_id(raw_headers: RawHeaders) -> str:
    """The caller's id if it is sane, else nothing."""
    for name, value in raw_headers:
        if name == b"x-request-id":
            offered = value.decode("latin-1")
            return offered if SANE_ID.fullmatch(offered) else ""
    return ""


def _answer(retry_after: int, call: Call) -> bytes:
    if len(call.id) == len(ID) and call.id.isalnum():
        return _written(retry_after).replace(ID, call.id.encode())
    return _write(retry_after, call)


@cache
def _written(retry_after: int) -> bytes:
    """A refusal with a request's id yet to be put in. There are as many as a queue's bound has seconds."""
    return _write(retry_after, Call(ID.decode(), "POST", "/classify", 0.0))


def _write(retry_after: int, call: Call) -> bytes:
    response = problem_response(QueueFull(retry_after), call)
    headers = [*response.raw_headers, (b"x-request-id", call.id.encode())]
    return b"\r\n".join([*(name + b": " + value for name, value in headers), b"", bytes(response.body)])
