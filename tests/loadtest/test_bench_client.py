"""The load generator against a small server in the same loop, which misbehaves in every way that it must tell."""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from loadtest.bench import client, paces
from loadtest.bench.client import drive
from loadtest.bench.connection import Connection, Load, encode, fault
from loadtest.recording import Recording

SCORES = {"good": ("positive", 0.91), "bad": ("negative", 0.72), "odd": ("positive", 0.55)}
HANG_UP = b""


def answer(texts: list[str], status: str = "200 OK", **fields: Any) -> bytes:
    results = [{"label": SCORES[text][0], "score": SCORES[text][1], "scores": {}} for text in texts]
    body = json.dumps(fields or {"results": results}).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


Behaviour = Callable[[int, list[str]], Awaitable[bytes]]


async def right(number: int, texts: list[str]) -> bytes:
    return answer(texts)


async def busy(number: int, texts: list[str]) -> bytes:
    """The right answer, after more CPU time than the system's clock of it passes over."""
    until = time.process_time() + 0.005
    while time.process_time() < until:
        pass
    return answer(texts)


async def driven(behave: Behaviour, **job: Any) -> dict[str, Any]:
    """What the load generator says of a server that answers its requests, numbered from 0, as `behave` has it."""
    numbers = itertools.count()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                inputs = json.loads(await reader.readexactly(length))["inputs"]
                said = await behave(next(numbers), inputs if isinstance(inputs, list) else [inputs])
                writer.write(said)
                if said == HANG_UP or b"Connection: close" in said:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        given = {"host": "127.0.0.1", "port": port, "pid": os.getpid(), "warmup": 0.0, "seconds": 0.3, "seed": 1}
        closed = {"arrivals_per_second": None, "resting": False}
        return await asyncio.wait_for(drive(given | closed | job), 30)


def traffic(*texts: str, connections: int = 3, list_size: int = 1) -> list[dict[str, Any]]:
    lists = [list(texts[start : start + list_size]) for start in range(0, len(texts), list_size)]
    requests = [
        {"body": json.dumps({"inputs": some if list_size > 1 else some[0]}), "known": [SCORES[text] for text in some]}
        for some in lists
    ]
    return [{"connections": connections, "requests": requests}]


def run(behave: Behaviour, **job: Any) -> tuple[Recording, dict[str, Any]]:
    job.setdefault("traffics", traffic("good", "bad", "odd"))
    seen = asyncio.run(driven(behave, **job))
    return Recording(**seen["recordings"][0]), seen


def every(which: int, instead: bytes) -> Behaviour:
    """Right answers, but for every so-manieth request."""

    async def behave(number: int, texts: list[str]) -> bytes:
        return instead if number % which == which - 1 else answer(texts)

    return behave


@pytest.mark.parametrize("resting", [False, True])
def test_right_answers_are_counted_and_timed(resting: bool) -> None:
    recording, seen = run(busy, resting=resting)
    assert recording.failures == {}
    assert len(recording.milliseconds) > 3
    assert min(recording.milliseconds) > 0
    assert seen["seconds"] >= 0.29
    assert sum(seen["service_cpu_seconds"]) > 0  # this very process stands in for the service
    assert recording.generator_cores > 0
    assert sum(seen["per_second"]) == len(recording.milliseconds)


def test_lists_and_two_kinds_of_traffic_are_told_apart() -> None:
    lists = traffic("good", "bad", "odd", "good", list_size=2)
    recording, seen = run(right, traffics=[*lists, *traffic("bad", connections=1)])
    assert recording.failures == {}
    assert len(recording.milliseconds) > len(Recording(**seen["recordings"][1]).milliseconds) > 0


@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        (answer([], "429 Too Many Requests", code="queue_full"), "HTTP 429 queue_full"),
        (answer([], "500 Oops", message="no code"), "HTTP 500"),
        (answer(["good", "good"]), "2 results for 1 texts"),
        (HANG_UP, "the connection was closed before the answer"),
        (b"nonsense\r\n\r\n", "not HTTP"),
    ],
)
def test_what_goes_wrong_is_told_and_the_others_go_on(instead: bytes, reason: str) -> None:
    recording, _ = run(every(5, instead))
    (told,) = recording.failures
    assert told.startswith(reason)
    failed = recording.failures[told]
    assert failed / (failed + len(recording.milliseconds)) == pytest.approx(0.2, abs=0.1)
    assert len(recording.milliseconds) > 3


def test_swapped_answers_are_noticed() -> None:
    async def swapped(number: int, texts: list[str]) -> bytes:
        return answer(["odd" if text == "good" else text for text in texts])

    recording, _ = run(swapped)
    assert set(recording.failures) == {"an answer that is not its text's"}
    assert recording.failures.popitem()[1] == pytest.approx(len(recording.milliseconds) / 2, rel=0.3)


def test_a_connection_that_is_closed_after_its_answer_is_no_failure() -> None:
    body = answer(["good"]).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    recording, _ = run(every(3, body), traffics=traffic("good"))
    assert recording.failures == {}
    assert len(recording.milliseconds) > 3


def test_an_answer_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GIVE_UP_SECONDS", 0.2)

    async def hangs_once(number: int, texts: list[str]) -> bytes:
        await asyncio.sleep(20 if number == 4 else 0)
        return answer(texts)

    recording, _ = run(hangs_once)
    assert recording.failures == {"no answer within 0.2 s of the end": 1}
    assert len(recording.milliseconds) > 3


def test_a_warm_up_is_not_counted_but_its_failures_are() -> None:
    served = itertools.count()

    async def behave(number: int, texts: list[str]) -> bytes:
        next(served)
        return HANG_UP if number == 1 else answer(texts)

    recording, _ = run(behave, traffics=traffic("good", connections=1), warmup=0.2, seconds=0.2)
    assert recording.failures == {"the connection was closed before the answer": 1}
    unfinished = 1
    assert 0 < len(recording.milliseconds) < next(served) - 1 - unfinished


def test_open_arrivals_do_not_wait_for_answers_and_count_from_when_they_were_due() -> None:
    gate = asyncio.Event()

    async def late(number: int, texts: list[str]) -> bytes:
        if number == 0:
            asyncio.get_running_loop().call_later(0.25, gate.set)
        await gate.wait()
        return answer(texts)

    recording, seen = run(late, traffics=traffic("good", "bad", connections=2), arrivals_per_second=200.0, seconds=0.5)
    assert recording.failures == {}
    assert seen["sent"] == 100
    assert len(recording.milliseconds) + seen["late"] == seen["sent"]
    assert max(recording.milliseconds) > 200
    waited = [one for one in recording.milliseconds if one > 20]
    assert len(waited) > 20  # two connections that wait for their answers would have met the closed gate twice


def test_open_arrivals_tell_what_they_could_not_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paces, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(client, "GIVE_UP_SECONDS", 0.1)

    async def never(number: int, texts: list[str]) -> bytes:
        await asyncio.sleep(20)
        return answer(texts)

    recording, seen = run(never, traffics=traffic("good", connections=2), arrivals_per_second=100.0)
    assert recording.failures == {
        "no answer within 0.1 s of the end": 2,
        "not sent: all 2 connections were busy": seen["sent"] - 2,
    }


def test_a_request_whose_connection_is_still_opening_at_the_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = Load.connect

    async def slow(load: Load, done: Callable[[Connection], None]) -> Connection:
        await asyncio.sleep(0.4)
        return await at_once(load, done)

    monkeypatch.setattr(Load, "connect", slow)
    recording, seen = run(right, traffics=traffic("good", connections=0), arrivals_per_second=50.0, seconds=0.2)
    assert (recording.failures, seen["late"]) == ({}, seen["sent"])
    assert seen["sent"] > 3


def test_every_request_carries_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADTEST_API_KEY", "very-secret")
    assert b"\r\nX-API-Key: very-secret\r\n" in encode("127.0.0.1:8000", b"{}")


@pytest.mark.parametrize(
    ("label", "score", "wrong"),
    [
        ("positive", "0.910000", None),
        ("positive", "0.910010", None),
        ("positive", "0.9101", "an answer that is not its text's"),
        ("negative", "0.910000", "an answer that is not its text's"),
        ("positive", "NaN", "0 results for 1 texts"),
        ("positive", "9.1e-1", None),
    ],
)
def test_an_answer_is_right_within_what_is_promised(label: str, score: str, wrong: str | None) -> None:
    body = f'{{"results":[{{"label":"{label}","score":{score},"scores":{{"{label}":{score}}}}}]}}'.encode()
    assert fault(200, body, [(b"positive", 0.91)]) == wrong
