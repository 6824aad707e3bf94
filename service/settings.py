"""Every setting in one place, read from the environment once, and refused with a reason before anything starts."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import SettingsError

PREFIX = "REFRAIN_"
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where CUDA has a GPU: on Linux, and on Windows' subsystem for it."""


def available_cpus(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the cores that this process may use, so that a container's CPU limit bounds the threads too."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups here, or the quota is "max"
        return cores


def _default_processes(chosen: dict[str, object]) -> int:
    """One for each core; on CUDA one, since each would hold its own copy of the models there."""
    if chosen["provider"] == "cpu":
        return available_cpus()
    # The package is looked up, not imported: the supervisor reads the settings too, and stays small.
    installed = any(importlib.metadata.distributions(name="onnxruntime-gpu"))
    cuda = chosen["provider"] == "cuda" or (installed and any(device.exists() for device in GPU_DEVICES))
    return 1 if cuda else available_cpus()


def _split_commas(value: object) -> object:
    return tuple(part for part in map(str.strip, value.split(",")) if part) if isinstance(value, str) else value


def _split_keys(value: object) -> object:
    keys = _split_commas(value)
    if isinstance(value, str) and value.strip() and not keys:
        raise ValueError("holds no key")
    if isinstance(keys, tuple) and not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ValueError("a key must be printable ASCII without blanks, or no header could carry it")
    return keys


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)]
SECRET = {"api_keys"}


class Settings(BaseSettings):
    """What an operator can choose; each field is the environment variable of its name with the prefix REFRAIN_."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    models_dir: Path = Field(default=Path("models"), description="Directory that holds the bundles.")
    architectures: Names = Field(
        default=(), description="Architectures to load, comma-separated; empty: all there are."
    )
    provider: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where ONNX Runtime runs; auto: on CUDA if it is there."
    )
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        default="auto",
        description="auto: fp32 on CUDA, computed from fp16; what has none runs on the CPU. There int8 where it is "
        "accurate, else fp32. In fp16 on CUDA scores depend on the batch, by up to about 0.001.",
    )
    processes: int = Field(
        default_factory=_default_processes,
        ge=1,
        le=1024,
        description="Processes that serve, each with its own engines. Default: one for each core, on CUDA one.",
    )
    threads: int = Field(
        default=1, ge=1, le=1024, description="Threads of each engine; more processes serve faster than more threads."
    )
    default_task: str = Field(
        default="sentiment", description="Task of a request that names none, if several are loaded."
    )
    routing: str = Field(
        default="fixed:recurrent",
        description="Who answers a request that names no architecture: fixed:NAME, split:NAME=WEIGHT,NAME=WEIGHT, "
        "shadow:PRIMARY,SHADOW=SHARE, cascade:FIRST,SECOND=THRESHOLD or least-loaded:NAME,NAME.",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens in one batch, padding counted. Default: 256 on a CPU, 8192 on CUDA.",
    )
    max_queue: int = Field(
        default=1024, ge=1, description="Most texts waiting for one model in one process; more get 429."
    )
    max_queue_tokens: int = Field(
        default=131_072,
        ge=1,
        description="Most tokens waiting for one model in one process; more get 429, or 413 if one request has more.",
    )
    max_queue_ms: int = Field(
        default=1_000,
        ge=1,
        le=3_600_000,
        description="Longest that what waits for one model may take, as measured; more get 429.",
    )
    brown_out_ms: int = Field(
        default=200,
        ge=0,
        le=3_600_000,
        description="Work queued, in milliseconds, from which on requests that allow it get fewer iterations.",
    )
    max_inputs: int = Field(default=256, ge=1, description="Most texts in one request; more get 413.")
    max_body_bytes: int = Field(
        default=1_048_576, ge=1024, description="Longest request body in bytes; longer gets 413."
    )
    max_connections: int = Field(
        default=2048, ge=1, description="Most open connections of one process; more get 503, probes excepted."
    )
    client_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Time a client has to send a request's headers, and to take its answer; slower is cut off.",
    )
    body_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="Time a client has to send its body; slower gets 408."
    )
    deadline_ms: int = Field(
        default=10_000,
        ge=1,
        le=3_600_000,
        description="Longest time a request may take in milliseconds; longer gets 504.",
    )
    drain_delay_seconds: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        description="Time at shutdown in which /readyz is red and requests are still served, so that proxies see it.",
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Longest wait for accepted requests at shutdown; not below REFRAIN_DEADLINE_MS.",
    )
    stuck_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="A batch that takes longer turns /healthz red; its process, or one that hangs, is replaced.",
    )
    api_keys: Secrets = Field(default=(), description="Accepted API keys, comma-separated; empty: no key is asked for.")
    tracing: Literal["off", "otlp"] = Field(
        default="off",
        description="otlp: a span for each classification, sent to OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra otel.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line; debug adds probes and scrapes."
    )

    @model_validator(mode="after")
    def _a_full_list_fits_the_queue(self) -> Settings:
        if self.max_inputs > self.max_queue:
            raise ValueError(
                f"{PREFIX}MAX_INPUTS={self.max_inputs} must not be above {PREFIX}MAX_QUEUE={self.max_queue}"
            )
        return self

    @model_validator(mode="after")
    def _the_drain_outlasts_every_request(self) -> Settings:
        if 1000 * self.drain_seconds < self.deadline_ms:
            least = f"{self.deadline_ms / 1000:g}"
            raise ValueError(
                f"{PREFIX}DRAIN_SECONDS={self.drain_seconds:g} must be at least {least}, as long as a request may take "
                f"({PREFIX}DEADLINE_MS={self.deadline_ms}), or a stop cuts accepted requests off; a drain ends with "
                "the last answer, so a longer one costs nothing"
            )
        return self


def load_settings() -> Settings:
    """Read the environment; raises SettingsError with one line for each misspelt name and each wrong value."""
    problems = [_misspelt(name) for name in sorted(os.environ) if _is_unknown(name)]
    try:
        settings = Settings()
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        problems += [_wrong(problem) for problem in wrong if problem["type"] != "default_factory_not_called"]
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


@dataclass(frozen=True)
class Described:
    """A setting as a person reads it; `allowed` is empty where any text will do."""

    name: str
    default: str
    allowed: str
    meaning: str


def described_settings() -> list[Described]:
    """Every setting with its default, what it may be, and what it means."""
    return [
        Described(PREFIX + name.upper(), _shown_default(field), _allowed(field), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def describe_settings() -> str:
    """Write every setting down, for --help."""
    return "\n".join(
        f"  {one.name} ({one.default}{'; ' * bool(one.allowed)}{one.allowed})\n      {one.meaning}"
        for one in described_settings()
    )


def _shown_default(field: FieldInfo) -> str:
    if field.default is None or field.default_factory is not None:
        return "by the machine"
    if isinstance(field.default, float):
        return f"{field.default:g}"
    return "empty" if field.default == () else str(field.default)


def _allowed(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        *others, last = get_args(field.annotation)
        return f"{', '.join(others)} or {last}"
    edges = {edge: getattr(one, edge) for one in field.metadata for edge in ("gt", "ge", "le") if hasattr(one, edge)}
    if edges.keys() >= {"ge", "le"}:
        return f"{edges['ge']} to {edges['le']}"
    least = f"{edges['ge']} or more" if "ge" in edges else f"above {edges['gt']}" if "gt" in edges else ""
    return f"{least}, up to {edges['le']}" if "le" in edges else least


def _is_unknown(name: str) -> bool:
    return name.upper().startswith(PREFIX) and name[len(PREFIX) :].lower() not in Settings.model_fields


def _misspelt(name: str) -> str:
    known = [PREFIX + field.upper() for field in Settings.model_fields]
    nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)[0]
    return f"{name} is no setting; did you mean {nearest}?"


def _wrong(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # a rule over several settings: its message names them
        return message
    field = str(problem["loc"][0])
    value = "" if field in SECRET else f"={str(problem['input'])[:60]}"
    return f"{PREFIX}{field.upper()}{value}: {message}"
