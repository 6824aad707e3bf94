"""What the service costs the machine: CPU time and memory of its whole process tree."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from threading import Event, Thread

import psutil

_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Memory:
    """Bytes of a process tree. Of a shared page `rss` counts the whole for each process, `pss` each one's part."""

    rss: int = 0
    pss: int = 0

    def or_larger(self, other: "Memory") -> "Memory":
        """The larger of the two, each figure by itself."""
        return Memory(max(self.rss, other.rss), max(self.pss, other.pss))


def tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants; those that end meanwhile are left out."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> dict[int, float]:
    """CPU time so far of each process of the tree, by its id."""
    seconds = {}
    for process in tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system
    return seconds


def memory(pid: int) -> Memory:
    """Of the tree, now."""
    rss = pss = 0
    for process in tree(pid):
        try:
            info = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        rss, pss = rss + info.rss, pss + info.pss
    return Memory(rss, pss)


@dataclass
class Watch:
    """Memory over time: (seconds since the start, what it was)."""

    samples: list[tuple[float, Memory]] = field(default_factory=list)

    @property
    def peak(self) -> Memory:
        return reduce(Memory.or_larger, (sample for _, sample in self.samples), Memory())


@contextmanager
def watched(pid: int) -> Iterator[Watch]:
    """Samples the tree's memory while the block runs, and once more at its end."""
    watch, done, began = Watch(), Event(), time.monotonic()

    def sample() -> None:
        while True:
            watch.samples.append((time.monotonic() - began, memory(pid)))
            if done.wait(_SAMPLE_SECONDS):
                watch.samples.append((time.monotonic() - began, memory(pid)))
                return

    thread = Thread(target=sample, name="memory")
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()
