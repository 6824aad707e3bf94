"""The search for the knee: which rate to try next, given what the rates tried so far did; pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

GROWTH = 1.3
"""From one step to the next, until one breaks."""
PRECISION = 1.07
"""Where the lowest rate that broke over the highest that held is below this, the knee is known well enough."""
TRIES = 2
"""A rate is believed to break when it did so this often: one hiccup of the machine ends no search."""
LEAST_RATE = 1.0
MOST_STEPS = 30
ENOUGH = 150
"""Requests of a step, so that one slow one does not decide on its p99."""
GENERATOR_CORES = 0.9
"""Busy cores of the load generator's one thread from which on it, not the service, sets the pace."""
LATE_SHARE = 0.5
LATE_MS = 10.0


@dataclass(frozen=True)
class Step:
    """One step; rate in requests a second, `answered` counts requests. Latencies run from when a request was due.

    `late_p99_ms`: how long after it was due a request was sent, which is the generator's doing alone.
    """

    rate: float
    seconds: float
    answered: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    late_p99_ms: float | None
    generator_cores: float

    def holds(self, level_ms: float) -> bool:
        """Whether every request was answered, 99 of 100 within the service level."""
        return not self.failed and self.p99_ms is not None and self.p99_ms < level_ms

    @property
    def generator_limited(self) -> bool:
        return is_generator_limit(self.generator_cores, self.late_p99_ms, self.p99_ms)


def is_generator_limit(cores: float, late_p99_ms: float | None, p99_ms: float | None) -> bool:
    """Whether the load generator rather than the service set what was seen.

    It did when its one thread was busy nearly all the time, or when most of the latency was its own being late.
    """
    is_late = late_p99_ms is not None and p99_ms is not None and late_p99_ms > max(LATE_MS, LATE_SHARE * p99_ms)
    return cores >= GENERATOR_CORES or is_late


def knee(steps: Sequence[Step], level_ms: float) -> float | None:
    """The highest rate that held; None when none did."""
    return max((step.rate for step in steps if step.holds(level_ms)), default=None)


def next_rate(steps: Sequence[Step], *, start: float, level_ms: float, most: float) -> float | None:
    """The rate of the next step, `most` at most; None when the knee is known, or cannot be.

    Up by a factor until a rate breaks (down when the first one does), then halving between what held and what broke.
    """
    if not steps:
        return min(start, most)
    last, good = steps[-1], knee(steps, level_ms)
    if len(steps) >= MOST_STEPS:
        return None
    if not last.holds(level_ms) and sum(step.rate == last.rate for step in steps) < TRIES:
        return last.rate
    bad = min((step.rate for step in steps if not step.holds(level_ms) and step.rate > (good or 0.0)), default=None)
    if bad is None:
        return min(last.rate * GROWTH, most) if last.rate < most else None
    if good is None:
        return bad / GROWTH if bad / GROWTH >= LEAST_RATE else None
    return sqrt(good * bad) if bad / good > PRECISION else None


def step_seconds(rate: float, usual: float) -> float:
    """How long a step lasts: until a percentile means something, though no longer than four usual ones."""
    return min(max(usual, ENOUGH / rate), 4 * usual)


def limiting(steps: Sequence[Step], level_ms: float) -> Step | None:
    """The step by which the load generator made the knee look lower than it is; None when the service broke by itself.

    Where no step broke, the search ended at the highest rate it may try: then too the service's knee is not known.
    """
    good = knee(steps, level_ms) or 0.0
    above = [step for step in steps if step.rate > good]
    if not above:
        return steps[-1] if steps else None
    return next((step for step in above if step.generator_limited), None)
