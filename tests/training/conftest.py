"""One thread, a fresh Accelerator for every test, and one trained run for all that only read it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.training.easy import tiny_config, write_easy


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """A process has one Accelerator, whose precision cannot change; a test is to us what a process is to a user."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def easy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set `easy`: 60, 21 and 13 texts that are bad or good."""
    directory = tmp_path_factory.mktemp("data")
    write_easy(directory)
    return directory


@pytest.fixture(scope="session")
def run(easy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recurrent model, trained to the end: 120 steps in 8 epochs."""
    from training.loop import train

    directory = train(tiny_config(easy_dir, tmp_path_factory.mktemp("runs") / "easy", num_epochs=8))
    AcceleratorState._reset_state(reset_partial_state=True)
    return directory


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the loop find a request to stop after so many steps, as if a signal had come then."""

    def arrange(steps: int) -> None:
        class StopLater:
            looked = 0

            @property
            def asked(self) -> bool:
                self.looked += 1
                return self.looked >= steps

            def __call__(self, number: int, frame: FrameType | None) -> None:
                raise AssertionError("no signal is sent here")

        monkeypatch.setattr("training.stopping.StopRequest", StopLater)

    return arrange
