"""The service under test: started and stopped as a process of its own, and asked over HTTP."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loadtest.errors import LoadTestError
from loadtest.options import KEY_NAME, Options

_OPENER = build_opener(ProxyHandler({}))  # a proxy from the environment would be measured too
_HTTP_SECONDS = 10.0
_WARM_THREADS = 32
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL, for a child that is ended before its time."""


def request_headers() -> dict[str, str]:
    """What every request carries: the API key too, when the environment has one."""
    key = os.environ.get(KEY_NAME, "")
    return {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})


@dataclass(frozen=True)
class Metrics:
    """One scrape of /metrics."""

    samples: Sequence[Sample]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of the samples of this name that carry these labels; None without any."""
        values = [sample.value for sample in self.samples if sample.name == name and _carries(sample, labels)]
        return sum(values) if values else None

    def labels(self, name: str, **labels: str) -> dict[str, str]:
        """All labels of the first such sample that is not 0, as what a reload has replaced is; empty without any."""
        named = (sample for sample in self.samples if sample.name == name and sample.value)
        found = (sample.labels for sample in named if _carries(sample, labels))
        return next(found, {})


def _carries(sample: Sample, labels: dict[str, str]) -> bool:
    return labels.items() <= sample.labels.items()


def scrape(url: str) -> Metrics | None:
    """What /metrics says now; None when it does not say it in time."""
    try:
        with _OPENER.open(f"{url}/metrics", timeout=_HTTP_SECONDS) as answer:
            text = answer.read().decode()
        return Metrics([sample for family in text_string_to_metric_families(text) for sample in family.samples])
    except (OSError, HTTPException, ValueError):
        return None


def models(url: str) -> list[dict[str, Any]]:
    """What /models says of each loaded model; LoadTestError when it does not say it."""
    try:
        with _OPENER.open(Request(f"{url}/models", headers=request_headers()), timeout=_HTTP_SECONDS) as answer:
            loaded: list[dict[str, Any]] = json.load(answer)["models"]
    except HTTPError as error:
        hint = f": set {KEY_NAME} to one of its API keys" if error.code == 401 else ""
        raise LoadTestError(f"{url}/models answered {error.code}{hint}") from error
    except (OSError, HTTPException, ValueError, LookupError) as error:
        raise LoadTestError(f"{url}/models did not answer: {error}") from error
    return loaded


def is_ready(url: str) -> bool:
    """Whether /readyz says yes."""
    try:
        with _OPENER.open(f"{url}/readyz", timeout=_HTTP_SECONDS):
            return True
    except (OSError, HTTPException):
        return False


def wait_ready(
    url: str, seconds: float, process: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    """Returns once /readyz says yes; LoadTestError when the time is up, or the process ended before."""
    deadline = time.monotonic() + seconds
    while not is_ready(url):
        if process and process.poll() is not None:
            raise LoadTestError(f"the service ended with status {process.returncode} at its start{tail(log)}")
        if time.monotonic() > deadline:
            raise LoadTestError(f"{url}/readyz did not say yes within {seconds:g} s{tail(log)}")
        time.sleep(0.05)


def warm_up(url: str, bodies: Sequence[bytes], *, users: int, seconds: float) -> None:
    """Sends requests for so long. The first must be answered, else LoadTestError; the others only bring warmth."""
    _classify(url, bodies[0])
    deadline = time.monotonic() + seconds
    threads = min(users, _WARM_THREADS)

    def keep_sending(offset: int) -> None:
        for body in islice(cycle(bodies), offset, None):
            if time.monotonic() > deadline:
                return
            with suppress(LoadTestError):
                _classify(url, body)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(keep_sending, range(threads)))


def _classify(url: str, body: bytes) -> None:
    try:
        request = Request(f"{url}/classify", data=body, headers=request_headers())
        with _OPENER.open(request, timeout=_HTTP_SECONDS) as answer:
            answer.read()
    except HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise LoadTestError(f"{url}/classify answered {error.code}: {said}") from error
    except (URLError, OSError, HTTPException) as error:
        raise LoadTestError(f"{url}/classify did not answer: {error}") from error


@contextmanager
def child(
    command: Sequence[str], log: Path, environment: Mapping[str, str], *, piped: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that never outlives the block, whatever ends it; both its outputs go to the log.

    With `piped`, its input and its standard output are ours instead. It gets a session of its own, so that Ctrl-C
    reaches us alone and we end it in order.
    """
    process = None
    try:
        with log.open("wb") as output, _uninterrupted():
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output,
                env=os.environ | dict(environment),
                start_new_session=True,
            )
        yield process
    finally:
        if process:
            with _uninterrupted():
                _end(process)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block is done: raised inside it, they would leave a process behind."""
    held: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


@contextmanager
def service(
    architecture: str, options: Options, log: Path, settings: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The service with this architecture alone, ready, on a free loopback port: its URL and its process.

    `settings` are further ones, by the names of their environment variables.
    """
    port = free_port()
    environment = {
        "REFRAIN_ARCHITECTURES": architecture,
        "REFRAIN_ROUTING": f"fixed:{architecture}",  # one inherited that names both would not start
        "REFRAIN_HOST": "127.0.0.1",
        "REFRAIN_PORT": str(port),
        "REFRAIN_LOG_LEVEL": options.log_level,
    } | dict(settings or {})
    url = f"http://127.0.0.1:{port}"
    with child([options.service_python, "-m", "service"], log, environment) as process:
        wait_ready(url, options.ready_timeout, process, log)
        yield url, process


def stop(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Asks the process to end with SIGTERM; its exit status, None when it still ran after so many seconds."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def stop_fault(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """Stops the process as `stop` does; what was wrong with how it ended, None when nothing was."""
    status = stop(process, seconds)
    if status is None:
        return f"the service still ran {seconds:g} s after SIGTERM"
    return f"the service ended with status {status} on SIGTERM, not 0" if status else None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        stop(process, GRACE_SECONDS)
    with suppress(ProcessLookupError):  # the usual case: nothing of its session is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(GRACE_SECONDS)


def free_port() -> int:
    """A loopback port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def tail(log: Path | None) -> str:
    """The last lines of a log as the end of an error's text; nothing without a log or lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:] if log else []
    return "\n  " + "\n  ".join(lines) if lines else ""
