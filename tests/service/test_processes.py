"""Several processes under one supervisor: totals, deaths, stand-stills, orders, and what is left in the end."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from service.bundle import MANIFEST
from service.errors import StartError
from service.process_tree import CPU, ProcessTree, write_pids
from service.sockets import listen, reserve
from service.supervisor import LONGEST_PAUSE_SECONDS, pause_after
from tests import tiny
from tests.service.fakes import wait_until
from tests.serving import ROOT, SECONDS, Process, serving

TEXT = "a wonderful film"
CLIENTS = 6
ROUNDING = 1e-6  # of sums of hundredths
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"


@pytest.fixture(scope="module")
def served(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One service for the tests that leave it whole; what hangs for three seconds is replaced."""
    with serving(tmp_path_factory.mktemp("served") / "log", models_dir=models_dir, stuck_seconds="3") as served:
        yield served


def whole(served: Process) -> bool:
    """Whether all processes are there and ready; a process that ends may take this very question along."""
    try:
        return len(served.workers()) == served.metrics()["refrain_processes", frozenset()] == 2
    except (OSError, http.client.HTTPException):
        return False


def value(served: Process, name: str, **labels: str) -> float:
    return served.metrics().get((name, frozenset(labels.items())), 0.0)


def answered(served: Process) -> float:
    return value(served, "refrain_requests_total", code="200", architecture="recurrent", task=tiny.DATASET)


@dataclass
class Load:
    """Clients that keep their connections and send as fast as they are answered."""

    port: int
    codes: list[int] = field(default_factory=list)
    broken: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def client(self) -> None:
        while not self.over.is_set():
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
                try:
                    self.send_on(connection)
                except (OSError, http.client.HTTPException):
                    self.broken += 1

    def send_on(self, connection: http.client.HTTPConnection) -> None:
        while not self.over.is_set():
            connection.request("POST", "/classify", json.dumps({"inputs": TEXT}))
            answer = connection.getresponse()
            answer.read()
            self.codes.append(answer.status)


@contextmanager
def load(served: Process) -> Iterator[Load]:
    """Have clients send until the block ends; each of them has had answers when it begins."""
    load = Load(served.port)
    clients = [threading.Thread(target=load.client, daemon=True) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: len(load.codes) > 10 * CLIENTS, SECONDS)
        yield load
    finally:
        load.over.set()
        for client in clients:
            client.join(SECONDS)
            assert not client.is_alive()


def connections(served: Process) -> list[int]:
    """How many clients each process has."""
    return [
        sum(one.status == "ESTABLISHED" and one.laddr.port == served.port for one in worker.net_connections("tcp"))
        for worker in served.workers()
    ]


def test_few_connections_keep_every_process_busy(served: Process) -> None:
    wait_until(lambda: whole(served), SECONDS)
    evenly = 0
    for _ in range(24):
        with ExitStack() as clients:
            for _ in range(4):
                clients.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS))
            wait_until(lambda: sum(connections(served)) == 4, SECONDS)
            evenly += connections(served) == [2, 2]
        wait_until(lambda: sum(connections(served)) == 0, SECONDS)
    assert evenly >= 16  # by chance alone 9, and 16 once in 300 runs


def test_a_connection_that_was_handed_over_is_like_any_other(served: Process) -> None:
    wait_until(lambda: whole(served), SECONDS)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)))
            for _ in range(8)
        ]
        for _ in range(3):
            for client in clients:
                client.request("POST", "/classify", json.dumps({"inputs": TEXT}))
            for client in clients:
                answer = client.getresponse()
                assert (answer.status, json.loads(answer.read())["results"][0]["truncated"]) == (200, False)
        assert min(connections(served)) >= 1


def test_every_process_shows_the_totals_of_all(served: Process) -> None:
    before = answered(served)
    for _ in range(20):  # a new connection each: all in one process once in half a million runs
        assert served.classify(TEXT)[0] == 200
    assert {answered(served) for _ in range(10)} == {before + 20}
    parent = psutil.Process(served.process.pid)
    memory = value(served, "process_resident_memory_bytes")
    assert memory == pytest.approx(sum(p.memory_info().rss for p in [parent, *served.workers()]), rel=0.2)
    loaded = {"architecture": "recurrent", "task": tiny.DATASET}
    model = json.loads(served.ask("GET", "/models")[1])["models"][-1]
    assert value(served, "refrain_model_memory_bytes", **loaded) == 2 * model["model_bytes"]
    assert value(served, "refrain_model_parameters", **loaded) == model["parameters"]


def test_a_process_that_begins_just_now_spoils_no_scrape(served: Process) -> None:
    before = answered(served)
    fresh = served.metrics_directory() / "gauge_livesum_just-now.db"
    fresh.touch()  # as the library leaves it for a moment, or for good where the process is killed in that moment
    try:
        status, exposition = served.ask("GET", "/metrics")
    finally:
        fresh.unlink()
    assert status == 200, exposition
    assert answered(served) == before


def test_a_killed_process_takes_its_own_requests_along_and_is_replaced(served: Process) -> None:
    restarts = value(served, "refrain_process_restarts_total")
    counted = answered(served)
    with load(served) as clients:
        killed = served.workers()[0]
        killed.kill()
        killed.wait(SECONDS)
        strangers = []  # a new connection each, which may meet the new process as soon as it listens
        wait_until(lambda: strangers.append(served.classify(TEXT)[0]) or whole(served), SECONDS)
        sent = len(clients.codes)
        wait_until(lambda: len(clients.codes) > sent + 10 * CLIENTS, SECONDS)
    assert set(clients.codes) | set(strangers) == {200}  # nobody met the new process before it was ready

    def events() -> list[str]:
        return [line["event"].partition(" [")[0] for line in served.log_lines()]

    # A process writes its lines a moment after what they tell of.
    wait_until(lambda: last(events(), "Started server process") > events().index("a process ended"), SECONDS)
    told = events()
    assert told.index("loaded", told.index("a process ended")) < last(told, "Started server process")
    assert clients.broken <= 2 * CLIENTS
    counted = answered(served) - counted
    answers = len(clients.codes) + len(strangers)
    assert answers - 1 <= counted <= answers + clients.broken  # one: the kill may fall between an answer and its count
    assert value(served, "refrain_process_restarts_total") == restarts + 1
    assert value(served, "refrain_queue_depth", architecture="recurrent", task=tiny.DATASET) == 0


def last(events: list[str], event: str) -> int:
    return len(events) - 1 - events[::-1].index(event)


def test_the_cpu_time_of_the_dead_still_counts(tmp_path: Path) -> None:
    program = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        write_pids(tmp_path, [os.getpid(), child.pid])
        alive = cpu_seconds(tmp_path)
        child.kill()
        child.wait()
        assert cpu_seconds(tmp_path) >= alive - ROUNDING
        write_pids(tmp_path, [os.getpid()])
        assert cpu_seconds(tmp_path) >= alive - ROUNDING


def cpu_seconds(directory: Path) -> float:
    (metric,) = (metric for metric in ProcessTree(directory).collect() if metric.name == CPU)
    return float(metric.samples[0].value)


@pytest.mark.parametrize(("said", "shown"), [("1073741824\n", [1073741824]), ("max\n", []), (None, [])])
def test_memory_has_a_limit_only_where_one_is_set(said: str | None, shown: list[int], tmp_path: Path) -> None:
    write_pids(tmp_path, [os.getpid()])
    if said is not None:
        (tmp_path / "memory.max").write_text(said)
    metrics = ProcessTree(tmp_path, tmp_path / "memory.max").collect()
    samples = [sample for metric in metrics for sample in metric.samples]
    assert [sample.value for sample in samples if sample.name == "refrain_memory_limit_bytes"] == shown


def test_a_process_that_is_killed_before_it_has_read_its_orders_takes_nobody_along(served: Process) -> None:
    restarts = value(served, "refrain_process_restarts_total")
    killed = served.workers()[0]
    killed.suspend()
    served.process.send_signal(signal.SIGHUP)  # an order that it will never read: its end of the line is reset
    wait_until(lambda: last_reload(served) > 0, SECONDS)
    killed.kill()
    killed.wait(SECONDS)
    wait_until(lambda: served.process.poll() is not None or whole(served), SECONDS)
    assert served.process.poll() is None, served.log_lines()[-1]
    assert served.classify(TEXT)[0] == 200
    assert value(served, "refrain_process_restarts_total") == restarts + 1


def last_reload(served: Process) -> int:
    return [line["event"] for line in served.log_lines()].count("reloaded")


def test_a_process_that_stands_still_is_replaced(served: Process) -> None:
    hung = served.workers()[0]
    hung.suspend()
    hung.wait(SECONDS)
    wait_until(lambda: whole(served), SECONDS)
    assert hung.pid in [line["pid"] for line in served.log_lines() if line["event"] == "a process stands still"]
    assert served.classify(TEXT)[0] == 200


def test_a_process_that_is_told_to_end_is_replaced(served: Process) -> None:
    told = served.workers()[0]
    told.terminate()
    told.wait(SECONDS)
    wait_until(lambda: whole(served), SECONDS)


def test_a_process_takes_several_connections_at_once(served: Process) -> None:
    for worker in served.workers():
        listening = [one for one in worker.net_connections(kind="tcp") if one.status == psutil.CONN_LISTEN]
        assert len(listening) > 1, "a turn of the event loop takes one from each"


def test_requests_leave_no_threads_behind(models_dir: Path, tmp_path: Path) -> None:
    """One process is for one core, so a pool of threads for all of them would be in its own way."""
    with serving(tmp_path / "log", models_dir=models_dir, processes="1") as served:
        (worker,) = served.workers()
        before = worker.num_threads()
        assert {served.ask("POST", "/classify", {"inputs": inputs})[0] for inputs in (TEXT, [TEXT] * 40)} == {200}
        assert worker.num_threads() <= before


def test_a_port_that_others_share_is_still_taken() -> None:
    with reserve("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        taken = f"^REFRAIN_HOST, REFRAIN_PORT: cannot listen on 127.0.0.1:{port}: Address already in use$"
        with pytest.raises(StartError, match=taken):
            reserve("127.0.0.1", port)
        with listen("127.0.0.1", port), listen("127.0.0.1", port), pytest.raises(StartError, match=taken):
            reserve("127.0.0.1", port)
    with reserve("127.0.0.1", port):
        pass


@pytest.mark.parametrize("stopped", [False, True])
def test_without_its_supervisor_a_service_leaves_the_port_and_answers_what_it_has_accepted(
    stopped: bool, models_dir: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "log", models_dir=models_dir, drain_seconds="600", body_seconds="600") as served:
        workers, directory = served.workers(), served.metrics_directory()
        assert len(workers) == 2 and directory.is_dir()
        with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as dawdler:
            body = json.dumps({"inputs": TEXT}).encode()
            dawdler.sendall(HEAD % len(body))
            assert dawdler.recv(100)  # taken in
            for worker in workers if stopped else []:
                worker.suspend()
            served.process.kill()
            served.process.wait(SECONDS)
            wait_until(lambda: can_be_taken(served.port), SECONDS)
            assert [worker for worker in workers if worker.is_running()]
            dawdler.sendall(body)
            assert dawdler.recv(100).startswith(b"HTTP/1.1 200 ")
        assert psutil.wait_procs(workers, timeout=SECONDS)[1] == []
        assert not directory.exists()


def can_be_taken(port: int) -> bool:
    """Whether another service could begin on the port, and would get every connection."""
    try:
        with reserve("127.0.0.1", port), listen("127.0.0.1", port):
            return True
    except StartError:
        return False


def test_requests_are_served_for_a_while_after_the_service_says_that_it_is_not_ready(
    models_dir: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "log", models_dir=models_dir, drain_delay_seconds="600") as served:
        workers = served.workers()
        with load(served) as clients:
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: {served.ask("GET", "/readyz")[0] for _ in range(10)} == {503}, SECONDS)
            sent = len(clients.codes)
            wait_until(lambda: len(clients.codes) > sent + 50 * CLIENTS, SECONDS)
        assert set(clients.codes) == {200}
        assert clients.broken == 0
        served.process.send_signal(signal.SIGINT)  # whoever says it again waits no longer
        assert served.process.wait(SECONDS) == 0
        assert psutil.wait_procs(workers, timeout=SECONDS)[1] == []
        assert [line for line in served.log_lines() if line["event"].startswith("Finished server process")]


def test_a_second_signal_does_not_wait_and_leaves_nothing(models_dir: Path, tmp_path: Path) -> None:
    patient = {"drain_seconds": "600", "body_seconds": "600"}
    with serving(tmp_path / "log", models_dir=models_dir, **patient) as served:
        workers, directory = served.workers(), served.metrics_directory()
        with socket.create_connection(("127.0.0.1", served.port)) as dawdler:
            dawdler.sendall(HEAD % 9)
            assert dawdler.recv(100)  # taken in
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: served.ask("GET", "/readyz")[0] == 503)
            time.sleep(1.5)  # longer than a drain without requests takes
            assert served.process.poll() is None
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(SECONDS) == 0
        assert psutil.wait_procs(workers, timeout=SECONDS)[1] == []
        assert not directory.exists()


def test_a_stop_is_heard_wherever_it_finds_a_process_that_starts() -> None:
    program = """
import os, signal
from service.worker import end_at_once

class Interrupted:
    def __del__(self):  # as in an import's own bookkeeping: what is raised here is dropped
        os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, end_at_once)
Interrupted()
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("file", "put_in", "said"),
    [
        ("tokenizer.json", b"", "tokenizer.json is damaged"),
        (MANIFEST, b'"%s": 1, ' % (b"long" * 30_000), f"{MANIFEST}: longlong"),  # longer than a line may be
    ],
    ids=["damaged", "said at length"],
)
def test_what_fails_after_the_start_is_tried_again(
    file: str, put_in: bytes, said: str, models_dir: Path, tmp_path: Path
) -> None:
    models = shutil.copytree(models_dir, tmp_path / "models")
    path = models / f"{tiny.DATASET}-recurrent" / file
    content = path.read_bytes()
    with serving(tmp_path / "log", models_dir=models) as served:
        path.write_bytes(b"{" + put_in + b" " + content.removeprefix(b"{"))
        killed = served.workers()[0]
        killed.kill()
        killed.wait(SECONDS)
        wait_until(lambda: served.process.poll() is not None or failures(served), SECONDS)
        assert served.process.poll() is None
        assert said in failures(served)[0]
        assert served.classify(TEXT)[0] == 200
        path.write_bytes(content)
        wait_until(lambda: whole(served), SECONDS)


def failures(served: Process) -> list[str]:
    """Why processes could not start."""
    return [line["reason"] for line in served.log_lines() if line["event"] == "a process ended" and line["reason"]]


def test_the_supervisor_stays_small() -> None:
    heavy = "{'onnxruntime', 'fastapi', 'uvicorn', 'numpy'}"
    program = f"import sys, service.__main__, service.supervisor; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout == "[]\n", done.stderr


def test_the_pause_grows_with_each_early_death_and_has_an_end() -> None:
    pauses = [pause_after(deaths) for deaths in range(20)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[1] < pauses[2] and pauses[-1] == LONGEST_PAUSE_SECONDS
