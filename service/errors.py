"""Every way that Refrain says no, drawn once; each class owns its HTTP status and its stable code.

Exception
├── RefrainError                     an answer to one request (application/problem+json)
│   ├── InvalidHTTP                  400 invalid_http
│   ├── InvalidJSON                  400 invalid_json
│   ├── Unauthorized                 401 unauthorized
│   ├── ReloadForbidden              403 reload_forbidden
│   ├── NotFound                     404 not_found
│   │   ├── UnknownTask              404 unknown_task
│   │   ├── UnknownArchitecture      404 unknown_architecture
│   │   └── UnknownModel             404 unknown_model
│   ├── MethodNotAllowed             405 method_not_allowed
│   ├── HeadersTooSlow               408 headers_too_slow
│   ├── BodyTooSlow                  408 body_too_slow
│   ├── ReloadFailed                 409 reload_failed
│   ├── BodyTooLarge                 413 body_too_large
│   ├── TooManyInputs                413 too_many_inputs
│   ├── EncodedBody                  415 encoded_body
│   ├── InvalidRequest               422 invalid_request
│   │   ├── InputEmpty               422 input_empty
│   │   ├── InputTooLong             422 input_too_long
│   │   └── InvalidTensor            422 invalid_tensor
│   ├── QueueFull                    429 queue_full
│   ├── HeadersTooLarge              431 headers_too_large
│   ├── ClientGone                   499 client_gone (nobody is left to read it: for the log and the metrics)
│   ├── InferenceFailed              500 inference_failed
│   ├── Unavailable                  503 unavailable
│   │   ├── Starting                 503 starting
│   │   ├── Draining                 503 draining
│   │   ├── EngineDown               503 engine_down
│   │   └── TooManyConnections       503 too_many_connections
│   └── DeadlineExceeded             504 deadline
└── StartError                       the process cannot start: one line on stderr, exit status 1
    ├── SettingsError                a setting is misspelt or wrong
    ├── BundleError                  a bundle is missing or damaged
    └── BulkError                    a bulk job cannot be done as asked, or a file of it cannot be read
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class RefrainError(Exception):
    """One request's failure.

    `retry_after` is in seconds; `members` become extension members of the problem document, so they must be JSON-able
    and must not repeat what the caller sent. The base class itself stands for a bug of ours: 500, `internal`.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    closes: ClassVar[bool] = False  # whether the connection ends with this answer
    headers: ClassVar[Mapping[str, str]] = {}  # of its answer, beside those that every error has

    def __init__(self, detail: str, *, retry_after: float | None = None, **members: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.members = members


class InvalidHTTP(RefrainError):
    status, code, closes = 400, "invalid_http", True  # closes: where the next request begins is not known


class InvalidJSON(RefrainError):
    status, code = 400, "invalid_json"


class Unauthorized(RefrainError):
    status, code = 401, "unauthorized"


class ReloadForbidden(RefrainError):
    status, code = 403, "reload_forbidden"

    def __init__(self) -> None:
        super().__init__("Without API keys nobody may reload over HTTP: set REFRAIN_API_KEYS, or send SIGHUP.")


class NotFound(RefrainError):
    status, code = 404, "not_found"


class UnknownTask(NotFound):
    code = "unknown_task"


class UnknownArchitecture(NotFound):
    code = "unknown_architecture"


class UnknownModel(NotFound):
    code = "unknown_model"


class MethodNotAllowed(RefrainError):
    status, code = 405, "method_not_allowed"


class HeadersTooSlow(RefrainError):
    status, code, closes = 408, "headers_too_slow", True

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The headers did not arrive within {seconds:g} seconds.")


class BodyTooSlow(RefrainError):
    status, code, closes = 408, "body_too_slow", True


class ReloadFailed(RefrainError):
    status, code = 409, "reload_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Nothing was changed: {reason}")


class BodyTooLarge(RefrainError):
    status, code, closes = 413, "body_too_large", True  # closes: the rest of the body is never read


class TooManyInputs(RefrainError):
    status, code = 413, "too_many_inputs"


class EncodedBody(RefrainError):
    status, code, closes = 415, "encoded_body", True  # closes: the body is never read
    headers: ClassVar[Mapping[str, str]] = {"accept-encoding": "identity"}  # RFC 9110, 15.5.16

    def __init__(self) -> None:
        super().__init__("The body must come as it is: a Content-Encoding, such as gzip, is not understood.")


class InvalidRequest(RefrainError):
    status, code = 422, "invalid_request"


class InputEmpty(InvalidRequest):
    code = "input_empty"


class InputTooLong(InvalidRequest):
    code = "input_too_long"


class InvalidTensor(InvalidRequest):
    code = "invalid_tensor"


class QueueFull(RefrainError):
    status, code = 429, "queue_full"

    def __init__(self, retry_after: float) -> None:
        super().__init__("The queue is full.", retry_after=retry_after)


class HeadersTooLarge(RefrainError):
    status, code, closes = 431, "headers_too_large", True

    def __init__(self, size: int, number: int) -> None:
        super().__init__(
            f"A request's line and headers must not be longer than {size} bytes, nor headers over {number}."
        )


class ClientGone(RefrainError):
    status, code = 499, "client_gone"

    def __init__(self) -> None:
        super().__init__("The client left before its answer.")


class InferenceFailed(RefrainError):
    status, code = 500, "inference_failed"

    def __init__(self, index: int | None = None) -> None:
        super().__init__("Inference failed for this text." if index is None else f"Inference failed for input {index}.")
        if index is not None:
            self.members["index"] = index


class Unavailable(RefrainError):
    status, code = 503, "unavailable"

    def __init__(self, detail: str, *, retry_after: float = 1.0) -> None:
        super().__init__(detail, retry_after=retry_after)


class Starting(Unavailable):
    code = "starting"

    def __init__(self) -> None:
        super().__init__("The models are being loaded.", retry_after=2.0)


class Draining(Unavailable):
    code, closes = "draining", True  # closes: so that the client's next request finds another process

    def __init__(self) -> None:
        super().__init__("The service is shutting down.", retry_after=1.0)


class EngineDown(Unavailable):
    code = "engine_down"

    def __init__(self) -> None:
        super().__init__("An engine has died or is stuck.", retry_after=5.0)


class TooManyConnections(Unavailable):
    code, closes = "too_many_connections", True

    def __init__(self) -> None:
        super().__init__("Too many connections are open.")


class DeadlineExceeded(RefrainError):
    status, code = 504, "deadline"

    def __init__(self) -> None:
        super().__init__("The deadline passed before the answer was ready.")


class StartError(Exception):
    """The process cannot start; the message is one line for a person, or one line for each thing that is wrong."""


class SettingsError(StartError):
    pass


class BundleError(StartError):
    pass


class BulkError(StartError):
    pass
