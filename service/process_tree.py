"""What the operating system says of the supervisor and its workers together, as Prometheus' usual process metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client import Metric, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

PIDS = "pids"
START = "process_start_time_seconds"  # the one that is no sum: the first process's
CPU = "process_cpu_seconds"
TRIES = 3


def write_pids(directory: Path, pids: Sequence[int]) -> None:
    """Say which processes count; the first is the parent of the others."""
    fresh = directory / f"{PIDS}.new"
    fresh.write_text(" ".join(map(str, pids)))
    fresh.replace(directory / PIDS)


class ProcessTree(Collector):
    """Memory, CPU time and open files, summed, and how much memory there may be.

    Memory that processes share counts once for each.
    """

    def __init__(self, directory: Path, memory_max: Path = Path("/sys/fs/cgroup/memory.max")) -> None:
        self._pids = directory / PIDS
        self._pid = ""
        self._one = ProcessCollector(pid=lambda: self._pid, registry=None)
        self._memory_max = memory_max

    def collect(self) -> Iterable[Metric]:
        """Sum over the processes that live, and take the CPU time of the dead from their parent, so it never falls."""
        for _ in range(TRIES):
            pids = self._pids.read_text().split()
            of_the_dead = _reaped_seconds(pids[0])
            summed = _sum([self._metrics(pid) for pid in pids])
            if _reaped_seconds(pids[0]) == of_the_dead:  # else one died meanwhile, and might count twice or not at all
                break
        for metric in summed:
            if metric.name == CPU:
                metric.samples = [sample._replace(value=sample.value + of_the_dead) for sample in metric.samples]
        return [*summed, *self._memory_limit()]

    def _memory_limit(self) -> list[Metric]:
        try:
            limit = int(self._memory_max.read_text())
        except (OSError, ValueError):  # no control groups here, or the limit is "max"
            return []
        return [GaugeMetricFamily("refrain_memory_limit_bytes", "Memory that all processes may take together.", limit)]

    def _metrics(self, pid: str) -> list[Metric]:
        self._pid = pid
        return list(self._one.collect())  # empty for one that is gone


def _sum(processes: Sequence[Sequence[Metric]]) -> list[Metric]:
    totals: dict[str, Metric] = {}
    for metrics in processes:
        for metric in metrics:
            known = totals.setdefault(metric.name, metric)
            if known is not metric and metric.name != START:
                value = known.samples[0].value + metric.samples[0].value
                known.samples = [known.samples[0]._replace(value=value)]
    return list(totals.values())


def _reaped_seconds(pid: str) -> float:
    """CPU time of a process's children that have ended and were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
