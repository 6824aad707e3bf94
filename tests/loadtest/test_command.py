"""The whole command, in processes of its own, against the stand-in service."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest import target
from loadtest.__main__ import main
from loadtest.command_line import parse
from loadtest.driver import drive
from loadtest.job import Arrivals, Job
from loadtest.options import Options
from loadtest.texts import request_bodies


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"not so after 60 s: {what}"
        time.sleep(0.05)


USERS = ("--shape", "steady", "--arrivals", "users", "--users", "4", "--duration", "1")


def test_both_architectures_are_measured_and_reported(stand_in: Path, command: list[str]) -> None:
    ended = run(command, *USERS, "--list-size", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| requests/s" in ended.stdout
    assert "Take recurrent for" in ended.stdout
    written = json.loads((stand_in / "out/loadtest.json").read_text())
    assert [one["subject"] for one in written["rounds"]] == ["recurrent", "baseline", "both"]
    assert not any(one["stop_fault"] or one["measured"][0]["failures"] for one in written["rounds"])
    load = written["summary"]["steady"]
    assert load["recurrent"]["p50_ms"]["median"] < load["baseline"]["p50_ms"]["median"]  # the stand-in is made so
    assert load["both: recurrent"]["p50_ms"]["median"] < load["both: baseline"]["p50_ms"]["median"]
    for figures in (load["recurrent"], load["both"]):
        assert figures["texts_per_second"]["median"] == pytest.approx(2 * figures["requests_per_second"]["median"])
    assert load["baseline"]["cpu_seconds_per_million_texts"]["median"] > 0
    memory = written["summary"]["memory"]
    assert memory["recurrent"]["model_memory_bytes"]["median"] == 4e6
    assert memory["both"]["model_memory_bytes"]["median"] == 16e6
    assert memory["baseline"]["idle_memory_bytes"]["median"] == 5e7
    assert memory["baseline"]["peak_memory_bytes"]["median"] == 6e7
    assert (stand_in / "out/loadtest.png").read_bytes().startswith(b"\x89PNG")
    texts = [(stand_in / f"out/loadtest.{kind}").read_text() for kind in ("md", "html", "json")]
    assert all("precision int8" in text for text in texts[:2])
    assert not any(str(stand_in) in text or sys.executable in text for text in texts)


def test_steps_go_up_and_the_generator_owns_up_when_it_went_no_higher(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loadtest.options.STEP_LEVELS", 0)  # a level that no hiccup breaks, without steps as long
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    options = ["--shape", "step", "--architectures", "recurrent", "--service-level-ms", "30000", "--rate", "40"]
    short = ["--rounds", "1", "--warmup", "0.1", "--most-rate", "50", "--step-seconds", "0.2", "--output-dir", "out"]
    assert main([*options, *short]) == 3
    assert "held up to the highest rate tried, 50.0 requests/s" in capsys.readouterr().out
    written = json.loads((stand_in / "out/loadtest.json").read_text())
    (measured,) = written["rounds"][0]["measured"]
    assert [step["rate"] for step in measured["steps"]] == [40, 50]
    assert written["summary"]["step"]["recurrent"]["level_texts_per_second"]["median"] == 50


def test_refused_requests_and_a_bad_end_are_told_and_change_the_exit_status(
    stand_in: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "refuse,stop,uncounted")
    ended = run(command, *USERS, "--architectures", "baseline")
    assert ended.returncode == 1
    assert "requests failed: HTTP 429 queue_full" in ended.stdout
    assert "baseline, round 1: the service ended with status 3 on SIGTERM, not 0" in ended.stdout
    assert "CPU time and cost are left out" in ended.stdout
    (one,) = json.loads((stand_in / "out/loadtest.json").read_text())["rounds"][0]["measured"]
    refused = one["failures"]["HTTP 429 queue_full"]
    assert refused / (one["figures"]["requests"] + refused) == pytest.approx(0.2, abs=0.05)


def test_a_running_service_is_driven_with_its_key_and_left_running(
    stand_in: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = target.free_port()
    settings = {"REFRAIN_ARCHITECTURES": "recurrent,baseline", "REFRAIN_HOST": "127.0.0.1"}
    environment = os.environ | settings | {"REFRAIN_PORT": str(port), "KEY": "very-secret", "FAULT": "other"}
    there = (*USERS, "--architectures", "recurrent", "--host", f"http://127.0.0.1:{port}")
    with subprocess.Popen([sys.executable, "-m", "service"], env=environment) as service:
        try:
            target.wait_ready(f"http://127.0.0.1:{port}", 30)
            refused = run(command, *there)
            monkeypatch.setenv("LOADTEST_API_KEY", "very-secret")
            absent = run(command, *there, "--task", "domain")
            ended = run(command, *there)
            assert service.poll() is None
        finally:
            service.kill()
    assert refused.returncode == 1
    assert "answered 401: set LOADTEST_API_KEY to one of its API keys" in refused.stderr
    assert absent.returncode == 1
    assert "no recurrent model for the task 'domain'; it has sentiment (baseline), sentiment (rec" in absent.stderr
    assert ended.returncode == 1
    assert "results of ['somebody-else'], 1 in all" in ended.stdout
    assert "process memory belongs to all that it holds" in ended.stdout
    written = (stand_in / "out/loadtest.json").read_text()
    assert "very-secret" not in written + ended.stdout + ended.stderr + absent.stderr
    assert json.loads(written)["summary"]["memory"]["recurrent"]["model_memory_bytes"]["median"] == 4e6
    assert "p50_ms" not in json.loads(written)["summary"]["steady"]["recurrent"]


@pytest.mark.parametrize(("arrivals", "waits_for_nobody"), [("constant", True), ("users", False)])
def test_a_stall_is_seen_by_all_who_would_have_come_meanwhile(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrivals: Arrivals, waits_for_nobody: bool
) -> None:
    monkeypatch.setenv("FAULT", "stall")
    (body,) = request_bodies(["fine"], list_size=1, architecture="recurrent", task="sentiment")
    with target.service("recurrent", Options(ready_timeout=30), tmp_path / "log") as (url, _):
        level = 100 if waits_for_nobody else 1
        job = Job(url, [("recurrent", body.decode())], 1, arrivals, "steady", level, 1.5, 100, 1000, "1")
        trace = drive(job, lambda seconds: None).trace
    waited = sorted(one.milliseconds for one in trace.answers)
    assert trace.failed == 0
    assert trace.sent == len(trace.answers)
    assert waited[-1] >= 800
    if waits_for_nobody:  # 800 ms without answers at 100 requests/s: those of the first 600 ms waited over 200
        assert trace.sent == 150
        assert waited[-50] > 200
    else:
        assert waited[-2] < 800


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_child(stand_in: Path, command: list[str], way: signal.Signals) -> None:
    with subprocess.Popen([*command, *USERS[:-1], "60"], stderr=subprocess.PIPE, text=True) as loadtest:
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "step", "--arrivals", "users"], "--shape step goes with --arrivals poisson or constant"),
        (["--rate", "50"], "--arrivals and --rate go with --shape"),
        (["--exit-threshold", "2"], "'2' is not a number above 0, up to 1"),
        (["--architectures", "recurrent,large"], "'large' is none of recurrent, baseline"),
        (["--host", "localhost:8000"], "is not a URL like"),
        (["--service-level-ms", "0"], "'0' is not a number above 0"),
        (["--output-dir", f"{__file__}/out"], "test_command.py/out cannot be written"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_quick_shortens_what_is_not_told_otherwise() -> None:
    quick = parse(["--quick", "--duration", "5"])
    assert (quick.rounds, quick.duration) == (1, 5)
    assert quick.step_seconds < parse([]).step_seconds
    assert quick.output_dir != parse([]).output_dir
    assert replace(parse(quick.command().split()[3:]), output_dir=quick.output_dir) == quick
