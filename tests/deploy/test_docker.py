"""The images, built, and docker-compose.yml, brought up: locked down, healthy, scraped, loaded, and drained."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX
from tests.deploy.callers import Known, loading
from tests.deploy.docker import BUILD_SECONDS, Docker, MissingError, docker, make_prometheus
from tests.service.fakes import wait_until
from tests.serving import samples

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(2 * BUILD_SECONDS)]

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TAG = "tested"
IMAGE_BYTES = 450_000_000
UP_SECONDS = 120.0
CLIENTS = 8
TEXTS = [f"the {what} is {how}" for what in ("film", "cast", "ending") for how in ("charming", "dull", "far too long")]

# Run inside of the container: what each process may, and what a write to each of these places says.
LOOK = """
import glob, json, os
def status(path):
    return dict(line.split(":", 1) for line in open(path).read().splitlines())
def write(folder):
    try:
        open(folder + "/probe", "w").close()
    except OSError as error:
        return error.strerror
processes = [status(path) for path in glob.glob("/proc/[0-9]*/status")]
print(json.dumps({"processes": processes, "writes": list(map(write, ["/", "/app", "/tmp", "/opt"]))}))
"""


@dataclass
class Stack:
    """What docker-compose.yml started."""

    daemon: Docker
    prefix: list[str]

    def compose(self, *command: str, seconds: float = UP_SECONDS) -> str:
        return self.daemon.run(*self.prefix, *command, seconds=seconds, cwd=ROOT)

    def container(self, name: str) -> str:
        return self.compose("ps", "-q", name).strip()

    def inspect(self, name: str) -> Any:
        return json.loads(self.daemon.run("docker", "inspect", self.container(name)))[0]

    def up(self) -> None:
        """Start what is not running, and wait until Docker calls it healthy."""
        self.compose("up", "--detach", "--no-build")
        for name in ("service", "prometheus"):
            wait_until(lambda name=name: self.inspect(name)["State"]["Health"]["Status"] == "healthy", UP_SECONDS)

    def port(self, name: str, inside: int) -> int:
        return int(self.compose("port", name, str(inside)).rpartition(":")[2])

    def ask(self, name: str, inside: int, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a container answers with."""
        return json.loads(self.fetch(name, inside, path, body))

    def answers(self) -> Counter[str]:
        """How many requests the service has answered, by code."""
        counted: Counter[str] = Counter()
        for (name, labels), value in samples(self.fetch("service", 8000, "/metrics").decode()).items():
            if name == "refrain_requests_total":
                counted[dict(labels)["code"]] += int(value)
        return counted

    def fetch(self, name: str, inside: int, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """What a container answers with."""
        url = f"http://127.0.0.1:{self.port(name, inside)}{path}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=UP_SECONDS) as answer:
            content: bytes = answer.read()
            return content


@pytest.fixture(scope="module")
def daemon() -> Iterator[Docker]:
    with ExitStack() as running:
        try:
            yield running.enter_context(docker())
        except MissingError as missing:
            pytest.skip(str(missing))


@pytest.fixture(scope="module")
def images(daemon: Docker) -> Iterator[list[str]]:
    """The service's and the load generator's."""
    tags = {"service": f"refrain:{TAG}", "loadtest": f"refrain-loadtest:{TAG}"}
    for target, tag in tags.items():
        daemon.build(tag, ROOT, "--target", target)
    yield list(tags.values())
    daemon.run("docker", "image", "rm", "--force", *tags.values())


@pytest.fixture(scope="module")
def stack(daemon: Docker, images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("compose")
    try:
        command = daemon.compose()
        if daemon.private:
            image = yaml.safe_load(COMPOSE.read_text())["services"]["prometheus"]["image"]
            make_prometheus(daemon, image, directory / "prometheus")
    except MissingError as missing:
        pytest.skip(str(missing))
    with composed(daemon, [*command], directory) as stack:
        yield stack


@contextmanager
def composed(daemon: Docker, command: list[str], directory: Path) -> Iterator[Stack]:
    """docker-compose.yml as it is, but for the ports on this side, which are free ones."""
    file = directory / "docker-compose.yml"
    file.write_text(re.sub(r"127\.0\.0\.1:\d+:", "127.0.0.1::", COMPOSE.read_text()))
    kept = {name: value for name, value in daemon.environment.items() if not name.startswith(PREFIX)}
    inside = Docker(kept | {"IMAGE_TAG": TAG}, daemon.private)
    project = f"refrain-{TAG}-{time.time_ns()}"
    stack = Stack(inside, [*command, "-f", str(file), "--project-directory", str(ROOT), "-p", project])
    try:
        stack.up()
        yield stack
    finally:
        stack.compose("--profile", "load", "down", "--volumes", "--timeout", "5")


def test_the_image_is_small(daemon: Docker, images: list[str], figures: list[str]) -> None:
    for tag in images:
        size = int(daemon.run("docker", "image", "inspect", "--format", "{{.Size}}", tag))
        figures.append(f"image {tag}: {size / 1e6:.0f} MB")
        assert tag != images[0] or size < IMAGE_BYTES


def test_nothing_in_the_service_has_privileges_or_writes_to_disk(stack: Stack) -> None:
    container = stack.container("service")
    seen = json.loads(stack.daemon.run("docker", "exec", container, "python", "-c", LOOK))
    for process in seen["processes"]:
        assert set(process["Uid"].split()) == {"10001"}
        assert set(process["Gid"].split()) == {"10001"}
        assert all(int(process[kind], 16) == 0 for kind in ("CapEff", "CapPrm", "CapBnd"))
        assert process["NoNewPrivs"].strip() == "1"
    assert len(seen["processes"]) > 2  # init, the service, this look
    assert set(seen["writes"]) == {"Read-only file system"}


def test_it_classifies(stack: Stack) -> None:
    answer = stack.ask("service", 8000, "/classify", {"inputs": ["a charming journey", "dull and lifeless"]})
    assert [result["label"] for result in answer["results"]] == ["positive", "negative"]


def test_prometheus_sees_the_service(stack: Stack) -> None:
    def asked(query: str) -> list[float]:
        result = stack.ask("prometheus", 9090, f"/api/v1/query?query={query}")["data"]["result"]
        return [float(sample["value"][1]) for sample in result]

    stack.ask("service", 8000, "/classify", {"inputs": "a charming journey"})
    wait_until(lambda: asked("up{job='refrain'}") == [1], UP_SECONDS)
    wait_until(lambda: sum(asked("refrain_requests_total{code='200'}")) > 0, UP_SECONDS)


def test_the_load_test_compares_both_and_nothing_fails(stack: Stack, figures: list[str]) -> None:
    before = stack.answers()
    # Ends with an error if a request failed; steady, since a search for the knee is answered with refusals in the end.
    words = ["--rounds=1", "--shape=steady", "--arrivals=users", "--duration=5"]
    said = stack.compose("--profile", "load", "run", "--rm", "-T", "loadtest", *words)
    figures.append(f"compose: {said.strip()}")
    answers = stack.answers() - before
    used = stack.daemon.run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", stack.container("service"))
    figures.append(f"compose: the load test was answered {dict(answers)}, the service's memory then {used.strip()}")
    assert answers["200"] > 0
    assert set(answers) == {"200"}


def test_a_stop_under_load_answers_what_was_accepted(stack: Stack, figures: list[str]) -> None:
    results = stack.ask("service", 8000, "/classify", {"inputs": TEXTS})["results"]
    known: Known = {text: result["scores"] for text, result in zip(TEXTS, results, strict=True)}
    container = stack.container("service")
    try:
        with loading(stack.port("service", 8000), known, CLIENTS) as load:
            load.await_calls(10 * CLIENTS)
            stopped = time.monotonic()
            stack.compose("stop", "service")  # killed after stop_grace_period
            took = time.monotonic() - stopped
        state = json.loads(stack.daemon.run("docker", "inspect", container))[0]["State"]
        log = stack.daemon.run("docker", "logs", container)
    finally:
        stack.up()
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    taken = {line["id"] for line in lines if line.get("path") == "/classify" and line["code"] == 200}
    answered = {call.name for call in load.calls if not call.fault}
    across = sum(not call.fault and call.sent < stopped < call.ended for call in load.calls)
    figures.append(
        f"compose: stopped in {took:.1f} s, {len(answered)} answered before, {across} of them after the stop"
    )
    assert {name for name in taken if name.startswith("call-")} == answered
    assert across > 0
