"""Bulk classification on Ray Data, killed in the middle and begun again: every row once, each answer a request's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.fakes import wait_until

pytestmark = pytest.mark.deploy  # Ray takes its time to start

ROOT = Path(__file__).resolve().parents[2]
ROWS = 2000
SECONDS = 120


@dataclass
class Killed:
    """A job that was killed and then done."""

    listening: set[str]
    before: dict[str, int]
    after: dict[str, int]
    rows: list[dict[str, Any]]
    again: subprocess.CompletedProcess[str]


def text(number: int) -> str | None:
    return None if number % 500 == 7 else f"{'a film that goes on and on , ' * (number % 12)}charming or not {number}"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    place = tmp_path_factory.mktemp("bulk")
    with (place / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": number, "text": text(number)}) + "\n" for number in range(ROWS))
    out = place / "out"
    command = [sys.executable, "-m", "service.bulk", str(place / "in.jsonl"), str(out), "--shard-bytes", "30000"]
    command += ["--concurrency", "2"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(written(out)) >= 2 or first.poll() is not None, SECONDS)
        parent = psutil.Process(first.pid)
        family = parent.children(recursive=True)
        listening = {address for process in [parent, *family] for address in addresses(process)}
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    left = psutil.wait_procs([process for process in family if "UnitWorker" in process.name()], timeout=SECONDS)[1]
    assert not left, "workers outlived the command"
    for process in family:  # Ray's own agents look after their parent once in a minute
        with suppress(psutil.NoSuchProcess):
            process.kill()
    before = written(out)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    rows = [json.loads(line) for path in sorted(out.glob("part-*")) for line in path.read_text().splitlines()]
    return Killed(listening, before, written(out), rows, again)


def addresses(process: psutil.Process) -> list[str]:
    """Where a process takes connections."""
    with suppress(psutil.NoSuchProcess):
        connections = process.net_connections(kind="inet")
        return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
    return []


def written(out: Path) -> dict[str, int]:
    """When each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}


def test_ray_listens_on_loopback_only(killed: Killed) -> None:
    assert killed.listening
    assert killed.listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_every_row_is_answered_once_and_in_order(killed: Killed) -> None:
    assert killed.again.returncode == 0, killed.again.stderr
    assert [row["id"] for row in killed.rows] == list(range(ROWS))
    assert [row["id"] for row in killed.rows if row["error"] is not None] == list(range(7, ROWS, 500))


def test_what_was_done_is_not_done_again(killed: Killed) -> None:
    assert 2 <= len(killed.before) < len(killed.after)
    assert killed.before.items() <= killed.after.items()
    assert f"{len(killed.before)} of them from before" in killed.again.stdout


def test_answers_are_those_of_a_request(killed: Killed) -> None:
    good = [row for row in killed.rows if row["error"] is None][::30]
    with TestClient(create_app(Settings(models_dir=ROOT / "models"))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, 60)
        results = [client.post("/classify", json={"inputs": row["text"]}).json()["results"][0] for row in good]
    for row, result in zip(good, results, strict=True):
        assert row["scores"] == pytest.approx(result["scores"], abs=1e-5)
        assert all(row[name] == result[name] for name in ("label", "iterations", "tokens", "truncated", "model"))
    assert {row["iterations"] for row in good} == {1, 2}
