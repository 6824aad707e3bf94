"""The real service: `python -m service` as a process of its own, with two processes under it, and asked over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import DIRECTORY
from service.settings import PREFIX
from tests.service.fakes import wait_until

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300.0  # at most, for each command and answer; a busy machine takes two minutes for an export

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""(name, labels) -> value"""


def environment(settings: Mapping[str, str | Path]) -> dict[str, str]:
    """This environment, with these settings of the service and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    kept["OMP_NUM_THREADS"] = "1"  # so little training is slower shared out
    return kept | {PREFIX + name.upper(): str(value) for name, value in settings.items()}


@dataclass
class Process:
    """`python -m service`, ready."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def classify(self, text: str) -> tuple[int, str]:
        return self.ask("POST", "/classify", {"inputs": text})

    def metrics(self) -> Samples:
        return samples(self.ask("GET", "/metrics")[1])

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def metrics_directory(self) -> Path:
        return Path(self.workers()[0].environ()[DIRECTORY])

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]


@contextmanager
def serving(log: Path, **settings: str | Path) -> Iterator[Process]:
    """The service, ready, with two processes unless told otherwise; nothing of it outlives the block."""
    defaults: dict[str, str | Path] = {"port": "0", "processes": "2"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env=environment(defaults | settings), stdout=file
        )
    served = Process(process, 0, log)
    try:
        wait_until(lambda: find_port(served) or process.poll() is not None, SECONDS)
        wait_until(lambda: served.ask("GET", "/readyz")[0] == 200, SECONDS)
        yield served
    finally:
        end(served)


def end(served: Process) -> None:
    """Kill all of it at once, and tidy up what it then cannot."""
    workers = served.workers() if served.process.poll() is None else []
    directory = served.metrics_directory() if workers else None
    served.process.kill()
    served.process.wait(SECONDS)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    if directory is not None:
        psutil.wait_procs(workers, SECONDS)
        shutil.rmtree(directory, ignore_errors=True)


def find_port(served: Process) -> bool:
    served.port = next((line["port"] for line in served.log_lines() if line["event"] == "listening"), 0)
    return served.port > 0


def samples(exposition: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }
