"""The real Prometheus scrapes the real service under a short load: every rule and every panel has something to show."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.dashboard import ROOT, Query, queries
from tests.service.fakes import wait_until
from tests.serving import Process, serving

pytestmark = pytest.mark.deploy

CONFIGURATION = ROOT / "monitoring/prometheus"
EVERY = "2s"  # scraped and evaluated
STEP = "20s"  # rates are taken over
SECONDS = 120.0
SHADOW, CASCADE = "shadow:recurrent,baseline=1", "cascade:recurrent,baseline=0.99"
MAY_STAY_EMPTY = ("refrain_memory_limit_bytes",)
"""A machine may set no limit."""

TEXT = "the film is wonderful"
REQUESTS: list[dict[str, Any]] = [
    {"inputs": TEXT},  # as the policy has it
    {"inputs": [TEXT, "a dreadful , dreadful story ! " * 3], "architecture": "recurrent", "exit_threshold": 0.5},
    {"inputs": [TEXT] * 20, "architecture": "baseline"},
    {"inputs": [TEXT * 5] * 200, "architecture": "recurrent", "max_iterations": 16, "deadline_ms": 1},
    {"inputs": []},
]


class Prometheus:
    """A server on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, **parameters: str) -> Any:
        """What the interface of that name answers."""
        url = f"http://127.0.0.1:{self.port}/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def ready(self) -> bool:
        """Whether it answers."""
        with suppress(OSError):
            return bool(self.ask("api/v1/query", query="vector(1)"))
        return False

    def shows(self, expression: str) -> bool:
        """Whether there is a value, and not only what comes of 0 / 0."""
        return any(series["value"][1] != "NaN" for series in self.ask("api/v1/query", query=expression)["result"])

    def rules(self) -> list[dict[str, Any]]:
        """What it made of each rule."""
        return [rule for group in self.ask("api/v1/rules")["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def prometheus(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scraping two services of two processes each, one with a shadow and one that cascades, while they are asked."""
    if not (program := shutil.which("prometheus")):
        pytest.skip("Prometheus is not installed: Debian has it in the package prometheus")
    directory = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        services = [
            stack.enter_context(serving(directory / f"log-{number}", models_dir=models_dir, routing=routing))
            for number, routing in enumerate([SHADOW, CASCADE])
        ]
        config = write_config(directory, [f"127.0.0.1:{service.port}" for service in services])
        server = stack.enter_context(running(program, config))
        stack.enter_context(asked(services))
        yield server


def write_config(directory: Path, targets: list[str]) -> Path:
    """The configuration and rules that are deployed, but for whom it scrapes and that nothing takes minutes."""
    config = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": EVERY, "scrape_timeout": EVERY, "evaluation_interval": EVERY}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "refrain"]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    (directory / "rules").mkdir()
    for file in (CONFIGURATION / "rules").glob("*.yml"):
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
        (directory / "rules" / file.name).write_text(yaml.safe_dump(rules))
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running(program: str, config: Path) -> Iterator[Prometheus]:
    server = Prometheus(free_port())
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={config.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{server.port}",
    ]
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: server.ready() or process.poll() is not None, SECONDS)
        assert process.poll() is None, (config.parent / "log").read_text()
        yield server
    finally:
        process.kill()
        process.wait(SECONDS)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def asked(services: list[Process]) -> Iterator[None]:
    """Each service is sent one request after another, with pauses in which a shadow may run."""
    stop = threading.Event()

    def ask(service: Process) -> None:
        for body in itertools.cycle(REQUESTS):
            if stop.wait(0.05):
                return
            with suppress(OSError):
                service.ask("POST", "/classify", body)

    threads = [threading.Thread(target=ask, args=(service,), daemon=True) for service in services]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)


def silent(prometheus: Prometheus, expressions: list[str]) -> list[str]:
    """Those that show nothing although they were given time."""
    waiting = expressions
    until = time.monotonic() + SECONDS
    while (waiting := [one for one in waiting if not prometheus.shows(one)]) and time.monotonic() < until:
        time.sleep(1)
    return waiting


def asks_for_more(expression: str) -> bool:
    return not expression.startswith(MAY_STAY_EMPTY)


def test_every_target_is_up(prometheus: Prometheus) -> None:
    wait_until(lambda: prometheus.shows('sum(up{job="refrain"}) == 2'), SECONDS)


def test_every_recording_rule_records(prometheus: Prometheus) -> None:
    wait_until(lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()), SECONDS)
    assert [rule for rule in prometheus.rules() if rule["health"] != "ok"] == []
    recorded = [rule["name"] for rule in prometheus.rules() if rule["type"] == "recording"]
    assert recorded
    assert silent(prometheus, recorded) == []


def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    asking: list[Query] = [query for query in queries(STEP) if asks_for_more(query.expression)]
    assert asking
    empty = silent(prometheus, [query.expression for query in asking])
    assert [query for query in asking if query.expression in empty] == []


def test_no_alert_finds_a_service_missing_that_is_there(prometheus: Prometheus) -> None:
    states = {rule["name"]: rule["state"] for rule in prometheus.rules() if rule["type"] == "alerting"}
    missing = ["RefrainDown", "RefrainTargetDown", "RefrainEngineDown", "RefrainProcessesMissing", "RefrainRestarting"]
    assert {name: states[name] for name in missing} == dict.fromkeys(missing, "inactive")
