"""Several replicas behind a real proxy: they share the load, and what happens to one costs the others nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.deploy.callers import Known, Load, loading
from tests.service.fakes import wait_until
from tests.serving import ROOT, SECONDS, Process, serving

pytestmark = pytest.mark.deploy

CONFIGURATION = ROOT / "docs/haproxy.cfg"
REPLICAS = 3
CLIENTS = 12
SOME = 300  # requests
PROXY_SECONDS = 15.0  # more than the proxy waits for an answer before it asks another replica
TEXTS = [
    form.format(word=word, subject=subject)
    for form in tiny.FORMS
    for word in (*tiny.GOOD, *tiny.BAD)
    for subject in tiny.SUBJECTS[:2]
]


@dataclass
class Cluster:
    """Replicas, each on a port that it keeps, and the port of the proxy before them."""

    models: Path
    logs: Path
    port: int
    ports: list[int]
    admin: Path
    processes: ExitStack
    drain_delay: str
    replicas: list[Process] = field(default_factory=list)

    def start(self, place: int) -> Process:
        """Start a replica, or its successor, and wait until it is ready."""
        log = self.logs / f"replica-{place}-{time.monotonic_ns()}"
        settings = {"port": str(self.ports[place]), "processes": "1", "drain_delay_seconds": self.drain_delay}
        return self.processes.enter_context(serving(log, models_dir=self.models, **settings))

    def set_state(self, place: int, state: str) -> None:
        """Tell the proxy to leave a replica out, `drain`, or to take it in again, `ready`."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(str(self.admin))
            connection.sendall(f"set server replicas/replica-{place + 1} state {state}\n".encode())
            assert connection.makefile().read().strip() == ""  # it would say what is wrong

    def served(self) -> list[int]:
        """How many requests each replica has answered with 200."""
        return [served(replica) for replica in self.replicas]

    def await_all_serve(self) -> None:
        """Wait until the proxy sends requests to each replica, from now on."""
        before = self.served()
        wait_until(lambda: all(now > then for now, then in zip(self.served(), before, strict=True)), SECONDS)


def served(replica: Process) -> int:
    """How many requests a replica has answered with 200."""
    found = replica.metrics().items()
    return int(sum(v for (name, labels), v in found if name == "refrain_requests_total" and ("code", "200") in labels))


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with ExitStack() as sockets:
        taken = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


@contextmanager
def proxying(port: int, ports: list[int], directory: Path) -> Iterator[Path]:
    """Run haproxy on the documented configuration, but for the addresses; gives the socket of its administrator."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        pytest.skip("haproxy is not installed")
    text, binds = re.subn(r"(?m)^( *bind ).*$", rf"\g<1>127.0.0.1:{port}", CONFIGURATION.read_text())
    addresses = iter(ports)
    text, servers = re.subn(r"(?m)^( *server \S+ ).*$", lambda m: f"{m[1]}127.0.0.1:{next(addresses)}", text)
    admin = directory / "admin"
    text, sockets = re.subn(r"(?m)^( *stats socket )\S+", rf"\g<1>{admin}", text)
    assert (binds, servers, sockets) == (1, len(ports), 1)
    file = directory / "haproxy.cfg"
    file.write_text(text)
    with (directory / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([program, "-db", "-f", str(file)], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(admin.exists, SECONDS)
        yield admin
    finally:
        process.kill()
        process.wait(SECONDS)


@pytest.fixture
def drain_delay() -> str:
    return "0"


@pytest.fixture
def cluster(models_dir: Path, tmp_path: Path, drain_delay: str) -> Iterator[Cluster]:
    port, *ports = free_ports(1 + REPLICAS)
    with ExitStack() as processes:
        admin = processes.enter_context(proxying(port, ports, tmp_path))
        cluster = Cluster(models_dir, tmp_path, port, ports, admin, processes, drain_delay)
        cluster.replicas = [cluster.start(place) for place in range(REPLICAS)]
        yield cluster


@pytest.fixture
def known(cluster: Cluster) -> Known:
    """What a replica answers to each text alone, before there is any load."""
    status, body = cluster.replicas[0].ask("POST", "/classify", {"inputs": TEXTS})
    assert status == 200, body
    return {text: result["scores"] for text, result in zip(TEXTS, json.loads(body)["results"], strict=True)}


def send_to_all_processes(replica: Process, number: signal.Signals) -> None:
    """The supervisor first, or it would replace the others."""
    for process in [psutil.Process(replica.process.pid), *replica.workers()]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def test_the_load_is_shared_evenly(cluster: Cluster, known: Known, figures: list[str]) -> None:
    with loading(cluster.port, known, CLIENTS) as load:
        cluster.await_all_serve()
        before = cluster.served()
        load.await_calls(10 * SOME)
        shares = [now - then for now, then in zip(cluster.served(), before, strict=True)]
    assert not load.faults()
    mean = sum(shares) / REPLICAS
    figures.append(
        f"replicas: {sum(shares)} requests; shares of the mean {[round(share / mean, 2) for share in shares]}"
    )
    assert all(0.8 * mean < share < 1.2 * mean for share in shares), shares


def summary(what: str, load: Load) -> str:
    slowest = max(call.ended - call.sent for call in load.calls)
    return f"{what}: {len(load.calls)} requests, {len(load.faults())} lost, slowest {slowest:.2f} s"


def test_a_replica_that_dies_takes_nothing_but_its_own_with_it(
    cluster: Cluster, known: Known, figures: list[str]
) -> None:
    dead, *others = cluster.replicas
    with loading(cluster.port, known, CLIENTS) as load:
        cluster.await_all_serve()
        dying = time.monotonic()
        send_to_all_processes(dead, signal.SIGKILL)
        died = time.monotonic()
        load.await_calls(SOME)
        before = [served(other) for other in others]
        load.await_calls(SOME)
    figures.append(summary("one replica died", load))
    assert all(served(other) > then for other, then in zip(others, before, strict=True))
    assert all(call.sent <= died and call.ended >= dying for call in load.faults()), load.faults()


def test_a_replica_that_cannot_be_reached_is_passed_by_and_taken_back(
    cluster: Cluster, known: Known, figures: list[str]
) -> None:
    cut_off = cluster.replicas[0]
    with loading(cluster.port, known, CLIENTS) as load:
        cluster.await_all_serve()
        stopping = time.monotonic()
        send_to_all_processes(cut_off, signal.SIGSTOP)
        stopped = time.monotonic()
        until = time.monotonic() + PROXY_SECONDS
        wait_until(lambda: time.monotonic() > until, SECONDS)  # what hangs there is asked again of the others
        load.await_calls(SOME)
        send_to_all_processes(cut_off, signal.SIGCONT)
        cluster.await_all_serve()
        load.await_calls(SOME)
    figures.append(summary("one replica cut off", load))
    # An answer of which a part had come cannot be asked for again.
    torn = [call for call in load.faults() if call.fault.startswith("IncompleteRead")]
    assert load.faults() == torn
    assert all(call.sent <= stopped and call.ended >= stopping for call in torn), torn


@pytest.mark.parametrize(("drain_delay", "announced"), [("0", True), ("3", False)], ids=["announced", "delayed"])
def test_a_rolling_restart_loses_no_request(
    cluster: Cluster, known: Known, announced: bool, figures: list[str]
) -> None:
    across = 0
    with loading(cluster.port, known, CLIENTS) as load:
        for place, old in enumerate(cluster.replicas):
            cluster.await_all_serve()
            if announced:
                cluster.set_state(place, "drain")
            signalled = time.monotonic()
            old.process.send_signal(signal.SIGTERM)
            assert old.process.wait(SECONDS) == 0
            across += sum(call.sent < signalled < call.ended for call in load.calls)
            cluster.replicas[place] = cluster.start(place)
            if announced:
                cluster.set_state(place, "ready")
        cluster.await_all_serve()
    how = "announced" if announced else "delayed"
    figures.append(summary(f"rolling restart, {how}, {across} on their way at the signals", load))
    assert not load.faults()
    assert across > 0
