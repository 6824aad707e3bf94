"""A folder in which `python -m service` is the stand-in, and the shortest load test to run there."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell that runs the tests has set."""
    for name in [name for name in os.environ if name.startswith(("REFRAIN_", "LOADTEST_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> Path:
    """The folder, made the current one: `-m` looks there first. Set FAULT to make the stand-in misbehave."""
    package = tmp_path / "service"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("stand_in.py"), package / "__main__.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "loadtest", "--rounds", "1", "--warmup", "0.1", "--output-dir", "out"]
