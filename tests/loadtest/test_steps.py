"""The search for the knee, against services that are a formula."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.options import Options
from loadtest.recording import percentiles
from loadtest.schedule import arrivals, stages
from loadtest.steps import GROWTH, MOST_STEPS, PRECISION, TRIES, Step, knee, limiting, next_rate, step_seconds

LEVEL = 100.0


def a_step(rate: float, p99: float | None = 50.0, **changed) -> Step:
    held = Step(rate, 3.0, 300, 0, 10.0, p99, 2.0, 0.3)
    return replace(held, **changed)


def search(breaks_at: float, *, start: float, most: float = 1e9) -> list[Step]:
    """All steps on a service that keeps the level below a rate and breaks it from there on."""
    steps: list[Step] = []
    while (rate := next_rate(steps, start=start, level_ms=LEVEL, most=most)) is not None:
        steps.append(a_step(rate, 50.0 if rate < breaks_at else 400.0))
    return steps


@given(st.floats(5, 20_000), st.floats(2, 2000))
def test_the_knee_is_found_from_any_start(breaks_at: float, start: float) -> None:
    steps = search(breaks_at, start=start)
    found = knee(steps, LEVEL)
    if len(steps) < MOST_STEPS:
        assert found is not None
        assert breaks_at / PRECISION / 1.0001 <= found < breaks_at
    assert len(steps) <= MOST_STEPS
    if 0.3 < start / breaks_at < 3:
        assert len(steps) < 20


@pytest.mark.parametrize("level_ms", [100, 1000])
def test_a_rate_beyond_the_capacity_does_not_hold_however_patient_the_service_level(level_ms: float) -> None:
    """On a service that answers 100 requests/s, one every 10 ms: what waits at the end of a step has to break it."""
    (load,) = Options(shape="step", arrivals="constant", service_level_ms=level_ms).loads()
    steps: list[Step] = []
    while (rate := next_rate(steps, start=50, level_ms=level_ms, most=1e9)) is not None:
        due = arrivals(stages("steady", rate, step_seconds(rate, load.seconds)), poisson=False, seed=1)
        free, waited = 0.0, []
        for moment in due:
            free = max(free, moment) + 0.01
            waited.append(1000 * (free - moment))
        steps.append(a_step(rate, percentiles(waited, [99])[0]))
    assert knee(steps, level_ms) == pytest.approx(100, rel=0.1)


def test_a_search_from_half_the_capacity_takes_few_steps() -> None:
    assert len(search(1000, start=500)) <= 11


def test_one_hiccup_ends_no_search() -> None:
    steps = [a_step(100), a_step(130, 400.0)]
    assert next_rate(steps, start=100, level_ms=LEVEL, most=1e9) == 130
    steps.append(a_step(130))
    assert knee(steps, LEVEL) == 130
    assert next_rate(steps, start=100, level_ms=LEVEL, most=1e9) == pytest.approx(130 * GROWTH)


def test_a_rate_that_broke_twice_is_believed_and_halved_towards() -> None:
    steps = [a_step(100), *[a_step(130, 400.0)] * TRIES]
    assert next_rate(steps, start=100, level_ms=LEVEL, most=1e9) == pytest.approx((100 * 130) ** 0.5)


def test_a_service_that_keeps_the_level_at_no_rate_ends_the_search() -> None:
    steps = search(0.0, start=10)
    assert knee(steps, LEVEL) is None
    assert min(step.rate for step in steps) >= 1


def test_errors_and_silence_break_the_level_as_slowness_does() -> None:
    assert a_step(10).holds(LEVEL)
    assert not a_step(10, failed=1).holds(LEVEL)
    assert not a_step(10, None, answered=0).holds(LEVEL)
    assert not a_step(10, LEVEL).holds(LEVEL)


def test_no_rate_above_the_highest_allowed_is_tried_and_the_knee_is_then_unknown() -> None:
    steps = search(1000, start=100, most=150)
    assert [step.rate for step in steps] == [100, 130, 150]
    assert limiting(steps, LEVEL) == steps[-1]


def test_who_broke_the_level_is_told() -> None:
    held = a_step(100)
    assert limiting([held, a_step(130, 400.0, generator_cores=0.5, late_p99_ms=20.0)], LEVEL) is None
    busy = a_step(130, 400.0, generator_cores=0.95)
    assert limiting([held, busy], LEVEL) == busy
    late = a_step(130, 400.0, late_p99_ms=390.0)
    assert limiting([held, late], LEVEL) == late
    assert limiting([replace(held, late_p99_ms=8.0, p99_ms=9.0), a_step(130, 400.0)], LEVEL) is None


def test_slow_steps_last_until_they_mean_something() -> None:
    assert step_seconds(1000, 3) == 3
    assert step_seconds(25, 3) == 6
    assert step_seconds(1, 3) == 12
