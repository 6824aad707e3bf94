"""The directory that processes share: made, gone in the end, and swept by the next when its owner was killed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service import scratch
from service.errors import StartError
from service.scratch import OWNER, PREFIX, scratch_directory
from tests.serving import ROOT, SECONDS


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(scratch, "MEMORY", tmp_path)
    return tmp_path


def another(memory: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process with a directory, and that."""
    program = (
        "import pathlib, service.scratch as scratch\n"
        f"scratch.MEMORY = pathlib.Path({str(memory)!r})\n"
        "with scratch.scratch_directory() as directory: print(directory, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_has_is_not(memory: Path) -> None:
    live, lived_in = another(memory)
    killed, left = another(memory)
    with live, killed:
        (left / "counter.db").touch()
        killed.kill()
        killed.wait(SECONDS)
        assert left.is_dir()
        with scratch_directory() as ours:
            assert set(memory.iterdir()) == {lived_in, ours}
        live.communicate("\n", SECONDS)
    assert not list(memory.iterdir())


def test_a_directory_that_was_never_ours_stays(memory: Path) -> None:
    (stranger := memory / f"{PREFIX}loadtest").mkdir()
    (memory / "other").mkdir()
    (memory / "other" / OWNER).touch()
    with scratch_directory():
        pass
    assert stranger.is_dir() and (memory / "other").is_dir()


@pytest.mark.parametrize("held", [True, False])
def test_a_service_that_starts_at_the_same_time_never_takes_it_away(
    held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees the directory before the lock is on it: it removes it, and may hold the lock still or no more."""
    lock = fcntl.flock
    taken: list[Path] = []

    def taken_once(file: int, operation: int) -> None:
        if not taken:
            taken.extend(scratch.MEMORY.iterdir())
            shutil.rmtree(taken[0])
            if held:
                raise BlockingIOError
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", taken_once)
    with scratch_directory() as ours:
        assert taken != [ours] and (ours / OWNER).is_file()


def test_where_nothing_can_be_written_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scratch, "MEMORY", tmp_path / "nowhere")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "nor here"))
    with pytest.raises(StartError, match="no directory to write metrics to"), scratch_directory():
        pass
