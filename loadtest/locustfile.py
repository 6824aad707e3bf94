"""The users: each posts texts to /classify, waits for the answer, checks it, and posts the next.

`python -m loadtest` runs this file; by itself it is an ordinary locustfile (`locust -f loadtest/locustfile.py`). No
other module imports Locust, which patches the standard library when it is imported.
"""

import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment

from loadtest import texts
from loadtest.recording import Recording

_HEADERS = {"Content-Type": "application/json"}

bodies: Iterator[bytes] = iter(())
"""Shared by all users, so that every run sends the same texts in the same order."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]  # Locust leaves it untyped
def add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--architecture", default="recurrent", help="which model to ask")
    parser.add_argument("--task", default="sentiment", help="what is to be decided")
    parser.add_argument("--list-size", type=int, default=1, help="texts in one request")
    parser.add_argument("--texts", default="", help="a file of texts; composed ones without")
    parser.add_argument("--mixed", action="store_true", help="a tenth of the composed texts are long reviews")
    parser.add_argument("--seed", type=int, default=7, help="of the composed texts")
    parser.add_argument("--recording", default="", help="where to write what was seen")


@events.init.add_listener  # type: ignore[untyped-decorator]  # as above
def prepare(environment: Environment, **_: object) -> None:
    """Encodes every body beforehand: what the generator does while it measures is taken from the service's CPU."""
    global bodies  # noqa: PLW0603  # Locust makes the users itself: there is no other way to hand it to them
    options: Any = environment.parsed_options
    sources = texts.load(Path(options.texts) if options.texts else None, seed=options.seed, mixed=options.mixed)
    encoded = texts.request_bodies(
        sources, list_size=options.list_size, architecture=options.architecture, task=options.task
    )
    bodies = cycle(encoded)
    if options.recording:
        _record(environment, Path(options.recording))


def _record(environment: Environment, path: Path) -> None:
    recording = Recording()
    began_cpu = began_wall = 0.0

    def start(**_: object) -> None:
        nonlocal began_cpu, began_wall
        began_cpu, began_wall = time.process_time(), time.perf_counter()

    def seen(start_time: float, response_time: float, exception: Exception | None, **_: object) -> None:
        recording.add(start_time, response_time, None if exception is None else str(exception)[:200])

    def end(**_: object) -> None:
        recording.generator_cpu_seconds = time.process_time() - began_cpu
        recording.generator_wall_seconds = time.perf_counter() - began_wall
        recording.write(path)

    listeners = {
        environment.events.test_start: start,
        environment.events.request: seen,
        environment.events.quitting: end,
    }
    for event, listener in listeners.items():
        event.add_listener(listener)  # type: ignore[no-untyped-call]  # as above


class Caller(FastHttpUser):
    """A client without pauses, on a connection of its own that stays open."""

    connection_timeout = 15.0  # longer than the service's own deadline, so that its 504 is heard
    network_timeout = 15.0

    @task
    def classify(self) -> None:
        with self.client.post("/classify", data=next(bodies), headers=_HEADERS, catch_response=True) as response:  # type: ignore[arg-type]  # Locust sends bytes as they are, which spares it encoding
            fault = _fault(response, self.environment.parsed_options)
            if fault:
                response.failure(fault)


def _fault(response: ResponseContextManager, options: Any) -> str | None:
    """What is wrong with an answer; None when it is a 200 with one result of the right architecture for each text."""
    if response.status_code == 0:
        return None  # no answer at all: Locust reports the connection's own error
    try:
        answer = response.json()
        if response.status_code != 200:
            return f"HTTP {response.status_code} {answer.get('code', '')}".strip()
        architectures = [result["architecture"] for result in answer["results"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"HTTP {response.status_code} with a body that is not an answer"
    wanted = [options.architecture] * options.list_size
    return None if architectures == wanted else f"results of {sorted(set(architectures))}, {len(architectures)} in all"
