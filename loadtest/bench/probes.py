"""What an orchestrator and a scraper meet while a cell runs: how long probes and /metrics take to answer."""

import http.client
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from urllib.parse import urlsplit

PATHS = ("/healthz", "/readyz")
METRICS = "/metrics"
_INTERVAL_SECONDS = 0.1
_SCRAPE_SECONDS = 2.0
_TIMEOUT_SECONDS = 10.0


@dataclass
class Probes:
    """How many milliseconds each answer took, by path, and what was wrong with those that were not a 200."""

    milliseconds: list[tuple[str, float]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def slowest(self) -> float | None:
        return max((milliseconds for _, milliseconds in self.milliseconds), default=None)


@contextmanager
def asked(url: str) -> Iterator[Probes]:
    """Asks while the block runs, each time on a connection of its own, as orchestrators do; and once at its start."""
    probes, done = Probes(), Event()

    def ask_all() -> None:
        scraped, turn = -_SCRAPE_SECONDS, 0
        while True:
            if time.monotonic() - scraped >= _SCRAPE_SECONDS:
                scraped, path = time.monotonic(), METRICS
            else:
                turn, path = turn + 1, PATHS[turn % len(PATHS)]
            _ask(url, path, probes)
            if done.wait(_INTERVAL_SECONDS):
                return

    thread = Thread(target=ask_all, name="probes")
    thread.start()
    try:
        yield probes
    finally:
        done.set()
        thread.join()


def _ask(url: str, path: str, probes: Probes) -> None:
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
    probes.milliseconds.append((path, 1000 * (time.perf_counter() - began)))
    if wrong:
        probes.failures[f"{path}: {wrong}"] += 1
