"""The service on a real socket against clients that are slow, silent, greedy, broken or hostile.

Each gets the right status or is cut off, others are answered meanwhile and afterwards, and memory stays bounded.
"""

from __future__ import annotations

import json
import math
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from itertools import islice, repeat
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from service import connections
from service.connections import HEAD_BYTES, HEADERS, PIPELINED, RESERVE
from service.runtime import LONGEST_BODIES
from service.server import BACKLOG
from tests.service.fakes import wait_until
from tests.service.live import Live, classify_bytes, is_closed, live, replies, reply

MEGABYTE = 1_000_000
POST = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
BROKEN = {
    "garbage": b"\x00\xff\xfe no protocol at all\r\n\r\n",
    "tls hello": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "http2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": POST + b"Content-Length: 15\r\nContent-Length: 0\r\n\r\n" + b'{"inputs": "a"}',
    "list of lengths": POST + b"Content-Length: 15, 15\r\n\r\n" + b'{"inputs": "a"}',
    "length with zeros before it": POST + b"Content-Length: %s15\r\n\r\n" % (b"0" * 5000) + b'{"inputs": "a"}',
    "signed length": POST + b"Content-Length: +15\r\n\r\n" + b'{"inputs": "a"}',
    "length, then chunked": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "packed, then chunked": POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size of a kind": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n",
    "chunk longer than said": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "bare line feeds": GET.replace(b"\r\n", b"\n") + b"\n",
    "blank before colon": GET + b"X-A : b\r\n\r\n",
    "folded header": GET + b"X-A: b\r\n c\r\n\r\n",
    "nul in a header": GET + b"X-A: \x00\r\n\r\n",
    "unknown version": GET.replace(b"1.1", b"1.2") + b"\r\n",
    "version of another protocol": GET.replace(b"1.1", b"2.0") + b"\r\n",
    "version before headers": GET.replace(b"1.1", b"0.9") + b"\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "packed and chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "tunnel": b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "tunnel to a path": b"CONNECT /classify HTTP/1.1\r\nHost: x\r\n\r\n",
    "relative target": GET.replace(b"/healthz", b"healthz") + b"\r\n",
    "blank in the target": GET.replace(b"/healthz", b"/health z") + b"\r\n",
    "bytes beyond ascii in the target": GET.replace(b"/healthz", b"/\xff") + b"\r\n",
}


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live() as served:
        yield served


def assert_well(served: Live) -> None:
    assert served.ask("POST", "/classify", {"inputs": "well?"})[0] == 200


def told(connection: socket.socket) -> tuple[int, str]:
    """The status and the code of a problem; its connection must end."""
    status, headers, body = reply(connection)
    document = json.loads(body)
    assert headers["content-type"] == "application/problem+json"
    assert (document["status"], document["id"]) == (status, headers["x-request-id"])
    assert headers["connection"] == "close" and is_closed(connection)
    return status, document["code"]


class Memory:
    """The growth of this process, in bytes, from the first look on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    def growth(self) -> int:
        return int(self._process.memory_info().rss) - self._before


# What is not HTTP, and what two readers could understand in two ways


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_400_for_what_is_not_http(served: Live, sent: bytes) -> None:
    before = served.count("refrain_rejected_total", reason="invalid_http")
    with served.send(sent) as connection:
        assert told(connection) == (400, "invalid_http")
    assert served.count("refrain_rejected_total", reason="invalid_http") == before + 1
    assert_well(served)


def test_a_refusal_is_the_last_thing_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER_SECONDS", 60)
    with live(body_seconds=0.2) as served, served.send(BROKEN["chunk longer than said"]) as connection:
        assert told(connection) == (400, "invalid_http")
        wait_until(lambda: served.count("refrain_requests_total", code="499", architecture="", task="") == 1)


def test_what_is_broken_after_whole_requests_does_not_take_their_answers(served: Live) -> None:
    with served.send(classify_bytes("first") + classify_bytes("second") + b"\x00 garbage") as connection:
        answers = list(replies(connection))
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(200, None), (200, "close")]
    for text, answer in zip(("first", "second"), answers, strict=True):
        assert json.loads(answer.body)["results"] == served.ask("POST", "/classify", {"inputs": text})[1]["results"]


def test_garbage_of_all_kinds_ends_in_an_answer_or_an_end(served: Live) -> None:
    chance = random.Random(1)
    for _ in range(150):
        data = bytearray(classify_bytes("a film") * 2)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with served.send(bytes(data[: chance.randint(1, len(data))])) as connection:
            connection.shutdown(socket.SHUT_WR)
            answered = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answered == b"" or answered.startswith(b"HTTP/1.1 ")
    assert_well(served)


def test_blanks_around_a_header_s_value_are_none_of_it(served: Live) -> None:
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(b'{"inputs":"a"}'), b'{"inputs":"a"}')
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: \t mine \t \r\nTransfer-Encoding: chunked \r\n"
    with closing(served.send(head + b"Expect: 100-continue \r\n\r\n")) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(chunks)
        answer = reply(connection)
    assert answer.status == 200
    assert answer.headers["x-request-id"] == "mine"


def test_a_trailer_does_not_pass_for_a_header(served: Live) -> None:
    sent = CHUNKED + b'f\r\n{"inputs": "a"}\r\n0\r\nX-Request-Id: smuggled\r\n\r\n'
    with served.send(sent) as connection:
        answer = reply(connection)
        assert answer.status == 200 and answer.headers["x-request-id"] != "smuggled"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://elsewhere.example/healthz", 200),
        (b"/healthz?a=b&&=%00", 200),
        (b"/healthz#part", 200),
        (b"//healthz", 404),
        (b"/./healthz", 404),
        (b"/%2e%2e/healthz", 404),
        (b"/%ff%00", 404),
        (b"*", 404),
        (b"/" + b"a" * 8000, 404),
    ],
)
def test_odd_targets(served: Live, target: bytes, status: int) -> None:
    with served.send(GET.replace(b"/healthz", target) + b"\r\n") as connection:
        assert reply(connection).status == status


# What is too large


@pytest.mark.parametrize(
    "headers",
    [b"X-A: %s\r\n" % (b"a" * 2 * HEAD_BYTES), b"X-A: a\r\n" * HEADERS, b"X-A: a\r\n" * 50 * HEADERS],
    ids=["long", "many", "very many"],
)
def test_431_for_headers_that_are_too_large(served: Live, headers: bytes) -> None:
    with served.send(GET + headers + b"\r\n") as connection:
        assert told(connection) == (431, "headers_too_large")
    assert_well(served)


def test_431_before_too_many_headers_have_an_end(served: Live) -> None:
    with served.send(GET + b"X-A: a\r\n" * 2 * HEADERS) as connection:
        assert told(connection) == (431, "headers_too_large")


def test_431_for_an_overlong_path(served: Live) -> None:
    with served.send(GET.replace(b"/healthz", b"/" + b"a" * 2 * HEAD_BYTES) + b"\r\n") as connection:
        assert told(connection) == (431, "headers_too_large")


def test_headers_of_common_size_are_taken(served: Live) -> None:
    with served.send(GET + b"Cookie: %s\r\n" % (b"a" * 16_000) + b"X-A: a\r\n" * 100 + b"\r\n") as connection:
        assert reply(connection).status == 200


@pytest.mark.parametrize(
    ("head", "piece", "status"),
    [
        (GET + b"X-A: ", b"a" * MEGABYTE, 431),
        (GET, b"X-A: b\r\n" * (MEGABYTE // 8), 431),
        (CHUNKED + b'f\r\n{"inputs": "a"}\r\n0\r\nX-A: ', b"a" * MEGABYTE, 431),
        (POST + b"Content-Length: 100000000\r\n\r\n", b"a" * MEGABYTE, 413),
        (CHUNKED, b"f4240\r\n%s\r\n" % (b"a" * MEGABYTE), 413),
        (GET.replace(b"GET /healthz", b"POST /nowhere") + b"Content-Length: 100000000\r\n\r\n", b"a" * MEGABYTE, 404),
    ],
    ids=["header", "headers", "trailer", "announced body", "chunked body", "body that nobody reads"],
)
def test_a_hundred_megabytes_are_refused_in_bounded_memory(
    served: Live, head: bytes, piece: bytes, status: int
) -> None:
    memory = Memory()
    most = 0
    with served.send(head) as connection:
        try:
            for part in repeat(piece, 100):
                connection.sendall(part)
                most = max(most, memory.growth())
        except ConnectionError:
            pass  # cut off: what was answered is there to be read
        assert reply(connection).status == status
    assert most < 25 * MEGABYTE
    assert_well(served)


def test_a_client_that_sends_before_it_reads_sees_its_refusal(served: Live) -> None:
    with closing(HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("POST", "/classify", bytes(16 * MEGABYTE))  # a reset would break this off
        assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"inputs": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "invalid_json"),
        (b'{"inputs": "a", "task": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400, "invalid_json"),
        (b'{"inputs": "\xff\xfe"}', 400, "invalid_json"),
        (b'{"inputs": "\\ud800"}', 400, "invalid_json"),
        (b'{"inputs": "a", "exit_threshold": NaN}', 422, "invalid_request"),
        (b'{"inputs": "a", "deadline_ms": Infinity}', 422, "invalid_request"),
        (b'{"inputs": "a", "deadline_ms": 1e999}', 422, "invalid_request"),
        (json.dumps({"inputs": ["a"] * 100_000}).encode(), 413, "too_many_inputs"),
        (json.dumps({"inputs": [1] * 100_000}).encode(), 422, "invalid_request"),
    ],
    ids=["deep list", "deep object", "no utf-8", "half a pair", "nan", "infinity", "beyond floats", "list", "bad list"],
)
def test_bodies_that_no_client_should_send(served: Live, body: bytes, status: int, code: str) -> None:
    memory = Memory()
    with served.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body) as connection:
        answer = reply(connection)
        assert (answer.status, json.loads(answer.body)["code"]) == (status, code)
    assert memory.growth() < 25 * MEGABYTE
    assert_well(served)


# Who is slow, silent or gone


@pytest.mark.parametrize(
    ("sent", "settings", "code"),
    [
        (GET + b"X-A: " + b"a" * 1000, {"client_seconds": 0.3}, "headers_too_slow"),
        (POST + b"Content-Length: 1000\r\n\r\n", {"body_seconds": 0.3}, "body_too_slow"),
    ],
    ids=["headers", "body"],
)
def test_408_for_a_byte_now_and_then(sent: bytes, settings: dict[str, Any], code: str) -> None:
    with live(**settings) as served, socket.create_connection(("127.0.0.1", served.port), timeout=0.02) as connection:
        connection.sendall(sent[: len(GET) + 4])
        for byte in sent[len(GET) + 4 :] + b" " * 1000:
            try:
                assert connection.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                connection.sendall(bytes([byte]))
        connection.settimeout(10)
        assert told(connection) == (408, code)
        assert_well(served)


def test_half_a_head_behind_a_request_has_its_time_too() -> None:
    with live(client_seconds=0.3) as served, served.send(GET + b"\r\n" + GET) as connection:
        assert [each.status for each in replies(connection)] == [200]
        with served.send(b"") as busy:
            served.fake.recurrent.gate.clear()
            busy.sendall(classify_bytes("a text"))
            assert served.fake.recurrent.entered.wait(timeout=10)
            busy.sendall(GET)
            time.sleep(0.1)
            served.fake.recurrent.gate.set()
            assert [each.status for each in replies(busy)] == [200, 408]


def test_what_is_asked_behind_a_last_answer_is_not_run() -> None:
    refused = classify_bytes("a").replace(b"Host: x", b"Host: x\r\nContent-Encoding: gzip")
    with live() as served, capture_logs() as lines:
        with served.send(refused + classify_bytes("b") + b"garbage\r\n\r\n") as connection:
            assert [each.status for each in replies(connection)] == [415]
            connection.shutdown(socket.SHUT_WR)
            wait_until(lambda: not served.connections)
        assert served.fake.recurrent.steps == 0
        assert [line["code"] for line in lines if line["event"] == "request"] == [400, 415]
        assert_well(served)


def test_a_connection_on_which_nothing_is_asked_is_ended() -> None:
    with live(client_seconds=0.3) as served, served.send(b"") as silent, served.send(GET + b"\r\n") as blank:
        assert is_closed(silent)
        assert reply(blank).status == 200
        blank.sendall(b"\r\n")  # RFC 9112, 2.2: before a request it means nothing
        assert is_closed(blank)


def test_a_body_that_nobody_reads_has_an_end_too() -> None:
    with live(client_seconds=0.3) as served:
        head = GET.replace(b"GET /healthz", b"POST /nowhere") + b"Content-Length: 100000\r\n\r\n"
        with served.send(head) as connection:
            assert reply(connection).status == 404
            connection.sendall(b"a")
            assert is_closed(connection)


def test_a_body_that_nobody_read_is_over_when_it_has_come() -> None:
    with live(client_seconds=0.3) as served:
        head = GET.replace(b"GET /healthz", b"POST /nowhere") + b"Content-Length: 3\r\n\r\n"
        with served.send(head) as connection:
            assert reply(connection).status == 404
            for part in (b"a", b"b", b"c"):
                connection.sendall(part)
                time.sleep(0.02)
            time.sleep(1)  # an idle connection stays open for longer than a head or a body may take
            connection.sendall(GET + b"\r\n")
            assert reply(connection).status == 200


def test_who_does_not_take_an_answer_is_cut_off() -> None:
    with live(client_seconds=0.3) as served, socket.socket() as connection:
        for each, size in ((connection, socket.SO_RCVBUF), (served.listener, socket.SO_SNDBUF)):
            each.setsockopt(socket.SOL_SOCKET, size, 2048)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall((b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n") * PIPELINED)
        wait_until(lambda: served.connections == 1)
        wait_until(lambda: served.connections == 0)
        assert_well(served)


def test_a_client_that_sends_no_more_gets_its_answer(served: Live) -> None:
    served.fake.recurrent.gate.clear()
    with served.send(classify_bytes("asked, and then half closed")) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(12) == b"HTTP/1.1 100"
        served.fake.recurrent.gate.set()
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 1 and received.endswith(b"}")


def test_a_thousand_idle_connections_do_no_harm(served: Live) -> None:
    memory = Memory()
    with ExitStack() as opened:
        for number in range(1000):
            opened.enter_context(served.send((b"", GET, GET + b"\r\n")[number % 3]))
        wait_until(lambda: served.connections == 1000)
        for _ in range(50):
            assert_well(served)
        assert memory.growth() < 40 * MEGABYTE
    wait_until(lambda: served.connections == 0)


def test_idle_connections_keep_no_body_that_nobody_read(served: Live) -> None:
    sent = GET.replace(b"GET /healthz", b"POST /nowhere") + b"Content-Length: 60000\r\n\r\n" + b"a" * 60_000
    memory = Memory()
    with ExitStack() as opened:
        for _ in range(600):
            assert reply(opened.enter_context(served.send(sent))).status == 404
        assert memory.growth() < 20 * MEGABYTE


def test_bodies_that_are_only_announced_keep_nobody_out() -> None:
    with live(max_body_bytes=1024) as served, ExitStack() as opened:
        for number in range(2 * LONGEST_BODIES):
            head = (CHUNKED, POST + b"Content-Length: 1024\r\n\r\n")[number % 2]
            opened.enter_context(served.send(head))
        wait_until(lambda: sum(served.fake.app.state.runtime._in_flight.values()) == 2 * LONGEST_BODIES)
        assert_well(served)


def test_429_when_more_of_bodies_has_come_than_there_is_room_for() -> None:
    with live(max_body_bytes=1024) as served, ExitStack() as opened:
        runtime = served.fake.app.state.runtime
        most = POST + b"Content-Length: 1024\r\n\r\n" + b" " * 1000
        for _ in range(LONGEST_BODIES + 1):
            opened.enter_context(served.send(most))
        wait_until(lambda: runtime._body_bytes == 1000 * (LONGEST_BODIES + 1))
        with served.send(most) as connection:
            answer = reply(connection)
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            connection.sendall(b" " * 24 + GET + b"\r\n")  # the rest of the body is passed over
            assert reply(connection).status == 200
        opened.close()
        wait_until(lambda: runtime.idle_seconds(math.inf))
        assert_well(served)


def test_above_the_most_connections_only_probes_are_answered() -> None:
    with live(max_connections=10) as served, ExitStack() as opened:
        held = [opened.enter_context(served.send(b"")) for _ in range(10)]
        wait_until(lambda: served.connections == 10)
        with served.send(classify_bytes("one too many")) as connection:
            assert told(connection) == (503, "too_many_connections")
        with served.send(GET + b"\r\n") as connection:
            answer = reply(connection)
            assert (answer.status, answer.headers["connection"]) == (200, "close") and is_closed(connection)
        held[0].sendall(classify_bytes("was there before"))
        assert reply(held[0]).status == 200
        wait_until(lambda: served.connections == 10)
        for _ in range(RESERVE):
            opened.enter_context(served.send(b""))
        wait_until(lambda: served.connections == 10 + RESERVE)
        with served.send(b"") as connection:
            assert told(connection) == (503, "too_many_connections")
        wait_until(lambda: served.connections == 10, seconds=5)  # long before `client_seconds`
        with served.send(GET + b"\r\n") as connection:
            assert reply(connection).status == 200


def test_no_long_line_of_clients_comes_before_a_probe() -> None:
    """Those that left meanwhile stand in it, too, and each costs the time of a request."""
    with live() as served, ExitStack() as opened:
        stand_still = threading.Event()
        served.server.servers[0].get_loop().call_soon_threadsafe(stand_still.wait, 60)
        try:
            clients = [opened.enter_context(socket.socket()) for _ in range(2 * BACKLOG)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", served.port))
            time.sleep(0.5)
            in_line = select.select([], clients, [], 0)[1]  # the others try again, and are not told of it
        finally:
            stand_still.set()
        assert BACKLOG / 2 < len(in_line) < 1.1 * BACKLOG


# What HTTP/1.1 allows, however rarely one meets it


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_the_offer_of_another_protocol_is_ignored_and_the_body_is_read(served: Live, protocol: bytes) -> None:
    offer = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABk\r\n" % protocol
    asked = classify_bytes("offered").replace(b"\r\n", offer, 1)
    with served.send(asked[:-5]) as connection:
        connection.sendall(asked[-5:] + asked + classify_bytes("offered"))
        answers = list(islice(replies(connection), 3))
    assert [answer.status for answer in answers] == [200] * 3
    assert len({json.dumps(json.loads(answer.body)["results"]) for answer in answers}) == 1


def test_pipelined_requests_are_answered_in_their_order(served: Live) -> None:
    texts = [f"text {number}" for number in range(PIPELINED)]
    with served.send(b"".join(map(classify_bytes, texts))) as connection:
        results = [json.loads(answer.body)["results"] for answer in islice(replies(connection), PIPELINED)]
    assert results == [served.ask("POST", "/classify", {"inputs": text})[1]["results"] for text in texts]


def test_endless_pipelining_ends_after_what_was_taken(served: Live) -> None:
    memory = Memory()
    with served.send((GET + b"\r\n") * 20_000) as connection:
        answers = list(replies(connection))
    assert PIPELINED <= len(answers) < 20_000 and {answer.status for answer in answers} == {200}
    assert answers[-1].headers["connection"] == "close"
    assert memory.growth() < 25 * MEGABYTE
    assert_well(served)


def test_a_body_is_asked_for_before_it_is_sent(served: Live) -> None:
    head, _, body = classify_bytes("expected").partition(b"\r\n\r\n")
    with served.send(head + b"\r\nExpect: 100-continue\r\n\r\n") as connection:
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert reply(connection).status == 200
    with served.send(POST + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n") as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("path", "ready"),
    [("/", True), ("/healthz", True), ("/readyz", True), ("/readyz", False), ("/v2/health/live", True),
     ("/v2/health/ready", False)],
)  # fmt: skip
def test_probes_may_ask_for_the_head_alone(path: str, ready: bool) -> None:
    with live() as served:
        if not ready:
            served.fake.app.state.runtime.drain()
        with served.send(b"HEAD %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode()) as connection:
            received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 " if ready else b"HTTP/1.1 503 ") and received.endswith(b"\r\n\r\n")
