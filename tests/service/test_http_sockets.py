"""The service on a real socket, with its real server: clients that leave, dawdle or send too much, and the drain."""

from __future__ import annotations

import gc
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from itertools import islice

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.bundle import Bundle
from service.classify import TURN_CHARACTERS
from service.connections import PIPELINED, Connection
from service.errors import StartError
from service.jobs import Pace
from service.schemas import ClassifyRequest
from service.server import Server
from service.sockets import listen, reserve
from service.texts import Encoded, encode_further
from tests.service.fakes import fake_app, fake_bundle, wait_until
from tests.service.live import Live, classify_bytes, live, replies, reply

LEAVERS = 1000


def has_waiting(served: Live, requests: int) -> bool:
    """Whether so many requests wait for their turn on a connection."""
    connections = list(served.server.server_state.connections)
    return any(isinstance(each, Connection) and len(each.pipeline) == requests for each in connections)


def test_a_request_leaves_nothing_to_the_garbage_collector() -> None:
    with live() as served, closing(HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                connection.request("POST", "/classify", json.dumps({"inputs": "a text"}))
                assert connection.getresponse().read()
            left = sum(isinstance(found, RequestResponseCycle) for found in gc.get_objects())
        finally:
            gc.enable()
    assert left <= 2


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (classify_bytes("poison"), 500),
        (classify_bytes("late", deadline_ms=0.001), 504),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * (PIPELINED + 2), 200),  # the last that is answered
    ],
)
def test_nor_does_one_that_is_refused(sent: bytes, status: int) -> None:
    with live() as served:
        served.fake.recurrent.fail_for("poison")
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                with served.send(sent) as connection:
                    assert [each.status for each in islice(replies(connection), sent.count(b"HTTP"))][-1] == status
            wait_until(lambda: not served.connections)
            kinds = (Connection, RequestResponseCycle, ClassifyRequest)
            wait_until(lambda: sum(isinstance(found, kinds) for found in gc.get_objects()) <= 6)
        finally:
            gc.enable()


def ends_after_an_answer(served: Live) -> None:
    with closing(HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()


def resets_after_an_answer(served: Live) -> None:
    with served.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert reply(connection).status == 200
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def leaves_while_others_wait(served: Live) -> None:
    served.fake.recurrent.gate.clear()
    with served.send(classify_bytes("first")) as connection:
        assert served.fake.recurrent.entered.wait(timeout=10)
        connection.sendall(classify_bytes("second"))
        wait_until(partial(has_waiting, served, 1))
    wait_until(lambda: not served.connections)
    served.fake.recurrent.gate.set()
    served.fake.recurrent.entered.clear()


@pytest.mark.parametrize("client", [ends_after_an_answer, resets_after_an_answer, leaves_while_others_wait])
def test_a_connection_leaves_nothing_behind(client: Callable[[Live], None]) -> None:
    with live() as served:
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                client(served)
            wait_until(lambda: not served.connections)
            wait_until(lambda: sum(isinstance(found, Connection) for found in gc.get_objects()) <= 2)
        finally:
            gc.enable()


def test_nothing_runs_for_a_client_that_left() -> None:
    with live() as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        occupied = pool.submit(served.ask, "POST", "/classify", {"inputs": "occupied"})
        assert served.fake.recurrent.entered.wait(timeout=10)
        leavers = [served.send(classify_bytes(f"leaver {number}")) for number in range(LEAVERS)]
        model = {"architecture": "recurrent", "task": "sentiment"}
        wait_until(lambda: served.count("refrain_queue_depth", **model) == LEAVERS + 1)
        for leaver in leavers:
            leaver.close()
        wait_until(lambda: served.count("refrain_rejected_total", reason="client_gone") == LEAVERS)
        wait_until(lambda: served.count("refrain_queue_depth", **model) == 1)
        served.fake.recurrent.gate.set()
        assert occupied.result(timeout=10)[0] == 200
        assert served.fake.recurrent.steps == 2
        assert served.count("refrain_dropped_texts_total", reason="client", **model) == LEAVERS


@pytest.mark.parametrize("more", [1, 2, PIPELINED - 1])
def test_nothing_runs_for_a_client_that_left_after_asking_often(more: int) -> None:
    with live() as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        occupied = pool.submit(served.ask, "POST", "/classify", {"inputs": "occupied"})
        assert served.fake.recurrent.entered.wait(timeout=10)
        leaver = served.send(classify_bytes("first"))
        model = {"architecture": "recurrent", "task": "sentiment"}
        wait_until(lambda: served.count("refrain_queue_depth", **model) == 2)
        for number in range(more):
            leaver.sendall(classify_bytes("another"))
            wait_until(partial(has_waiting, served, number + 1))  # each in a read of its own
        leaver.close()
        wait_until(lambda: served.count("refrain_queue_depth", **model) == 1)
        served.fake.recurrent.gate.set()
        assert occupied.result(timeout=10)[0] == 200
        assert served.count("refrain_dropped_texts_total", reason="client", **model) == 1


@pytest.mark.parametrize("words", [1, 40_000, 80_000])  # of which many come in several reads, and reading pauses
def test_nothing_runs_for_a_client_that_left_after_much(words: int) -> None:
    with live() as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        occupied = pool.submit(served.ask, "POST", "/classify", {"inputs": "occupied"})
        assert served.fake.recurrent.entered.wait(timeout=10)
        leaver = served.send(classify_bytes("word " * words))
        model = {"architecture": "recurrent", "task": "sentiment"}
        wait_until(lambda: served.count("refrain_queue_depth", **model) == 2)
        leaver.close()
        wait_until(lambda: served.count("refrain_queue_depth", **model) == 1)
        assert served.count("refrain_dropped_texts_total", reason="client", **model) == 1
        served.fake.recurrent.gate.set()
        assert occupied.result(timeout=10)[0] == 200


def test_no_text_is_tokenized_for_a_client_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Semaphore(0)

    def further(bundle: Bundle, text: str) -> Encoded:
        entered.release()
        assert gate.wait(timeout=30)
        return encode_further(bundle, text)

    monkeypatch.setattr("service.classify.encode_further", further)
    long = "b" * TURN_CHARACTERS  # one word, for the tokenizer's thread
    with live() as served, ThreadPoolExecutor() as pool:
        occupied = pool.submit(served.ask, "POST", "/classify", {"inputs": long})
        assert entered.acquire(timeout=10)
        leavers = [served.send(classify_bytes(long)) for _ in range(20)]
        in_flight = served.fake.app.state.runtime._in_flight
        wait_until(lambda: in_flight.total() == 21)
        for leaver in leavers:
            leaver.close()
        wait_until(lambda: in_flight.total() == 1)
        gate.set()
        assert occupied.result(timeout=10)[0] == 200
        assert not entered.acquire(timeout=0.1)
        assert served.count("refrain_rejected_total", reason="client_gone") == 20


def test_a_deadline_that_is_over_before_the_text_has_come_is_one_whatever_waits() -> None:
    with live() as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        occupied = pool.submit(served.ask, "POST", "/classify", {"inputs": "occupied"})
        assert served.fake.recurrent.entered.wait(timeout=10)
        sent = classify_bytes("slow", deadline_ms=50)
        with served.send(sent[:-3]) as connection:
            time.sleep(0.1)
            connection.sendall(sent[-3:])
            assert reply(connection).status == 504
        served.fake.recurrent.gate.set()
        assert occupied.result(timeout=10)[0] == 200


def test_what_a_deadline_ended_is_not_counted_as_left_by_its_client() -> None:
    with live() as served, ThreadPoolExecutor(20) as pool:
        served.fake.recurrent.gate.clear()
        model = {"architecture": "recurrent", "task": "sentiment"}
        # No pace is known, so nobody is refused because a slow machine would hardly be in time.
        served.fake.app.state.runtime.serving.models["sentiment", "recurrent"].batcher._pace = Pace()
        bodies = [{"inputs": "a", "deadline_ms": 20 + 0.37 * number} for number in range(60)]
        answers = pool.map(lambda body: served.ask("POST", "/classify", body)[0], bodies)
        assert set(answers) == {504}
        assert served.count("refrain_dropped_texts_total", reason="deadline", **model) == 60
        assert served.count("refrain_dropped_texts_total", reason="client", **model) == 0


def test_who_scrapes_while_another_does_shares_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as served, ThreadPoolExecutor(20) as pool:
        metrics, gate, written = served.fake.app.state.runtime.metrics, threading.Event(), []
        write = metrics.exposition

        def exposition() -> bytes:
            written.append(gate.wait(timeout=10))
            return bytes(write())

        monkeypatch.setattr(metrics, "exposition", exposition)
        scrapes = [pool.submit(scrape, served) for _ in range(20)]
        wait_until(lambda: served.connections == 20)
        gate.set()
        assert all("refrain_requests" in each.result(timeout=10) for each in scrapes)
        together = len(written)
        assert together < 10
        assert "refrain_requests" in scrape(served)
        assert len(written) == together + 1  # nobody gets an old one


def scrape(served: Live) -> str:
    with closing(HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def test_a_client_that_leaves_within_its_body_is_forgotten() -> None:
    with live() as served:
        served.send(classify_bytes("half a body")[:-5]).close()
        wait_until(lambda: served.count("refrain_rejected_total", reason="client_gone") == 1)
        assert served.ask("POST", "/classify", {"inputs": "a"})[0] == 200


def test_408_for_a_body_that_dawdles() -> None:
    with live(body_seconds=0.1) as served, served.send(classify_bytes("half a body")[:-5]) as connection:
        assert reply(connection).status == 408


def test_413_as_soon_as_a_stream_is_too_long() -> None:
    endless = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n%s\r\n" % (
        b"a" * 4096
    )
    with live(max_body_bytes=2048) as served, served.send(endless) as connection:
        head = connection.recv(4096)
        assert head.startswith(b"HTTP/1.1 413 ") and b"connection: close" in head.lower()


def test_413_from_the_announced_length_alone() -> None:
    announced = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    with live() as served, served.send(announced) as connection:
        assert reply(connection).status == 413


def test_a_signal_drains_and_then_ends() -> None:
    with live() as served, ThreadPoolExecutor() as pool:
        kept_alive = HTTPConnection("127.0.0.1", served.port, timeout=10)
        kept_alive.request("GET", "/readyz")
        assert kept_alive.getresponse().read() == b'{"status":"ready"}'
        served.fake.recurrent.gate.clear()
        accepted = pool.submit(served.ask, "POST", "/classify", {"inputs": "accepted"})
        assert served.fake.recurrent.entered.wait(timeout=10)

        served.server.handle_exit(signal.SIGTERM, None)

        assert served.ask("GET", "/readyz")[0] == 503
        kept_alive.request("POST", "/classify", '{"inputs": "too late"}')
        refused = kept_alive.getresponse()
        assert (refused.status, refused.getheader("connection")) == (503, "close")
        assert refused.getheader("retry-after")
        kept_alive.close()
        served.fake.recurrent.gate.set()
        assert accepted.result(timeout=10)[0] == 200
        served.thread.join(timeout=20)
        assert not served.thread.is_alive()


def test_before_a_drain_that_is_delayed_connections_end_with_their_next_answer() -> None:
    with live(drain_delay_seconds=600) as served:
        kept_alive = HTTPConnection("127.0.0.1", served.port, timeout=10)
        served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: says_last_word(kept_alive))
        assert served.ask("GET", "/readyz")[0] == served.ask("GET", "/v2/health/ready")[0] == 503
        assert served.ask("GET", "/healthz")[0] == 200
        assert served.ask("POST", "/classify", {"inputs": "a new connection"})[0] == 200
        served.fake.app.state.runtime.drain()  # as a second signal has it
        status, problem = served.ask("POST", "/classify", {"inputs": "too late"})
        assert (status, problem["code"]) == (503, "draining")
        served.thread.join(timeout=20)
        assert not served.thread.is_alive()


def says_last_word(kept_alive: HTTPConnection) -> bool:
    kept_alive.request("POST", "/classify", '{"inputs": "still welcome"}')
    answer = kept_alive.getresponse()
    answer.read()
    assert answer.status == 200
    return answer.getheader("connection") == "close"


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    fake = fake_app([fake_bundle()])
    fake.recurrent.poison.add((0,))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=Server(fake.app).run, args=([listener],), daemon=True)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert str(fake.app.state.runtime.failure) == "nowhere: its graphs do not run: RuntimeError: poisoned"


def test_a_signal_that_comes_twice_still_drains() -> None:
    with live() as served, ThreadPoolExecutor() as pool:  # from the supervisor, and from whoever signals all processes
        served.fake.recurrent.gate.clear()
        accepted = pool.submit(served.ask, "POST", "/classify", {"inputs": "accepted"})
        assert served.fake.recurrent.entered.wait(timeout=10)
        served.server.handle_exit(signal.SIGTERM, None)
        served.server.handle_exit(signal.SIGTERM, None)
        served.fake.recurrent.gate.set()
        assert accepted.result(timeout=10)[0] == 200


def test_engines_that_hang_end_the_server_and_no_request_hangs_on_them() -> None:
    with live(stuck_seconds=0.5, deadline_ms=600_000, drain_seconds=600) as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        hanging = [pool.submit(served.ask, "POST", "/classify", {"inputs": text}) for text in ("one", "two")]
        wait_until(lambda: served.ask("GET", "/healthz")[0] == 503)
        for answer in hanging:
            status, problem = answer.result(timeout=20)
            assert (status, problem["code"]) == (503, "engine_down")
        served.thread.join(timeout=20)
        assert not served.thread.is_alive()
        assert served.fake.app.state.runtime.gave_up


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the death is the test
def test_engines_that_died_end_the_server() -> None:
    with live() as served:
        served.fake.recurrent.die = True
        status, problem = served.ask("POST", "/classify", {"inputs": "deadly"})
        assert (status, problem["code"]) == (503, "engine_down")
        served.thread.join(timeout=20)
        assert not served.thread.is_alive()
        assert served.fake.app.state.runtime.gave_up


def test_engines_that_hang_for_a_moment_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.server.GIVE_UP_TICKS", 100)  # this machine may be slow
    with live(stuck_seconds=0.05) as served, ThreadPoolExecutor() as pool:
        served.fake.recurrent.gate.clear()
        slow = pool.submit(served.ask, "POST", "/classify", {"inputs": "slow"})
        wait_until(lambda: served.ask("GET", "/healthz")[0] == 503)
        served.fake.recurrent.gate.set()
        assert slow.result(timeout=10)[0] == 200
        assert served.ask("GET", "/healthz")[0] == 200
        assert not served.fake.app.state.runtime.gave_up


def test_a_drain_has_an_end() -> None:
    with live(deadline_ms=600_000, drain_seconds=600, stuck_seconds=600) as served:
        runtime = served.fake.app.state.runtime
        runtime.settings = runtime.settings.model_copy(update={"drain_seconds": 0.2})  # which a start would refuse
        served.fake.recurrent.gate.clear()
        with served.send(classify_bytes("never answered")):
            assert served.fake.recurrent.entered.wait(timeout=10)
            served.server.handle_exit(signal.SIGTERM, None)
            served.thread.join(timeout=20)
            assert not served.thread.is_alive()


def test_a_taken_port_and_a_wrong_address_are_said_in_one_line() -> None:
    with reserve("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            StartError, match=f"^REFRAIN_HOST, REFRAIN_PORT: cannot listen on 127.0.0.1:{port}: Address already in use$"
        ):
            reserve("127.0.0.1", port)
    with pytest.raises(StartError, match=r"^REFRAIN_HOST, REFRAIN_PORT: cannot listen on 203\.0\.113\.7:0: "):
        reserve("203.0.113.7", 0)
    for unwritable in ("\u00e9..b", "\u00e9" * 80):
        with pytest.raises(
            StartError,
            match=r"^REFRAIN_HOST, REFRAIN_PORT: cannot listen on \S+: a host's name has parts of 1 to 63 characters$",
        ):
            reserve(unwritable, 0)
