"""Starting, asking and stopping the service under test, against the stand-in."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.samples import Sample

from loadtest import target
from loadtest.errors import LoadTestError
from loadtest.options import Options

OPTIONS = Options(ready_timeout=20)


def test_a_service_that_is_ready_is_scraped_and_stops(stand_in: Path) -> None:
    with target.service("baseline", OPTIONS, stand_in / "log") as (url, process):
        scraped = target.scrape(url)
        assert target.stop(process, 10) == 0
    assert scraped
    assert scraped.total("process_resident_memory_bytes") == 5e7
    assert scraped.total("refrain_model_memory_bytes", architecture="baseline") == 12e6
    assert scraped.total("refrain_model_memory_bytes", architecture="recurrent") is None
    assert scraped.labels("refrain_model_info", task="sentiment")["precision"] == "int8"
    assert target.scrape(url) is None


def test_after_a_reload_the_labels_are_of_what_is_loaded_now() -> None:
    infos = [Sample("refrain_model_info", {"version": version}, value) for version, value in (("old", 0), ("new", 1))]
    assert target.Metrics(infos).labels("refrain_model_info") == {"version": "new"}
    assert target.Metrics(infos[:1]).labels("refrain_model_info") == {}


def test_a_failed_start_shows_what_the_service_said(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "start")
    with (
        pytest.raises(LoadTestError, match=r"ended with status 1 at its start\n  no bundle in models/"),
        target.service("baseline", OPTIONS, stand_in / "log"),
    ):
        pass


def test_a_service_that_is_never_ready_is_given_up_and_ended(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "unready")
    port = target.free_port()
    monkeypatch.setattr(target, "free_port", lambda: port)
    with (
        pytest.raises(LoadTestError, match=r"/readyz did not say yes within 0\.5 s"),
        target.service("baseline", replace(OPTIONS, ready_timeout=0.5), stand_in / "log"),
    ):
        pass
    assert target.scrape(f"http://127.0.0.1:{port}") is None


@pytest.mark.parametrize(("fault", "status"), [("", 0), ("stop", 3), ("deaf", None)])
def test_the_exit_status_after_sigterm(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, fault: str, status: int | None
) -> None:
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(target, "GRACE_SECONDS", 0.2)
    with target.service("recurrent", OPTIONS, stand_in / "log") as (_, process):
        assert target.stop(process, 0.5 if fault == "deaf" else 10) == status
    assert process.poll() is not None


def test_warming_up_needs_one_answer(stand_in: Path) -> None:
    with target.service("recurrent", OPTIONS, stand_in / "log") as (url, _):
        target.warm_up(url, [b'{"inputs": "good", "architecture": "recurrent"}'], users=2, seconds=0.1)
        with pytest.raises(LoadTestError, match=r"answered 404: .*unknown_architecture"):
            target.warm_up(url, [b'{"inputs": "good", "architecture": "baseline"}'], users=2, seconds=0.1)
    with pytest.raises(LoadTestError, match="did not answer"):
        target.warm_up(url, [b"{}"], users=2, seconds=0.1)


def test_an_interruption_during_a_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Interrupted(subprocess.Popen[bytes]):
        """Ctrl-C comes when the process is there and its object not yet handed over."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt), target.child(command, tmp_path / "log", {}):
        pytest.fail("the block must not be entered")
    assert [process.returncode for process in started] == [-signal.SIGTERM]
