"""Reading a request's body with a bound on its size and its time, and seeing whether its client is still there."""

from __future__ import annotations

import time

from starlette.requests import Request

from service.errors import BodyTooLarge, BodyTooSlow, ClientGone, EncodedBody
from service.runtime import TakeIn


async def read_body(request: Request, take_in: TakeIn, *, max_bytes: int, seconds: float) -> bytes:
    """Read the whole body, each part of which is told to `take_in` when it has come.

    Raises EncodedBody and BodyTooLarge as soon as that is known, BodyTooSlow, ClientGone, and what `take_in` raises.
    """
    if any(coding.strip().lower() != "identity" for coding in request.headers.getlist("content-encoding")):
        raise EncodedBody
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    until = time.monotonic() + seconds
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()  # now and then a part of nothing, so that this can look at the clock
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        take_in(len(parts[-1]))
        more = message.get("more_body", False)
        if more and time.monotonic() >= until:
            raise BodyTooSlow(f"The body did not arrive within {seconds:g} seconds.")
    return b"".join(parts)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body must not be longer than {max_bytes} bytes.", limit=max_bytes)
