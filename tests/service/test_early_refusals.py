"""Requests refused from their head alone while there is no room: told what others are told, on the same connection."""

from __future__ import annotations

import json
import math
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.connections import PIPELINED
from service.jobs import Pace
from tests.service.fakes import fake_bundle, wait_until
from tests.service.live import Live, classify_bytes, is_closed, live, replies, reply

POST = b"POST /classify HTTP/1.1\r\nHost: x\r\n"


LABELS = {408: {"architecture": "", "task": ""}, 429: {"architecture": "recurrent", "task": "sentiment"}}


@contextmanager
def full(**settings: Any) -> Iterator[Live]:
    """A service whose recurrent model has its one place taken, until its gate opens."""
    bundles = [fake_bundle(), fake_bundle(architecture="baseline"), fake_bundle("domain", "baseline")]
    settings = {"default_task": "sentiment", "max_queue": 1, "max_inputs": 1, **settings}
    with live(bundles, **settings) as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        key = {"X-API-Key": settings["api_keys"][0]} if "api_keys" in settings else {}
        occupied = pool.submit(served.ask, "POST", "/classify", {"inputs": "occupied"}, key)
        assert served.fake.recurrent.entered.wait(timeout=10)
        try:
            yield served
        finally:
            served.fake.recurrent.gate.set()
            assert occupied.result(timeout=10)[0] == 200


def asking(headers: bytes = b"", **body: Any) -> bytes:
    encoded = json.dumps({"inputs": "a", **body}).encode()
    return POST + headers + b"Content-Length: %d\r\n\r\n%s" % (len(encoded), encoded)


def test_a_connection_lives_on_after_a_refusal_and_its_next_request_is_answered() -> None:
    with ExitStack() as stack, full() as served:
        connection = stack.enter_context(served.send(asking(b"X-Request-Id: mine\r\n")))
        answers = replies(connection)
        refused = next(answers)
        problem = json.loads(refused.body)
        assert (refused.status, problem["code"], problem["id"]) == (429, "queue_full", "mine")
        assert refused.headers["x-request-id"] == "mine"
        assert int(refused.headers["retry-after"]) >= 1
        served.fake.recurrent.gate.set()
        wait_until(lambda: served.count("refrain_queue_depth", architecture="recurrent", task="sentiment") == 0)
        connection.sendall(asking())
        assert next(answers).status == 200


def test_who_asks_again_at_once_is_told_at_once_but_heard_ever_more_seldom() -> None:
    with ExitStack() as stack, full() as served:
        connection = stack.enter_context(served.send(asking()))
        answers, refused = replies(connection), 0
        began = time.monotonic()
        while time.monotonic() < began + 0.7:
            assert next(answers).status == 429
            refused += 1
            connection.sendall(asking())
        assert 1 <= refused <= 5  # at once, and after 0.05, 0.15, 0.35 and 0.75 seconds
        served.fake.recurrent.gate.set()
        assert next(answers).status in (200, 429)


def test_a_client_that_leaves_while_it_is_not_heard_leaves_nothing_behind() -> None:
    with full() as served:
        for _ in range(5):
            with served.send(asking()) as connection:
                assert next(replies(connection)).status == 429
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        wait_until(lambda: served.connections == 1)  # the one that occupies


def test_refusals_are_counted_one_by_one_and_logged_together() -> None:
    with capture_logs() as lines, full() as served:
        for _ in range(20):
            assert served.ask("POST", "/classify", {"inputs": "a"})[0] == 429
        labels = {"architecture": "recurrent", "task": "sentiment"}
        assert served.count("refrain_requests_total", code="429", **labels) == 20
        assert served.count("refrain_rejected_total", reason="queue_full") == 20
        wait_until(lambda: sum(line.get("requests", 0) for line in lines) == 20)
    told = [line for line in lines if line.get("code") == 429]
    assert {line["event"] for line in told} == {"requests refused early"}
    assert len(told) < 20


def test_a_list_of_short_texts_is_not_taken_for_a_long_one() -> None:
    with full(max_queue=10_000, max_inputs=256, max_queue_ms=1) as served:

        def waiting() -> float:
            return served.count("refrain_queue_depth", architecture="recurrent", task="sentiment")

        long_text = {"inputs": "x" * 60, "max_iterations": 4, "exit_threshold": 1}
        with served.send(asking(**{**long_text, "inputs": ["x" * 60] * 200})):
            wait_until(lambda: waiting() == 201)
            assert served.ask("POST", "/classify", long_text)[0] == 429
            with served.send(asking(inputs=["a"] * 100)) as short_ones:
                wait_until(lambda: waiting() == 301)
                served.fake.recurrent.gate.set()
                assert reply(short_ones)[0] == 200


def test_who_allows_fewer_iterations_may_have_to_wait_longer() -> None:
    with full(max_queue=10_000, max_inputs=256) as served:
        batcher = served.fake.app.state.runtime.serving.models["sentiment", "recurrent"].batcher
        with served.send(asking(inputs=["x" * 60] * 200)):
            wait_until(lambda: batcher.queue_depth == 201)
            served.server._refusals._crowded_until = math.inf
            batcher._pace = Pace(1.0, batcher._foreground.admitted, 201)  # a second for all, however fast a machine
            asked = {"inputs": "x" * 60, "deadline_ms": 1800}
            assert served.ask("POST", "/classify", asked)[0] == 429
            assert served.ask("POST", "/classify", {**asked, "allow_fewer_iterations": True})[0] == 504  # was taken


@pytest.mark.parametrize("chosen", [{"architecture": "baseline"}, {"task": "domain"}])
def test_a_request_that_chooses_a_model_with_room_is_answered(chosen: dict[str, str]) -> None:
    with full() as served, served.send(asking(**chosen)) as connection:
        task = chosen.get("task", "sentiment")
        wait_until(lambda: served.count("refrain_queue_depth", architecture="baseline", task=task) == 1)
        served.fake.recurrent.gate.set()
        answer = reply(connection)
        assert (answer.status, json.loads(answer.body)["results"][0]["architecture"]) == (200, "baseline")


@pytest.mark.parametrize(("body", "status"), [({}, 429), ({"architecture": "baseline"}, 200)])
def test_what_comes_in_pieces_is_refused_or_answered_all_the_same(body: dict[str, str], status: int) -> None:
    with full() as served, served.send(asking()[:20]) as connection:
        for byte in asking(**body)[20:]:
            connection.sendall(bytes([byte]))
            time.sleep(0.001)
        if status == 200:
            wait_until(lambda: served.count("refrain_queue_depth", architecture="baseline", task="sentiment") == 1)
            served.fake.recurrent.gate.set()
        assert reply(connection).status == status


def test_several_requests_in_one_write_are_refused_in_order() -> None:
    with full() as served, served.send(asking(b"X-Request-Id: 1\r\n") + asking(b"X-Request-Id: 2\r\n")) as connection:
        ids = [answer.headers["x-request-id"] for answer in islice(replies(connection), 2)]
        assert ids == ["1", "2"]


def test_endless_requests_in_one_write_are_not_refused_one_by_one() -> None:
    with full() as served, served.send(asking() * 1000) as connection:
        statuses = [answer.status for answer in replies(connection)]
        assert statuses == [429] * PIPELINED + [400]


def test_refusals_that_nobody_takes_do_not_pile_up() -> None:
    with full() as served, socket.socket() as connection:
        for each, size in ((connection, socket.SO_RCVBUF), (served.listener, socket.SO_SNDBUF)):
            each.setsockopt(socket.SOL_SOCKET, size, 2048)
        connection.connect(("127.0.0.1", served.port))
        counted = partial(served.count, "refrain_requests_total", code="429", **LABELS[429])
        with suppress(AssertionError):  # at some point nothing more is read
            for sent in range(10, 3000, 10):
                connection.sendall(asking() * 10)
                wait_until(lambda sent=sent: counted() == sent, seconds=0.5)
        waiting = [each.transport.get_write_buffer_size() for each in served.server.server_state.connections]
        assert max(waiting) < 200_000  # of a megabyte that was asked for


def test_a_key_is_asked_for_before_anything_is_told() -> None:
    with full(api_keys=["a-key-that-is-long-enough"]) as served:
        with served.send(asking()) as connection:
            assert reply(connection).status == 401
        with served.send(asking(b"X-API-Key: a-key-that-is-long-enough\r\n")) as connection:
            assert reply(connection).status == 429


@pytest.mark.parametrize(
    "request_bytes", [asking(b"Connection: close\r\n"), asking().replace(b"HTTP/1.1", b"HTTP/1.0")]
)
def test_a_client_that_wants_no_more_is_let_go(request_bytes: bytes) -> None:
    with full() as served, served.send(request_bytes) as connection:
        (answer,) = replies(connection)
        assert (answer.status, answer.headers["connection"]) == (429, "close")


def test_a_client_that_waits_to_be_told_to_send_is_told() -> None:
    with full() as served, served.send(POST + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"inputs": "a"}')
        assert reply(connection).status == 429


def test_a_refusal_that_says_it_is_the_last_answer_is() -> None:
    with full(drain_delay_seconds=600) as served:
        served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: refused_for_good(served))


def refused_for_good(served: Live) -> bool:
    with served.send(asking()) as connection:
        answer = reply(connection)
        assert answer.status == 429
        if (said := answer.headers.get_all("connection")) is not None:
            assert said == ["close"] and is_closed(connection)
        return said is not None


def test_a_refused_connection_may_idle() -> None:
    with full(client_seconds=0.3) as served, served.send(asking()) as idle:
        answers = replies(idle)
        assert next(answers).status == 429
        time.sleep(0.9)  # the bounds are looked at every 0.3 s
        idle.sendall(asking())
        assert next(answers).status == 429


@pytest.mark.parametrize(("rest", "status"), [(b"", 408), (asking()[-3:], 429)])
def test_a_body_that_takes_its_time_has_as_long_as_any(rest: bytes, status: int) -> None:
    with full(client_seconds=0.3, body_seconds=3) as served, served.send(asking()[:-3]) as slow:
        time.sleep(0.9)  # longer than a head may take
        slow.sendall(rest)
        assert reply(slow).status == status
        wait_until(lambda: served.count("refrain_requests_total", code=str(status), **LABELS[status]) == 1)


def test_while_draining_the_answer_is_503() -> None:
    with full() as served:
        served.server.handle_exit(15, None)
        with served.send(classify_bytes("a")) as connection:
            assert reply(connection).status == 503
