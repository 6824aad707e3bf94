"""What the process that drives the load is told, and what it saw: the two files between it and its parent."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from loadtest.recording import count_failure
from loadtest.schedule import Shape
from loadtest.steps import Step

NOT_SENT = "not sent"
"""How the failure begins that an arrival is when too many wait for their answers already."""

Arrivals = Literal["poisson", "constant", "users"]


@dataclass(frozen=True)
class Job:
    """One load. `level` is the height of its shape: users, or requests a second, for `step` where it begins.

    `requests` are sent in turn, again and again: the architecture that must answer, and the body.
    """

    url: str
    requests: list[tuple[str, str]]
    list_size: int
    arrivals: Arrivals
    shape: Shape
    level: float
    seconds: float
    service_level_ms: float
    most_rate: float
    seed: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Job":
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**fields | {"requests": [(name, body) for name, body in fields["requests"]]})


class Answer(NamedTuple):
    """One answered request: latency from when it was due, and how late it was sent, of which the latency holds."""

    step: int
    architecture: str
    due: float
    """Seconds since the load began."""
    milliseconds: float
    late_ms: float


@dataclass
class Trace:
    """What the load generator saw, request by request: percentiles come from every response time, not from buckets."""

    answers: list[Answer] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    """Every one of them is an answer or a failure in the end, also those that were due and could not be sent."""
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    """From the first request to the end of the last one; with steps, their own time alone."""
    generator_cpu_seconds: float = 0.0

    def fail(self, reason: str) -> None:
        count_failure(self.failures, reason)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def generator_cores(self) -> float:
        """CPU cores that the load generator kept busy; it has one thread, so at 1 it can send no faster."""
        return self.generator_cpu_seconds / self.seconds if self.seconds else 0.0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Trace":
        fields = json.loads(path.read_text(encoding="utf-8"))
        read = {
            "answers": [Answer(*one) for one in fields["answers"]],
            "steps": [Step(**one) for one in fields["steps"]],
        }
        return cls(**fields | read)
