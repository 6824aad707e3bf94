"""What an orchestrator and a scraper meet while a cell runs: how long probes and /metrics take to answer."""

import http.client
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

from loadtest import target
from loadtest.bench.workers import SOURCE
from loadtest.errors import LoadTestError

PATHS = ("/healthz", "/readyz")
METRICS = "/metrics"
_INTERVAL_SECONDS = 0.1
_SCRAPE_SECONDS = 2.0
_TIMEOUT_SECONDS = 10.0
_IDLE = "loadtest.bench.idle"


@dataclass
class Probes:
    """How many milliseconds each answer took, by path, and what was wrong with those that were not a 200.

    `idle` is the same of a server with nothing to do, asked in the same moments: the machine's part in it.
    """

    milliseconds: list[tuple[str, float]] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def slowest(self) -> dict[str, float]:
        """By what was asked, as the figures name it; empty where nothing was."""
        if not self.milliseconds:
            return {}
        return {"slowest_probe_ms": max(took for _, took in self.milliseconds), "slowest_idle_ms": max(self.idle)}


@contextmanager
def asked(url: str, log: Path) -> Iterator[Probes]:
    """Asks while the block runs, each time on a connection of its own, as orchestrators do; and once at its start."""
    probes, done = Probes(), Event()

    def ask_all(idle: str, beside: Executor) -> None:
        scraped, turn = -_SCRAPE_SECONDS, 0
        while True:
            asked_idle = beside.submit(_ask, idle, "/")
            if time.monotonic() - scraped >= _SCRAPE_SECONDS:
                scraped, path = time.monotonic(), METRICS
            else:
                turn, path = turn + 1, PATHS[turn % len(PATHS)]
            milliseconds, wrong = _ask(url, path)
            probes.milliseconds.append((path, milliseconds))
            if wrong:
                probes.failures[f"{path}: {wrong}"] += 1
            probes.idle.append(asked_idle.result()[0])
            if done.wait(_INTERVAL_SECONDS):
                return

    with _idle_server(log) as idle, ThreadPoolExecutor(1, "idle") as beside:
        thread = Thread(target=ask_all, args=(idle, beside), name="probes")
        thread.start()
        try:
            yield probes
        finally:
            done.set()
            thread.join()


@contextmanager
def _idle_server(log: Path) -> Iterator[str]:
    with target.child([sys.executable, "-m", _IDLE], log, SOURCE, piped=True) as process:
        assert process.stdin
        assert process.stdout
        with process.stdin, process.stdout:
            if not (port := process.stdout.readline()):
                raise LoadTestError(f"{_IDLE} did not start{target.tail(log)}")
            yield f"http://127.0.0.1:{int(port)}"


def _ask(url: str, path: str) -> tuple[float, str | None]:
    """Milliseconds, and what is wrong with the answer."""
    began = time.perf_counter()
    wrong = None
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_SECONDS)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status != http.HTTPStatus.OK:
                wrong = f"HTTP {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            wrong = str(error) or type(error).__name__
    return 1000 * (time.perf_counter() - began), wrong
