"""The whole command, in processes of its own, against the stand-in service."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest import target


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"not so after 60 s: {what}"
        time.sleep(0.05)


def test_both_architectures_are_measured_and_reported(stand_in: Path, command: list[str]) -> None:
    ended = run(command, "--duration", "2", "--list-size", "2")
    assert ended.returncode == 0, ended.stderr
    assert "| requests/s" in ended.stdout
    written = json.loads((stand_in / "out/loadtest.json").read_text())
    assert [one["architecture"] for one in written["rounds"]] == ["recurrent", "baseline"]
    assert not any(one["failures"] or one["stop_fault"] for one in written["rounds"])
    summary = written["summary"]
    assert summary["p50_ms"]["ratio"] < 1 < summary["requests_per_second"]["ratio"]  # the stand-in is made so
    assert summary["texts_per_second"]["recurrent"]["median"] == pytest.approx(
        2 * summary["requests_per_second"]["recurrent"]["median"]
    )
    assert summary["model_memory_bytes"]["ratio"] == pytest.approx(1 / 3)
    assert summary["idle_memory_bytes"]["baseline"]["median"] == 5e7
    assert summary["peak_memory_bytes"]["baseline"]["median"] == 6e7
    assert summary["cpu_seconds_per_1000_texts"]["baseline"]["median"] > 0
    assert (stand_in / "out/loadtest.png").read_bytes().startswith(b"\x89PNG")
    markdown = (stand_in / "out/loadtest.md").read_text()
    assert "precision int8" in markdown
    assert str(stand_in) not in markdown + json.dumps(written)
    assert sys.executable not in markdown + json.dumps(written)


def test_refused_requests_and_a_bad_end_are_told_and_change_the_exit_status(
    stand_in: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "refuse,stop")
    ended = run(command, "--duration", "1")
    assert ended.returncode == 1
    assert "requests failed: HTTP 429 queue_full" in ended.stdout
    assert "baseline, round 1: the service ended with status 3 on SIGTERM, not 0" in ended.stdout
    one = json.loads((stand_in / "out/loadtest.json").read_text())["rounds"][0]
    share = one["failures"]["HTTP 429 queue_full"] / (
        one["figures"]["requests"] + one["failures"]["HTTP 429 queue_full"]
    )
    assert share == pytest.approx(0.2, abs=0.05)


def test_a_running_service_is_driven_and_left_running(
    stand_in: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "other")
    port = target.free_port()
    settings = {"REFRAIN_ARCHITECTURES": "recurrent,baseline", "REFRAIN_HOST": "127.0.0.1"}
    environment = os.environ | settings | {"REFRAIN_PORT": str(port)}
    with subprocess.Popen([sys.executable, "-m", "service"], env=environment) as service:
        try:
            ended = run(command, "--duration", "1", "--host", f"http://127.0.0.1:{port}")
            assert service.poll() is None
        finally:
            service.kill()
    assert ended.returncode == 1
    assert "results of ['somebody-else'], 1 in all" in ended.stdout
    assert "process memory belongs to both" in ended.stdout
    written = json.loads((stand_in / "out/loadtest.json").read_text())
    assert written["summary"]["model_memory_bytes"]["ratio"] == pytest.approx(1 / 3)
    assert "p50_ms" not in written["summary"]


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_child(stand_in: Path, command: list[str], way: signal.Signals) -> None:
    with subprocess.Popen([*command, "--duration", "60"], stderr=subprocess.PIPE, text=True) as loadtest:
        wait_until(lambda: len(children(loadtest.pid)) == 2, "service and Locust run")
        started = children(loadtest.pid)
        loadtest.send_signal(way)
        _, errors = loadtest.communicate(timeout=30)
    assert loadtest.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not (stand_in / "out").exists()


@pytest.mark.usefixtures("stand_in")
def test_help_tells_what_it_does_and_a_wrong_option_what_is_wrong(command: list[str]) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert "--service-python" in shown.stdout
    refused = run(command, "--users", "none")
    assert refused.returncode == 2
    assert "argument --users: 'none' is not a whole number of at least 1" in refused.stderr
