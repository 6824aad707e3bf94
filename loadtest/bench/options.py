"""What a benchmark is told on the command line, parsed and checked in one place."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from loadtest.command_line import can_be_written
from loadtest.errors import LoadTestError
from loadtest.options import QUICK_DIR
from loadtest.options import Options as ServiceOptions

ModeName = Literal["recurrent", "early-exit", "baseline"]
CellKind = Literal["raw", "bare", "lists", "single", "mixed"]

FIXED: Mapping[ModeName, ModeName] = {"recurrent": "recurrent", "early-exit": "recurrent", "baseline": "baseline"}
"""Each mode's model: its architecture, which is also the mode in which it runs at fixed depth."""

_DESCRIPTION = """\
Measures how near the service comes to the raw runtime, what early exit brings, and what the recurrent model brings
against the baseline, in one interleaved run: every round measures each cell once, and figures are medians over the
rounds with the lowest and the highest.

The service is started once for each architecture, as `python -m service` with the settings of the environment
(REFRAIN_...; with REFRAIN_API_KEYS, LOADTEST_API_KEY holds one of them); one is under load while the other is idle.
Every answer is checked against the raw runtime's own.

Cells: raw (ONNX Runtime alone on length-sorted batches, fixed depth, all processes), bare (one text at a time, one
process), lists (requests of --list-size texts), single (requests of one text), mixed (short and long texts together,
and the short ones alone).

`--quick` takes about a minute. `--overload 600` adds open arrivals at twice the capacity.

Exit status: 0 every request answered rightly; 1 one was not, or something did not start or stop as it should; 2 a wrong
option; 130 interrupted."""


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark; durations are in seconds."""

    rounds: int = 5
    """Rounds; in each, every cell is measured once."""
    seconds: float = 4.0
    """Measured part of each cell."""
    warmup: float = 1.0
    """Load before the measured part of each cell of the service."""
    quick: bool = False
    """One round of one second for each cell, unless told otherwise: a first look, and written to runs/quick."""
    modes: tuple[ModeName, ...] = ("recurrent", "early-exit", "baseline")
    """recurrent: at fixed depth; early-exit: the same model at its bundle's exit threshold."""
    cells: tuple[CellKind, ...] = ("raw", "bare", "lists", "single", "mixed")
    """What to measure."""
    connections: tuple[int, ...] = (1, 16, 64, 256)
    """Of single texts; each connection sends its next request on the last answer."""
    list_size: int = 32
    """Texts in one request of a list, and in one batch of the raw runtime."""
    list_connections: int | None = None
    """Of lists; four for each process unless given."""
    mixed_connections: int = 64
    """Of short and long texts together; half of them send the short ones."""
    overload: float = 0.0
    """Seconds of open arrivals of single texts, at twice the capacity measured just before, for the first of --modes;
    0 leaves it out."""
    exit_threshold: float | None = None
    """Of early-exit; what the bundle says unless given."""

    texts: Path | None = None
    """One text a line, or JSON Lines with "text" and perhaps "label" where the name ends in .jsonl; also .gz. Composed
    sentences unless given."""
    long_texts: Path | None = None
    """Likewise, the long ones of the mixed load. Composed reviews unless given."""
    data_dir: Path | None = None
    """Take both from sst2/validation.jsonl.gz and imdb/train.jsonl.gz in this folder."""
    seed: int = 7
    """Of composed texts and of the order of arrivals."""

    models_dir: Path = Path("models")
    """The bundles; the service gets the same as REFRAIN_MODELS_DIR."""
    task: str = "sentiment"
    """What is decided."""
    processes: int | None = None
    """Processes of the raw runtime, and REFRAIN_PROCESSES of the service. Unless given: one for each core, and the
    service's own default."""
    service_python: str = sys.executable
    """The interpreter that runs `-m service`."""
    log_level: str = "info"
    """Of the service."""
    ready_timeout: float = 120.0
    """Seconds the service may take until /readyz says yes."""
    stop_timeout: float = 45.0
    """Seconds the service may take to end after SIGTERM."""
    output_dir: Path = Path("docs/results")
    """Where bench.json, bench.md and bench.png go."""

    def __post_init__(self) -> None:
        """Raises LoadTestError for what cannot be measured."""
        positive = {
            "rounds": self.rounds,
            "seconds": self.seconds,
            "list-size": self.list_size,
            "connections": min(self.connections, default=0),
            "list-connections": self.busy_connections,
            "processes": self.raw_processes,
            "modes": len(self.modes),
            "cells": len(self.cells),
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise LoadTestError(f"--{name} must be above 0")
        if self.mixed_connections < 2:
            raise LoadTestError("--mixed-connections must be at least 2: one for short texts, one for long ones")
        if min(self.warmup, self.overload) < 0:
            raise LoadTestError("--warmup and --overload must not be below 0")
        if self.exit_threshold is not None and not 0 < self.exit_threshold <= 1:
            raise LoadTestError("--exit-threshold must be above 0, and at most 1")
        if not can_be_written(self.output_dir):
            raise LoadTestError(f"--output-dir {self.output_dir} cannot be written")
        for path in (self.short_source, self.long_source):
            if path and not path.is_file():
                raise LoadTestError(f"there is no file {path}")

    @property
    def short_source(self) -> Path | None:
        return self.texts or (self.data_dir / "sst2/validation.jsonl.gz" if self.data_dir else None)

    @property
    def long_source(self) -> Path | None:
        return self.long_texts or (self.data_dir / "imdb/train.jsonl.gz" if self.data_dir else None)

    @property
    def raw_processes(self) -> int:
        return len(os.sched_getaffinity(0)) if self.processes is None else self.processes

    @property
    def busy_connections(self) -> int:
        return 4 * self.raw_processes if self.list_connections is None else self.list_connections

    def settings(self) -> dict[str, str]:
        """Of the service, besides those that are the load test's own."""
        settings = {"REFRAIN_MODELS_DIR": str(self.models_dir), "REFRAIN_DEFAULT_TASK": self.task}
        return settings if self.processes is None else settings | {"REFRAIN_PROCESSES": str(self.processes)}

    def service(self) -> ServiceOptions:
        return ServiceOptions(
            service_python=self.service_python,
            log_level=self.log_level,
            ready_timeout=self.ready_timeout,
            stop_timeout=self.stop_timeout,
        )


def parse(arguments: Sequence[str]) -> BenchOptions:
    """Options from the command line; ends the process with status 2 when one is wrong."""
    default = BenchOptions()
    if "--quick" in arguments:
        default = replace(default, rounds=1, seconds=1.0, warmup=0.3, output_dir=QUICK_DIR)
    try:
        return tyro.cli(
            BenchOptions, default=default, prog="python -m loadtest.bench", description=_DESCRIPTION, args=arguments
        )
    except LoadTestError as error:
        sys.stderr.write(f"bench: {error}\n")
        raise SystemExit(2) from None
