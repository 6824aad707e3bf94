"""The load itself, on Locust: users who wait for their answers, or arrivals that wait for nobody.

Runs as a process of its own, `python -m loadtest.users JOB TRACE`: Locust patches the standard library when it is
imported, so no other module imports it. An arrival's latency begins when it was due, not when it was sent: a service
that makes the load generator wait cannot hide that (no coordinated omission).
"""

import gc
import json
import logging
import resource
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, LoadTestShape, task
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment
from locust.exception import StopUser

from loadtest.job import NOT_SENT, Answer, Job, Trace
from loadtest.recording import percentiles
from loadtest.schedule import Stage, arrivals, level_at, stages
from loadtest.steps import Step, next_rate, step_seconds
from loadtest.target import request_headers

MOST_ON_THEIR_WAY = 2048
"""Arrivals that wait for their answer; more are not sent, and counted as failed."""
WAIT_SECONDS = 15.0
"""For an answer: longer than the service's own deadline, so that its 504 is heard."""
_SETTLE_SECONDS = 0.1
_SPAWN_RATE = 1000.0


class Load:
    """What the users share: the requests in their order, and what became of them."""

    def __init__(self, job: Job) -> None:
        self.job, self.trace = job, Trace()
        self.shape = stages(job.shape, job.level, job.seconds)
        self.requests = cycle((architecture, body.encode()) for architecture, body in job.requests)
        self.headers = request_headers()
        self.began, self.last_end = 0.0, 0.0
        self.over = False

    def send(self, client: Any, due: float, step: int) -> None:
        """One request, due at this moment of `time.perf_counter`, and its answer, checked. Count it as sent before."""
        architecture, body = next(self.requests)
        late_ms = 1000 * (time.perf_counter() - due)
        context = {"architecture": architecture, "step": step, "due": due, "late_ms": late_ms}
        with client.post(
            "/classify", data=body, headers=self.headers, catch_response=True, context=context
        ) as response:
            response.request_meta["response_time"] += late_ms  # so that Locust's own figures say the same
            if fault := _fault(response, architecture, self.job.list_size):
                response.failure(fault)

    def seen(self, response_time: float, exception: Exception | None, context: dict[str, Any], **_: object) -> None:
        """Locust's event of a finished request."""
        self.last_end = time.perf_counter()
        if exception is None:
            due = context["due"] - self.began
            answer = Answer(context["step"], context["architecture"], due, response_time, context["late_ms"])
            self.trace.answers.append(answer)
        else:
            self.trace.fail(str(exception)[:200])


class Caller(FastHttpUser):
    """A user: sends the next request when the last one is answered, on a connection of their own that stays open."""

    connection_timeout = network_timeout = WAIT_SECONDS
    insecure = False
    load: Load

    @task
    def classify(self) -> None:
        now = time.perf_counter()
        if now - self.load.began >= self.load.job.seconds:
            raise StopUser
        self.load.trace.sent += 1
        self.load.send(self.client, now, 0)


class Arrivals(FastHttpUser):
    """All arrivals, one after the other when they are due, each in a greenlet of its own, on shared connections."""

    connection_timeout = network_timeout = WAIT_SECONDS
    insecure = False
    concurrency = MOST_ON_THEIR_WAY
    load: Load

    @task
    def arrive(self) -> None:
        try:
            if self.load.job.shape == "step":
                self._climb()
            else:
                self._play(self._due(self.load.shape, 0), 0)
        finally:
            self.load.over = True
        raise StopUser

    def _due(self, shape: Sequence[Stage], step: int) -> list[float]:
        job = self.load.job
        return arrivals(shape, poisson=job.arrivals == "poisson", seed=f"{job.seed}, {step}")

    def _climb(self) -> None:
        job, steps = self.load.job, self.load.trace.steps
        while (
            rate := next_rate(steps, start=job.level, level_ms=job.service_level_ms, most=job.most_rate)
        ) is not None:
            steps.append(self._step(rate, len(steps)))

    def _step(self, rate: float, number: int) -> Step:
        trace, seconds = self.load.trace, step_seconds(rate, self.load.job.seconds)
        failed, began, used = trace.failed, time.perf_counter(), time.process_time()
        self._play(self._due(stages("steady", rate, seconds), number), number)
        wall, used = time.perf_counter() - began, time.process_time() - used
        own = [answer for answer in trace.answers if answer.step == number]
        p50, p99 = percentiles([one.milliseconds for one in own], (50, 99)) if own else (None, None)
        (late,) = percentiles([one.late_ms for one in own], [99]) if own else (None,)
        return Step(rate, wall, len(own), trace.failed - failed, p50, p99, late, used / wall)

    def _play(self, due: Sequence[float], step: int) -> None:
        """Sends what is due when it is, then waits for what is on its way."""
        load, pool = self.load, Pool()
        began = time.perf_counter() + _SETTLE_SECONDS
        if not step:
            load.began = began
        for seconds in due:
            load.trace.sent += 1
            moment = began + seconds
            gevent.sleep(max(moment - time.perf_counter(), 0.0))  # also when late, or nothing would be sent
            if len(pool) < MOST_ON_THEIR_WAY:
                pool.spawn(load.send, self.client, moment, step)
            else:
                load.trace.fail(f"{NOT_SENT}: {MOST_ON_THEIR_WAY} requests were on their way")
        pool.join(2 * WAIT_SECONDS)
        for _ in pool:
            load.trace.fail(f"no answer within {2 * WAIT_SECONDS:g} s")
        pool.kill()


def _fault(response: ResponseContextManager, architecture: str, list_size: int) -> str | None:
    """What is wrong with an answer; None when it is a 200 with one result of the right architecture for each text."""
    if response.status_code == 0:
        return None  # no answer at all: Locust reports the connection's own error
    try:
        answer = json.loads(response.content or b"")
        if response.status_code != 200:
            return f"HTTP {response.status_code} {answer.get('code', '')}".strip()
        architectures = [result["architecture"] for result in answer["results"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"HTTP {response.status_code} with a body that is not an answer"
    wanted = [architecture] * list_size
    return None if architectures == wanted else f"results of {sorted(set(architectures))}, {len(architectures)} in all"


class Users(LoadTestShape):
    """How many users there are: as the shape says, or one, who sends all arrivals."""

    load: Load

    def tick(self) -> tuple[int, float] | None:
        if self.load.job.arrivals != "users":
            return None if self.load.over else (1, _SPAWN_RATE)
        level = level_at(self.load.shape, time.perf_counter() - self.load.began)
        return None if level is None else (max(1, round(level)), _SPAWN_RATE)


def run(job: Job) -> Trace:
    """Drives the load to its end."""
    load = Load(job)
    Caller.load = Arrivals.load = Users.load = load
    user = Caller if job.arrivals == "users" else Arrivals
    environment = Environment(user_classes=[user], host=job.url, shape_class=Users(), stop_timeout=WAIT_SECONDS)  # type: ignore[no-untyped-call]  # Locust leaves it untyped
    environment.events.request.add_listener(load.seen)  # type: ignore[no-untyped-call]  # as above
    errors: list[Exception] = []
    environment.events.user_error.add_listener(lambda exception, **_: errors.append(exception))  # type: ignore[no-untyped-call]  # as above
    runner = environment.create_local_runner()
    gc.freeze()
    load.began, used = time.perf_counter(), time.process_time()
    runner.start_shape()
    while runner.shape_greenlet is not None and not runner.shape_greenlet.ready():
        gevent.sleep(0.05)
    runner.quit()
    if errors:  # Locust would only log it, and try again
        raise errors[0]
    for _ in range(load.trace.sent - len(load.trace.answers) - load.trace.failed):
        load.trace.fail("no answer by the end")
    load.trace.generator_cpu_seconds = time.process_time() - used
    steps = sum(step.seconds for step in load.trace.steps)
    load.trace.seconds = steps or max(load.last_end - load.began, 0.0)
    return load.trace


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is a file
    run(Job.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
