"""Errors as answers: application/problem+json (RFC 9457), made in one place."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.errors import MethodNotAllowed, NotFound, RefrainError
from service.logs import Call

MEDIA_TYPE = "application/problem+json"
INFERENCE_PROTOCOL = "/v2"


def problem_response(error: RefrainError, call: Call) -> Response:
    """Write an error for its caller, and note its code for the log."""
    call.error = error.code
    document = {
        "type": "about:blank",
        "title": _phrase(error.status),
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "id": call.id,
        **error.members,
    }
    if call.path.startswith(INFERENCE_PROTOCOL) or not call.path:  # refused before its path was read
        document["error"] = error.detail  # where that protocol's clients look
    headers = {**error.headers, **({"connection": "close"} if error.closes else {})}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))  # whole seconds are all the header can say
    release(error)
    return Response(json.dumps(document), error.status, headers, MEDIA_TYPE)


def release(error: Exception) -> None:
    """Let go of the frames that an error has passed.

    Some of them hold the error, and a whole request: a circle that would wait for the collector.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


async def on_refrain_error(request: Request, error: Exception) -> Response:
    """Answer with one of our own errors."""
    assert isinstance(error, RefrainError)
    return problem_response(error, request.state.call)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method, which Starlette finds, in the form of all other errors."""
    assert isinstance(error, HTTPException)
    ours: RefrainError
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        ours = MethodNotAllowed("The path does not take this method; `Allow` names those it takes.")
    elif error.status_code == HTTPStatus.NOT_FOUND:
        ours = NotFound("There is nothing at this path; /docs shows what there is.")
    else:
        raise error
    response = problem_response(ours, request.state.call)
    response.headers.update(error.headers or {})
    return response


async def answer(endpoint: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """Answer with what an endpoint returns or raises; for endpoints that the application's handlers do not surround."""
    try:
        return await endpoint(request)
    except RefrainError as error:
        return problem_response(error, request.state.call)
    except Exception as error:  # noqa: BLE001  # a bug must answer one request with 500, and not end its connection
        structlog.get_logger().exception("a request met a bug", id=request.state.call.id)
        return await on_bug(request, error)


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer for a bug of ours; the server logs the traceback, the caller learns the request's id."""
    return problem_response(RefrainError("The service failed; its log has the reason."), request.state.call)


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase
