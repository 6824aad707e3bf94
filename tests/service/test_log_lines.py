"""The log never holds anybody up: neither a reader that stands still nor a disk that is full."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from service.log_lines import MOST_LINES, LogLines
from tests import tiny
from tests.service.fakes import wait_until
from tests.serving import ROOT, Process, end, environment

SECONDS = 20.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for one in ends:
        with suppress(OSError):  # the test has closed it
            os.close(one)


def read_lines(descriptor: int, enough: Callable[[list[str]], bool]) -> list[str]:
    data, deadline = b"", time.monotonic() + SECONDS
    while not (data.endswith(b"\n") and enough(data.decode().splitlines())):  # not in the middle of a line
        assert time.monotonic() < deadline
        data += os.read(descriptor, 1 << 20)
    return data.decode().splitlines()


def test_lines_of_many_threads_come_out_whole_and_each_thread_s_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = LogLines(writer)

    def write(thread: int) -> None:
        for number in range(200):
            lines.write(f"{thread} {number} {'x' * (number % 90)}\n")

    with ThreadPoolExecutor(5) as pool:
        reading = pool.submit(read_lines, reader, lambda found: len(found) == 800)
        list(pool.map(write, range(4)))
        found = [line.split() for line in reading.result(SECONDS)]
    lines.drain(SECONDS)
    for thread in range(4):
        assert [int(number) for one, number, *_ in found if int(one) == thread] == list(range(200))
    assert all(len((*rest, "")[0]) == int(number) % 90 for _, number, *rest in found)


def test_who_ends_waits_for_the_last_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = LogLines(writer)
    for number in range(100):
        lines.write(f"{number}\n")
    lines.drain(SECONDS)
    os.set_blocking(reader, False)
    assert os.read(reader, 1 << 20).decode().splitlines() == [str(number) for number in range(100)]


def test_a_reader_that_stands_still_holds_nobody_up_and_learns_how_much_it_missed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines, line, count = LogLines(writer), "x" * 99, 3 * MOST_LINES
    began = time.monotonic()
    for _ in range(count):
        lines.write(line + "\n")
    lines.drain(0.1)
    assert time.monotonic() < began + SECONDS
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_lines, reader, lambda found: found[-1:] == ["the end"])
        lines.drain(SECONDS)
        lines.write("the end\n")
        found = Counter(reading.result(SECONDS))
        lines.drain(SECONDS)
    assert found.pop("the end") == 1
    taken, reports = found.pop(line), map(json.loads, found.elements())
    assert taken < count
    assert taken + sum(report["lines"] for report in reports) == count


def test_what_cannot_be_written_is_lost_and_said_when_it_can_be_again(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        lines = LogLines(descriptor)
        for _ in range(10):
            lines.write("lost\n")
        lines.drain(SECONDS)
        there_is_room_again = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(there_is_room_again, descriptor)
        lines.write("kept\n")
        lines.drain(SECONDS)
    finally:
        os.close(descriptor)
    report, kept = (tmp_path / "log").read_text().splitlines()
    assert json.loads(report)["lines"] == 10
    assert kept == "kept"


def test_a_line_that_was_cut_spoils_no_other(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)  # so that what does not fit is cut, as by a disk that becomes full
    lines = LogLines(writer)
    lines.write("x" * (1 << 20) + "\n")
    lines.drain(SECONDS)
    cut = os.read(reader, 1 << 20).decode()
    lines.write("whole\n")
    lines.drain(SECONDS)
    nothing, report, whole = os.read(reader, 1 << 20).decode().splitlines()
    assert set(cut) == {"x"}
    assert (nothing, json.loads(report)["lines"], whole) == ("", 1, "whole")


def test_nobody_who_reads_the_log_any_more(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = LogLines(writer)
    os.close(reader)
    lines.write("to nobody\n")
    lines.drain(SECONDS)
    lines.write("nor this\n")
    lines.drain(SECONDS)
    assert any(thread.name == "log" for thread in threading.enumerate())


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def full_pipe() -> int:
    """Whose reader stands still; it stays open as long as the test runs."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    return writer


@pytest.mark.parametrize("stdout", [full_disk, full_pipe])
def test_the_service_goes_on_and_ends_in_order_though_its_log_cannot_be_written(
    stdout: Callable[[], int], models_dir: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = environment(
        {"port": str(port), "processes": "1", "models_dir": models_dir, "default_task": tiny.DATASET}
    )
    command = [sys.executable, "-m", "service"]
    served = Process(subprocess.Popen(command, cwd=ROOT, env=settings, stdout=stdout()), port, tmp_path)

    def ready() -> bool:
        with suppress(OSError):
            return served.ask("GET", "/readyz")[0] == 200
        return False

    try:
        wait_until(ready, SECONDS)
        assert [served.classify("a charming film")[0] for _ in range(20)] == [200] * 20
        served.process.terminate()
        assert served.process.wait(SECONDS) == 0
    finally:
        end(served)
