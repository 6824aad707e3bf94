"""What surrounds every request: its id, its API key, its one log line, its count."""

from __future__ import annotations

import asyncio
import hmac
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Unauthorized
from service.logs import QUIET_PATHS, Call, write_call
from service.metrics import Metrics
from service.problems import answer, problem_response
from service.tracing import describe, name_span, trace_id

OPEN_PATHS = QUIET_PATHS  # probes and scrapes carry no key
COUNTED_PATHS = re.compile(r"/classify|/v2/models/[^/]+(/versions/[^/]+)?/infer")
REJECTIONS = frozenset({429, 499, 503, 504})
SANE_ID = re.compile(r"[!-~]{1,128}")
# Seeded by the system once: asked for each id, it has this thread give up the interpreter to the engine's each time.
_IDS = random.Random()  # ids are no secrets
SHOWN_PATH = 200  # characters of a path in the log

Direct = Mapping[tuple[str, str], Callable[[Request], Awaitable[Response]]]
"""(method, path) -> what answers it without the application's router and middleware."""


class ApiKeys:
    """The keys of which a request must bring one; without any, each may come in."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._keys = [key.get_secret_value().encode() for key in keys]

    def admit(self, headers: Headers) -> bool:
        """Whether one of them came, as `X-API-Key` or as a bearer token."""
        if not self._keys:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.lstrip(" ") if scheme.lower() == "bearer" else ""  # blanks, one or more (RFC 9110, 11.4)
        offered = [one.encode("latin-1") for one in (headers.get("x-api-key", ""), bearer)]
        # All keys are compared before any is decided on, so the time tells nothing of which one matched.
        matches = [hmac.compare_digest(one, key) for key in self._keys for one in offered]
        return any(matches)


class Front:
    """Plain ASGI around the app: no task and no copy of the body is made, so a client's leaving stays visible."""

    def __init__(
        self, app: ASGIApp, *, direct: Direct, metrics: Metrics, api_keys: Sequence[SecretStr], traced: bool
    ) -> None:
        self._app = app
        self._direct = direct
        self._traced = traced
        self._metrics = metrics
        self._keys = ApiKeys(api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the lifespan on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = Call(request_id(headers), scope["method"], scope["path"][:SHOWN_PATH], time.monotonic())
        if self._traced or "traceparent" in headers:
            call.trace_id = trace_id(headers)
        state = scope.setdefault("state", {})
        state["call"] = call
        if "left" not in state:  # a server that is not ours does not tell
            state["left"] = asyncio.get_running_loop().create_future()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.code = message["status"]
                if self._traced:
                    describe(call)
                MutableHeaders(scope=message)["x-request-id"] = call.id
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS and not self._keys.admit(headers):
                denied = problem_response(Unauthorized("An API key is needed, and none that came is right."), call)
                denied.headers["www-authenticate"] = "Bearer"
                await denied(scope, receive, send_with_id)
            elif endpoint := self._direct.get((call.method, call.path)):
                if self._traced:
                    name_span(call)
                response = await answer(endpoint, Request(scope, receive))
                await response(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            self._record(call)

    def _record(self, call: Call) -> None:
        call.timings_ms.setdefault("total", round((time.monotonic() - call.started) * 1000, 3))
        if COUNTED_PATHS.fullmatch(call.path):
            self._metrics.requests.labels(str(call.code), call.architecture or "", call.task or "").inc()
            if call.code in REJECTIONS and call.error is not None:
                self._metrics.rejected.labels(call.error).inc()
        write_call(call)


def request_id(headers: Headers) -> str:
    """Take the caller's id if it is sane, short printable ASCII, else make one."""
    offered = headers.get("x-request-id", "")
    return offered if SANE_ID.fullmatch(offered) else new_id()


def new_id() -> str:
    """Make an id for a request: 32 hexadecimal digits."""
    return f"{_IDS.getrandbits(128):032x}"
