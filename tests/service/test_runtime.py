"""The phases of the process: what may end when, and what counts as being in flight."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from service.errors import Draining, QueueFull, Starting
from service.runtime import LINGER_SECONDS, LONGEST_BODIES, Runtime
from tests.service.fakes import fake_app, running


def test_nothing_is_admitted_before_the_models_are_there() -> None:
    runtime: Runtime = fake_app().app.state.runtime
    with pytest.raises(Starting), runtime.admitted():
        pass


def test_a_probe_waits_for_the_other_processes_and_requests_do_not() -> None:
    fake = fake_app()
    runtime: Runtime = fake.app.state.runtime
    with running(fake) as client:
        runtime.others_ready = False
        for path in ("/readyz", "/v2/health/ready"):
            assert client.get(path).status_code == 503
        assert client.get("/healthz").status_code == 200
        assert client.post("/classify", json={"inputs": "a"}).status_code == 200
        runtime.others_ready = True
        assert client.get("/readyz").status_code == 200


def test_a_drain_ends_a_little_after_the_last_answer() -> None:
    fake = fake_app(drain_seconds=100)
    runtime: Runtime = fake.app.state.runtime
    with running(fake):
        with runtime.admitted():
            runtime.drain()
            began = time.monotonic()
            assert not runtime.drained(began + LINGER_SECONDS + 1)
            assert runtime.drained(began + 101)
        ended = time.monotonic()
        assert not runtime.drained(ended)
        assert runtime.drained(ended + LINGER_SECONDS)
        with pytest.raises(Draining), runtime.admitted():
            pass


def test_a_drain_may_begin_later_and_the_earliest_beginning_counts() -> None:
    fake = fake_app(drain_delay_seconds=100, drain_seconds=50)
    runtime: Runtime = fake.app.state.runtime
    with running(fake):
        began = time.monotonic()
        runtime.leave()
        for check in (runtime.check_alive, runtime.check_open):
            check()
        with pytest.raises(Draining):
            runtime.check_ready()
        with runtime.admitted():
            assert not runtime.drained(began + 100 + LINGER_SECONDS)
            assert runtime.drained(time.monotonic() + 150)
        assert not runtime.drained(began + 99)
        assert runtime.drained(time.monotonic() + 100 + LINGER_SECONDS)
        runtime.drain()
        runtime.leave()
        assert runtime.drained(time.monotonic() + LINGER_SECONDS)


def test_what_is_still_starting_drains_at_once() -> None:
    runtime: Runtime = fake_app(drain_delay_seconds=100).app.state.runtime
    runtime.leave()
    assert runtime.drained(time.monotonic() + LINGER_SECONDS)


def test_it_is_idle_from_the_last_answer_on() -> None:
    fake = fake_app()
    runtime: Runtime = fake.app.state.runtime
    with running(fake), ExitStack() as accepted:
        for _ in range(2):
            accepted.enter_context(runtime.admitted())
        assert runtime.idle_seconds(time.monotonic() + 100) == 0
        accepted.close()
        assert 99 < runtime.idle_seconds(time.monotonic() + 100) <= 101


def test_a_process_that_was_not_told_to_end_never_does() -> None:
    assert not fake_app().app.state.runtime.drained(time.monotonic() + 1e9)


def test_no_more_requests_are_taken_in_than_the_queues_have_places() -> None:
    fake = fake_app(max_queue=1, max_inputs=1)
    runtime: Runtime = fake.app.state.runtime
    with running(fake), ExitStack() as accepted:
        for _ in runtime.serving.models:
            accepted.enter_context(runtime.admitted())
        with pytest.raises(QueueFull):
            accepted.enter_context(runtime.admitted())


def test_what_has_come_of_all_bodies_together_is_bounded() -> None:
    fake = fake_app(max_body_bytes=1024)
    runtime: Runtime = fake.app.state.runtime
    with running(fake), ExitStack() as accepted:
        for _ in range(2 * LONGEST_BODIES):
            accepted.enter_context(runtime.admitted())(512)
        last = accepted.enter_context(runtime.admitted())
        with pytest.raises(QueueFull):
            last(1)
        accepted.close()
        with runtime.admitted() as take_in:
            take_in(1024)
