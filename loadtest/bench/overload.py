"""Open arrivals of single texts at twice what the service can do: what it still answers, and what it costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from loadtest.bench import cells
from loadtest.bench.cells import Seen
from loadtest.bench.options import BenchOptions, ModeName
from loadtest.bench.processes import Memory
from loadtest.bench.subject import Target
from loadtest.errors import LoadTestError

TIMES_CAPACITY = 2.0
_CONNECTIONS = 64
"""Enough to keep every process busy."""
_TURNED_AWAY = "HTTP 429"


@dataclass(frozen=True)
class Overload:
    """Rates are requests a second; `capacity` is that of a closed loop just before and just after."""

    mode: ModeName
    seconds: float
    capacity_before: float
    capacity_after: float
    arrivals_per_second: float
    sent: int
    answered: int
    late: int
    """Answers that came when the measured time was over, and do not count as goodput."""
    turned_away: int
    unexpected: dict[str, int]
    """Every other way that a request ended: errors, wrong answers, none at all."""
    failures_beside: dict[str, int]
    """Of requests and probes while the capacity was measured, where none may fail."""
    probe_failures: dict[str, int]
    figures: dict[str, float]
    per_second: list[int]
    memory: list[tuple[float, Memory]]

    @property
    def lost(self) -> int:
        """Requests of which nothing is known: none, unless the load generator is wrong."""
        return self.sent - self.answered - self.late - self.turned_away - sum(self.unexpected.values())

    @property
    def goodput(self) -> float:
        return self.answered / self.seconds

    @property
    def of_capacity(self) -> float:
        return self.goodput / fmean([self.capacity_before, self.capacity_after])

    @property
    def memory_growth(self) -> float:
        """PSS in the last tenth over that in the tenth after the first fifth, which is left for warming up."""
        return growth([(moment, memory.pss) for moment, memory in self.memory])


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """Median of the last tenth of the time over the median of the tenth after its first fifth."""
    last = samples[-1][0]
    early = [value for moment, value in samples if 0.2 * last <= moment <= 0.3 * last]
    late = [value for moment, value in samples if moment >= 0.9 * last]
    return median(late) / median(early) if early and late and median(early) else 1.0


def measure(mode: ModeName, subject: Target, options: BenchOptions, folder: Path) -> Overload:
    """Capacity, overload, capacity again; a closed loop of so many connections that all batches are full."""
    threshold = cells.threshold(mode, subject, options)
    closed = cells.traffic(subject, subject.short, max(_CONNECTIONS, *options.connections), 1, threshold)
    seconds = max(options.seconds, options.overload / 20)
    before = cells.drive(subject, [closed], options, folder / "capacity-before", seconds=seconds, resting=True)
    if not before.answered:
        raise LoadTestError(f"no request was answered rightly before it: {before.failures}")
    arrivals = TIMES_CAPACITY * _rate(before)
    seen = cells.drive(
        subject,
        [closed],
        options,
        folder / "overload",
        seconds=options.overload,
        arrivals_per_second=arrivals,
    )
    after = cells.drive(subject, [closed], options, folder / "capacity-after", seconds=seconds, resting=True)
    return judged(mode, before, after, arrivals, seen)


def judged(mode: ModeName, before: Seen, after: Seen, arrivals: float, seen: Seen) -> Overload:
    failures = seen.failures
    refused = {reason: count for reason, count in failures.items() if reason.startswith(_TURNED_AWAY)}
    return Overload(
        mode=mode,
        seconds=seen.seconds,
        capacity_before=_rate(before),
        capacity_after=_rate(after),
        arrivals_per_second=arrivals,
        sent=seen.sent,
        answered=seen.answered,
        late=seen.late,
        turned_away=sum(refused.values()),
        unexpected={reason: count for reason, count in failures.items() if reason not in refused},
        failures_beside=_together(before.failures, before.probes.failures, after.failures, after.probes.failures),
        probe_failures=dict(seen.probes.failures),
        figures=cells.load_figures(seen, 1),
        per_second=seen.per_second,
        memory=seen.memory,
    )


def _together(*failures: Mapping[str, int]) -> dict[str, int]:
    return dict(sum(map(Counter, failures), Counter[str]()))


def _rate(seen: Seen) -> float:
    return seen.answered / seen.seconds
