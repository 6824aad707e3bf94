"""What a connection may do: uvicorn's protocol with bounds on heads, waits and numbers, for clients of every kind."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.early_refusals import EarlyRefusals
from service.errors import (
    HeadersTooLarge,
    HeadersTooSlow,
    InvalidHTTP,
    QueueFull,
    RefrainError,
    TooManyConnections,
)
from service.front import OPEN_PATHS
from service.handover import Handover
from service.logs import Call, write_call
from service.problems import problem_response
from service.runtime import Runtime

HEAD_BYTES = 32_768  # request line and headers, or trailers; up to twice as much where reads happen to be cut so
HEADERS = 128
LENGTH_DIGITS = 19  # of a body's length; the parser takes any number of zeros before it, Python's integers do not
PIPELINED = 16  # requests read ahead on one connection
RESERVE = 64  # connections above the limit, so that a probe still finds a place,
RESERVED_SECONDS = 2.0  # for so long at most, unless it asks: who is silent keeps others out
LINGER_SECONDS = 2.0  # given to a client to stop sending and read its refusal
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_WORD = (b"connection", b"close")
ASK_SECONDS, ASK_SECONDS_MOST = 0.02, 1.0  # between two looks whether a client that said its last word is still there
REFUSED_SECONDS, REFUSED_SECONDS_MOST = 0.05, 1.0  # for which a connection that was refused early is not read


class _CycleTransport:
    """What a request's cycle sees of the transport.

    It writes an answer's head together with what follows, since each write is a call of the system; and its closing
    spares the answer that is on its way. The cycle holds it, so it must not hold the cycle: both would be left to the
    collector, with all that the request brought.
    """

    def __init__(self, cycle: RequestResponseCycle, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._cycle, self._transport = weakref.ref(cycle), transport
        # To HEAD nothing follows.
        self._head: bytes | None = b"" if cycle.scope["method"] == "HEAD" else None
        self.close, self.is_closing = close, transport.is_closing

    def write(self, data: bytes) -> None:
        cycle = self._cycle()
        if self._head is None and cycle is not None and cycle.response_started:
            self._head = data
        else:
            self._transport.write((self._head or b"") + data)
            self._head = b""


class Connection(HttpToolsProtocol):
    """One client's connection.

    What is waited for, and how long: a head for `client_seconds`, from the connection's first moment or, later, from
    its own first byte; a body for `body_seconds`, in the app; the next request for uvicorn's keep-alive; a client to
    take its answer for `client_seconds`. No timer runs for these: `check_all` looks at all connections now and then.
    """

    def __init__(
        self,
        *args: Any,
        runtime: Runtime,
        refusals: EarlyRefusals,
        handover: Handover | None = None,
        taken: bool = False,
        **kwargs: Any,
    ) -> None:
        """`taken`: from another process, and not to be handed on."""
        super().__init__(*args, **kwargs)
        self._handover, self._taken = handover, taken
        self.headers = []
        self._refusals = refusals
        self._running: RequestResponseCycle | None = None  # the request whose turn it is; `cycle` came last
        self._held: bytes | None = None  # what has come of a body that decides whether its request is let through
        self._refused = 0  # of the requests in what was read last, those that were refused early
        self._refused_seconds = REFUSED_SECONDS
        self._within = False  # a request has begun to come, and not ended
        self._metrics = runtime.metrics
        self._seconds = runtime.settings.client_seconds
        self._most = runtime.settings.max_connections
        self._over = False  # above the limit: a probe is answered, nothing else
        self._deaf = False  # what still comes is dropped
        self._unplaced = 0  # bytes since the last that completed a head or belonged to a body
        self._until = math.inf  # when this connection is given up, unless something happens before
        self._taken_until = math.inf  # when it is, unless what was written has been taken before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count the connection in, and begin to wait for its first request; or hand it over."""
        super().connection_made(transport)
        if self._handover is not None:
            if self._taken:
                self._handover.arrived()
            elif self._handover.hand_over(transport, len(self.connections)):
                self.connections.discard(self)
                transport.abort()
            self._handover.say(len(self.connections))
        if transport.is_closing():
            return
        above = len(self.connections) - self._most
        self._over = above > 0
        self._until = time.monotonic() + min(self._seconds, RESERVED_SECONDS if self._over else math.inf)
        if above > RESERVE:
            self._refuse(TooManyConnections())

    def data_received(self, data: bytes) -> None:
        """Parse what came, in pieces, so that what one read can bring is bounded too."""
        self._unset_keepalive_if_required()
        self._refused = 0
        try:
            for start in range(0, len(data), HEAD_BYTES):
                if self._deaf:
                    return
                piece = data[start : start + HEAD_BYTES]
                self._unplaced += len(piece)
                self._parse(piece)
                if self._unplaced >= HEAD_BYTES or len(self.headers) > HEADERS:
                    raise HeadersTooLarge(HEAD_BYTES, HEADERS)
        except RefrainError as error:
            self._refuse(error)
        else:
            self._bound_rest()

    def _bound_rest(self) -> None:
        """Have a wait for the rest of a head, or of a body that nobody reads, end."""
        waiting = (self._within or self._unplaced) and not self.transport.is_closing()
        if waiting and self._until == math.inf and self._answered():
            self._until = time.monotonic() + self._seconds

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            # The parser leaves what follows to another protocol. We offer none, and a server may ignore the offer
            # (RFC 9110, 7.8): the same head without it goes through a new parser, and then the rest.
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
            self._parse(head + data[stopped.args[0] :])
        except httptools.HttpParserError as error:
            ours = error.__context__  # raised in a callback
            raise ours if isinstance(ours, RefrainError) else InvalidHTTP(f"This is not HTTP/1.1: {error}.") from None

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *kept, b"", b""])

    def on_message_begin(self) -> None:
        """Take the first bytes of a request."""
        super().on_message_begin()
        self._within = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; blanks behind its value are none of it (RFC 9112, 5.1), and the parser leaves them there."""
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Begin a request, unless something about its head or its connection forbids it."""
        if len(self.headers) > HEADERS:
            raise HeadersTooLarge(HEAD_BYTES, HEADERS)
        if self.parser.get_method() == b"CONNECT":
            raise InvalidHTTP("CONNECT is for proxies.")
        self._check_framing()
        if self.parser.should_upgrade():
            return  # it comes again, see _parse
        if self._over and self.url.partition(b"?")[0].decode("latin-1") not in OPEN_PATHS:
            raise TooManyConnections
        if len(self.pipeline) + self._refused >= PIPELINED:
            raise InvalidHTTP(f"At most {PIPELINED} requests may wait on one connection.")
        self._unplaced, self._until = 0, math.inf
        # Of a client that does not take its answers the app reads no more; it must not get around that.
        free = self._answered() and not self.flow.write_paused
        if free and self.parser.get_method() == b"POST" and self.url == b"/classify":
            self._held = b"" if self._refusals.may_come(self.headers) else None
        if self._held is None:
            self._begin()

    def _check_framing(self) -> None:
        """What the parser lets through though two readers could understand it in two ways (RFC 9112, 3.2 and 6.1)."""
        version, names = self.parser.get_http_version(), [name for name, _ in self.headers]
        if version not in ("1.0", "1.1"):
            raise InvalidHTTP(f"This is not HTTP/1.1: version {version}.")
        if version == "1.1" and names.count(b"host") != 1:
            raise InvalidHTTP("HTTP/1.1 asks for one Host header.")
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise InvalidHTTP("The only Transfer-Encoding that is understood is chunked.")
            if name == b"content-length" and len(value) > LENGTH_DIGITS:
                raise InvalidHTTP(f"A Content-Length has at most {LENGTH_DIGITS} digits.")

    def _begin(self) -> None:
        self._refused_seconds = REFUSED_SECONDS
        super().on_headers_complete()
        self.headers = []  # what is still added are trailers, which must not pass for headers (RFC 9110, 6.5.1)
        self.cycle.scope["state"]["left"] = self.loop.create_future()
        self.cycle.transport = cast(asyncio.Transport, _CycleTransport(self.cycle, self.transport, self._end))
        self.cycle.keep_alive = self.cycle.keep_alive and not self._over
        if not self.pipeline:
            self._running = self.cycle
        elif len(self.pipeline) < PIPELINED and sum(len(cycle.body) for cycle, _ in self.pipeline) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # while nothing is read nobody sees that the client leaves

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._unplaced = 0
        if self._held is None:
            super().on_body(body)
        else:
            self._held += body

    def on_message_complete(self) -> None:
        """Take the end of a request, but not of one that comes again without its upgrade."""
        if self.parser.should_upgrade():
            return
        self._within = False
        if not self._deaf:
            self._until = math.inf
        if self._held is not None:
            if refusal := self._refusals.find(self.headers, self._held):
                self._refuse_early(refusal)
                return
            self._let_through(self._held)
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # a large body paused it

    def _let_through(self, body: bytes) -> None:
        self._held, self._until = None, math.inf
        self._begin()
        super().on_body(body)

    def _refuse_early(self, refusal: bytes) -> None:
        """Answer at once, but read the next request of a client that does not wait only after a while, which doubles.

        Else a few hundred such clients are refused so often that little is left for answers.
        """
        self._held = None
        self._refused += 1
        leaving = LAST_WORD in self.server_state.default_headers
        keeps = not leaving and self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        self._write(QueueFull.status, [] if keeps or leaving else [LAST_WORD], refusal)
        self.headers = []
        if keeps:
            super().on_response_complete()
            self.flow.pause_reading()
            self.loop.call_later(self._refused_seconds, self._read_on)
            self._refused_seconds = min(2 * self._refused_seconds, REFUSED_SECONDS_MOST)
        else:
            self.transport.close()

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Go on to the next request; an idle connection keeps nothing of a body that nobody read."""
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        if self.cycle.response_complete:
            self.cycle.body.clear()
        self._bound_rest()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's contract: true keeps the transport open
        """Tell a client that closed its sending half from one that left: both look alike until something is sent.

        So 100 Continue is sent until the answer is there: a client that still reads skips it, as HTTP/1.1 demands. The
        system of one that left replies with a reset, and the next write finds it.
        """
        cycle = self.cycle
        if self._answered() or cycle.more_body or cycle.scope["http_version"] != "1.1":
            return False
        self.shutdown()  # closes after the last answer
        self._ask_whether_there(ASK_SECONDS)
        return True

    def _ask_whether_there(self, again_after: float) -> None:
        if self.transport.is_closing() or self._answered():
            return
        if self._running is not None and not self._running.response_started:  # within an answer it would be part of it
            self.transport.write(CONTINUE)
        self.loop.call_later(again_after, self._ask_whether_there, min(2 * again_after, ASK_SECONDS_MOST))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell also the request whose turn it is that its client left, and not only the one that came last."""
        super().connection_lost(exc)
        if self._handover is not None:
            self._handover.say(len(self.connections))
        self._unset_keepalive_if_required()  # uvicorn leaves the timer where the client reset the connection
        if self._running is not None and not self._running.response_complete:
            _tell_left(self._running)
        # Requests and their connection hold each other, and would be left to the collector.
        self._running = None
        self.cycle = None  # type: ignore[assignment]
        self.pipeline.clear()

    def check(self, now: float) -> None:
        """Cut off a client that takes too long; `now` as time.monotonic() has it."""
        if self._held is not None:  # its body takes a while; how long it may is for the app to say
            self._let_through(self._held)
        if self._running is not None and self._running.more_body:
            self._running.message_event.set()  # for the app to look at the clock
        if now >= self._until:
            self._until = math.inf
            if self._within and self._unplaced and not self._deaf and not self._over:
                self._refuse(HeadersTooSlow(self._seconds))
            else:  # nothing was asked, so nothing is answered
                self.transport.abort()
        if not self.transport.get_write_buffer_size():
            self._taken_until = math.inf
        elif self._taken_until == math.inf:
            self._taken_until = now + self._seconds
        elif now >= self._taken_until:
            self.transport.abort()

    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, error: RefrainError) -> None:
        """Answer in the app's place, in its form, where an answer has a place, and end the connection."""
        self._deaf = True
        cycle = self.cycle
        call = Call(uuid.uuid4().hex, "", "", time.monotonic(), code=error.status)
        response = problem_response(error, call)
        self._metrics.rejected.labels(error.code).inc()
        write_call(call)
        if not self._answered() and not cycle.more_body:
            self.shutdown()  # what was asked before is answered first, and the last answer closes
            return
        if not self._answered() and (self.pipeline or cycle.response_started):
            self.transport.close()
            return
        if not self._answered():  # the broken request itself: the app sees its client leave
            _tell_left(cycle)
        headers = [*response.raw_headers, (b"x-request-id", call.id.encode())]
        self._write(call.code, headers, b"\r\n" + bytes(response.body))
        self._end()

    def _write(self, status: int, headers: Iterable[tuple[bytes, bytes]], rest: bytes) -> None:
        """Write an answer that no app gave."""
        headers = [*self.server_state.default_headers, *headers]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[status] + lines + rest)

    def _end(self) -> None:
        """Close, but let a client that is still sending stop first: closed at once, its answer is lost in a reset."""
        if self.transport.is_closing():
            return
        if not self._deaf and not self.cycle.more_body:
            self.transport.close()
        else:
            self._deaf = True
            if self._running is not None:
                self.cycle = self._running  # what was asked behind it is not answered any more
                self.pipeline.clear()
            self.flow.resume_reading()
            self.transport.write_eof()
            self._until = time.monotonic() + LINGER_SECONDS


def _tell_left(cycle: RequestResponseCycle) -> None:
    """Tell a request that its client left, whether it waits for more of the body or for its answer."""
    cycle.disconnected = True
    cycle.message_event.set()
    left: asyncio.Future[None] = cycle.scope["state"]["left"]
    if not left.done():
        left.set_result(None)


def check_all(connections: Iterable[object]) -> None:
    """Cut off the clients that take too long, among the connections of a server."""
    now = time.monotonic()
    for connection in list(connections):
        assert isinstance(connection, Connection)
        connection.check(now)
