"""What the load generator saw, request by request, so that percentiles come from every response time, not buckets."""

from collections.abc import Sequence
from dataclasses import dataclass, field

_DISTINCT_FAILURES = 20
"""So many reasons are told apart; the rest is counted together, as a reason may hold text that varies."""


@dataclass
class Recording:
    """One run of load; `milliseconds` are the latencies of answered requests alone."""

    milliseconds: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    generator_cpu_seconds: float = 0.0
    generator_wall_seconds: float = 0.0

    def fail(self, reason: str) -> None:
        count_failure(self.failures, reason)

    @property
    def generator_cores(self) -> float:
        """CPU cores that the load generator kept busy; it has one thread, so at 1 it can send no faster."""
        return self.generator_cpu_seconds / self.generator_wall_seconds if self.generator_wall_seconds else 0.0


def count_failure(failures: dict[str, int], reason: str) -> None:
    """One more of this reason, or of "other reasons" when too many are told apart already."""
    known = reason in failures or len(failures) < _DISTINCT_FAILURES
    reason = reason if known else "other reasons"
    failures[reason] = failures.get(reason, 0) + 1


def percentiles(values: Sequence[float], percents: Sequence[float]) -> list[float]:
    """For each percent the smallest of the values that at least so many of them do not exceed: nearest rank.

    Percents from 0.1 to 100, to a tenth: reckoned in whole tenths, so that no rounding moves the rank.
    """
    ordered = sorted(values)
    return [ordered[-(-round(10 * percent) * len(ordered) // 1000) - 1] for percent in percents]


def latencies(milliseconds: Sequence[float], percents: Sequence[float], prefix: str = "") -> dict[str, float]:
    """`p50_ms` and so on: those of the percents for which there are answers enough."""
    known = [percent for percent in percents if has_enough(percent, len(milliseconds))]
    found = percentiles(milliseconds, known)
    return {f"{prefix}p{percent:g}_ms": value for percent, value in zip(known, found, strict=True)}


def has_enough(percent: float, values: int) -> bool:
    """Whether so many values tell this percentile: at least one lies beyond it, else it would be the largest."""
    return values * (1000 - round(10 * percent)) >= 1000
