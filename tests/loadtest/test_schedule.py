"""Arrivals and levels: any shape has the rate that it says, the same for the same seed."""

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loadtest.schedule import Stage, arrivals, level_at, stages

SHAPES = st.sampled_from(["steady", "ramp", "spike", "step"])
RATES = st.floats(1, 500)
SECONDS = st.floats(0.5, 20)


@given(SHAPES, RATES, SECONDS, st.booleans(), st.integers())
def test_arrivals_rise_and_lie_within_the_shape(shape, rate, seconds, poisson, seed) -> None:
    times = arrivals(stages(shape, rate, seconds), poisson=poisson, seed=seed)
    assert times == sorted(times)
    assert all(0 <= time <= seconds * (1 + 1e-9) for time in times)
    assert times == arrivals(stages(shape, rate, seconds), poisson=poisson, seed=seed)


@given(st.lists(st.builds(Stage, st.floats(0.5, 9), st.floats(0, 90), st.floats(0.1, 90)), min_size=1, max_size=4))
@example([Stage(1, 0, 1), Stage(1, 0, 1)])  # one is due just when a stage begins that begins at nothing
def test_evenly_spaced_arrivals_follow_the_integral_of_the_level(shape) -> None:
    times = arrivals(shape, poisson=False, seed=0)
    assert abs(len(times) - sum(stage.area for stage in shape)) <= 0.5 + 1e-6
    began = 0.0
    for stage in shape:  # up to any moment, as many have arrived as the level adds up to
        half = sum(time < began + stage.seconds / 2 for time in times)
        before = sum(one.area for one in shape[: shape.index(stage)]) if shape.count(stage) == 1 else None
        if before is not None:
            expected = before + stage.seconds / 2 * (stage.begin + stage.level(stage.seconds / 2)) / 2
            assert abs(half - expected) <= 1
        began += stage.seconds


def test_random_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = arrivals(stages("steady", 200, 100), poisson=True, seed=3)
    assert len(times) == 20_000  # else a rate would be named that was not kept
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.05)
    assert times != arrivals(stages("steady", 200, 100), poisson=True, seed=4)


def test_shapes_are_what_their_names_say() -> None:
    assert [level_at(stages("steady", 80, 10), moment) for moment in (0, 9.9, 10)] == [80, 80, None]
    assert [level_at(stages("ramp", 80, 10), moment) for moment in (0, 5, 10)] == [8, 44, None]
    assert [level_at(stages("spike", 80, 10), moment) for moment in (0, 3.9, 4.1, 5.9, 6.1)] == [20, 20, 80, 80, 20]
