"""What a load test is told: its options, and the loads that follow from them."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from loadtest.job import Arrivals
from loadtest.schedule import Shape

KEY_NAME = "LOADTEST_API_KEY"
"""The environment variable with the API key. Not a REFRAIN_ one: the service refuses names that it does not know."""

Architecture = Literal["recurrent", "baseline"]
ARCHITECTURES: tuple[Architecture, ...] = ("recurrent", "baseline")
LIST_SIZE = 32
"""Texts in a list, where lists are compared with single texts."""
_LIST_USERS = 4
STEP_LEVELS = 12
"""Service levels that a step lasts at least: arrivals a twelfth too fast then end a whole level late."""
_STEP_TITLE = "single texts, faster in every step"


@dataclass(frozen=True)
class Load:
    """One kind of load. `level`: users, or requests a second; None: half of what the users before it got."""

    name: str
    title: str
    arrivals: Arrivals
    shape: Shape
    level: float | None
    list_size: int
    seconds: float


QUICK_DIR = Path("runs/quick")
"""Where a first look is written: not over the results of a whole run."""


@dataclass(frozen=True)
class Options:
    """One load test. Field names are the option names; durations are in seconds."""

    shape: Shape | None = None
    arrivals: Arrivals = "poisson"
    rate: float = 100.0
    users: int = 16
    list_size: int | None = None
    rounds: int = 3
    duration: float = 6.0
    step_seconds: float = 2.5
    warmup: float = 2.0
    service_level_ms: float = 100.0
    most_rate: float = 20_000.0
    cost_per_core_hour: float = 0.04
    architectures: tuple[Architecture, ...] = ARCHITECTURES
    task: str = "sentiment"
    exit_threshold: float | None = None
    texts: Path | None = None
    lengths: Literal["mixed", "sentences"] = "mixed"
    seed: int = 7
    host: str | None = None
    service_python: str = sys.executable
    log_level: str = "info"
    ready_timeout: float = 120.0
    stop_timeout: float = 45.0
    output_dir: Path = Path("docs/results")

    def loads(self) -> list[Load]:
        """What is measured in each round."""
        if self.shape:
            return [self._shaped(self.shape)]
        users = Load("users", f"{self.users} users, single texts", "users", "steady", self.users, 1, self.duration)
        size = self.list_size or LIST_SIZE
        listed = f"{_LIST_USERS} users, lists of {size}"
        lists = Load("lists", listed, "users", "steady", _LIST_USERS, size, self.duration)
        return [users, lists, Load("step", _STEP_TITLE, "poisson", "step", None, 1, self._step)]

    @property
    def _step(self) -> float:
        """Seconds of a step: so many that arrivals faster than the service pile up beyond the service level."""
        return max(self.step_seconds, STEP_LEVELS * self.service_level_ms / 1000)

    def _shaped(self, shape: Shape) -> Load:
        size = self.list_size or 1
        sent = "single texts" if size == 1 else f"lists of {size}"
        if shape == "step":
            title = _STEP_TITLE if size == 1 else f"{sent}, faster in every step"
            return Load("step", title, self.arrivals, shape, self.rate, size, self._step)
        level, unit = (self.users, "users") if self.arrivals == "users" else (self.rate, f"{self.arrivals} requests/s")
        return Load(shape, f"{shape}, {level:g} {unit}, {sent}", self.arrivals, shape, level, size, self.duration)

    def command(self) -> str:
        """The command that repeats this load, without the paths, names and addresses of one machine."""
        hidden = {"host", "service_python", "output_dir", "ready_timeout", "stop_timeout"}
        words = ["python -m loadtest"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in hidden and value != field.default:
                shown = (
                    value.name if isinstance(value, Path) else ",".join(value) if isinstance(value, tuple) else value
                )
                words.append(f"--{field.name.replace('_', '-')} {shown}")
        return " ".join(words + ["--host URL"] * bool(self.host))
