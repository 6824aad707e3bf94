"""When requests are due, or how many users there are, decided beforehand: pure functions of shape and seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

Shape = Literal["steady", "ramp", "spike", "step"]
SPIKE_BASE = 0.25
"""Of a spike's height: what comes before and after it."""
SPIKE_SHARE = 0.2
"""Of the time, in its middle, that a spike takes."""
RAMP_BASE = 0.1
"""Of a ramp's height: where it begins."""


@dataclass(frozen=True)
class Stage:
    """So many seconds in which the level (requests a second, or users) goes straight from `begin` to `end`."""

    seconds: float
    begin: float
    end: float

    def level(self, seconds: float) -> float:
        return self.begin + (self.end - self.begin) * seconds / self.seconds

    @property
    def area(self) -> float:
        """Arrivals expected in the whole stage, where the level is their rate."""
        return self.seconds * (self.begin + self.end) / 2

    def when(self, area: float) -> float:
        """The seconds after which so much of the area is behind: the inverse of its integral, by the stable formula."""
        slope = (self.end - self.begin) / self.seconds
        return 2 * area / (self.begin + sqrt(max(self.begin**2 + 2 * slope * area, 0.0))) if area else 0.0


def stages(shape: Shape, level: float, seconds: float) -> list[Stage]:
    """The shape at this height. Each step of `step` is steady in itself: loadtest.steps decides on its height."""
    if shape == "ramp":
        return [Stage(seconds, RAMP_BASE * level, level)]
    if shape == "spike":
        base, aside = SPIKE_BASE * level, seconds * (1 - SPIKE_SHARE) / 2
        return [Stage(aside, base, base), Stage(seconds * SPIKE_SHARE, level, level), Stage(aside, base, base)]
    return [Stage(seconds, level, level)]


def level_at(shape: Sequence[Stage], seconds: float) -> float | None:
    """The level after so many seconds; None when the shape is over."""
    for stage in shape:
        if seconds < stage.seconds:
            return stage.level(seconds)
        seconds -= stage.seconds
    return None


def arrivals(shape: Sequence[Stage], *, poisson: bool, seed: int | str) -> list[float]:
    """Rising times in seconds at which requests are due, at least 0 and below the shape's length.

    As many as the shape's integral says, random or evenly spaced on it, are mapped through its inverse, which gives any
    shape its own rate exactly: of a Poisson process, given how many arrive, each arrival is uniform by itself.
    """
    whole = sum(stage.area for stage in shape)
    many, rng = round(whole), random.Random(seed)
    areas = sorted(rng.uniform(0, whole) for _ in range(many)) if poisson else [n + 0.5 for n in range(many)]
    times, began, passed, due = [], 0.0, 0.0, 0
    for stage in shape:
        while due < many and areas[due] - passed < stage.area:
            times.append(began + stage.when(areas[due] - passed))
            due += 1
        began, passed = began + stage.seconds, passed + stage.area
    return times
