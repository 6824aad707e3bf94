"""Percentiles from every response time, and what a recording counts."""

import random

import pytest

from loadtest.recording import Recording, latencies, percentiles


def test_percentiles_are_exact_by_nearest_rank() -> None:
    values = [float(value) for value in range(1, 201)]
    random.Random(0).shuffle(values)
    assert percentiles(values, (1, 50, 95, 99, 100)) == [2, 100, 190, 198, 200]
    assert percentiles([float(value) for value in range(1, 2001)], (99.9, 99.1)) == [1998, 1982]
    assert percentiles([7.25], (50, 99)) == [7.25, 7.25]
    assert percentiles([3.0, 1.0, 2.0], (50, 95)) == [2.0, 3.0]


@pytest.mark.parametrize("size", [1, 2, 19, 20, 21, 100, 101])
@pytest.mark.parametrize("percent", [1, 50, 95, 99])
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(size: int, percent: int) -> None:
    values = [random.Random(size).random() for _ in range(size)]
    (found,) = percentiles(values, [percent])
    at_most = sum(value <= found for value in values)
    below = sum(value < found for value in values)
    assert found in values
    assert 100 * below < percent * size <= 100 * at_most


PERCENTS = (50, 95, 99)


def test_a_percentile_of_few_is_left_out() -> None:
    known = [float(value) for value in range(99)]
    assert set(latencies(known, PERCENTS)) == {"p50_ms", "p95_ms"}
    assert set(latencies([*known, 99.0], PERCENTS, "short_")) == {"short_p50_ms", "short_p95_ms", "short_p99_ms"}
    assert latencies([], PERCENTS) == {}


def test_failures_are_counted_by_reason() -> None:
    recording = Recording(generator_cpu_seconds=1.5, generator_wall_seconds=2.0)
    recording.fail("HTTP 429 queue_full")
    recording.fail("HTTP 429 queue_full")
    assert recording.failures == {"HTTP 429 queue_full": 2}
    assert (recording.generator_cores, Recording().generator_cores) == (0.75, 0)


def test_reasons_that_never_repeat_do_not_pile_up() -> None:
    recording = Recording()
    for number in range(1000):
        recording.fail(f"reason {number}")
    assert len(recording.failures) == 21
    assert sum(recording.failures.values()) == 1000
