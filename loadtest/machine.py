"""On what was measured: what a reader needs to know before comparing the figures with others."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy", "uvicorn", "uvloop", "httptools", "fastapi")
_NOT_TOLD = (
    "REFRAIN_API_KEYS",
    "REFRAIN_ARCHITECTURES",
    "REFRAIN_ROUTING",
    "REFRAIN_HOST",
    "REFRAIN_PORT",
    "REFRAIN_LOG_LEVEL",
)
"""A secret, and what the load test sets itself."""


def short() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def in_words(about: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in about.items())


def describe() -> dict[str, str]:
    """Cores, CPU, memory, versions, commit, and settings that a service started here has from the environment.

    What is not known is left out.
    """
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    found = {"machine": short(), "usable cores": str(len(os.sched_getaffinity(0))), "memory": memory}
    found |= {"CPU": _cpu(), "kernel": platform.release(), "commit": _commit(), "settings": _settings()}
    return {name: value for name, value in found.items() if value} | _versions()


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first core's own name for itself."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    """Short hash of what is checked out, with a plus when files differ from it; empty outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        hash_ = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return hash_.stdout.decode().strip() + ("+" if changes.stdout.strip() else "")


def _settings() -> str:
    told = {name: value for name, value in sorted(os.environ.items()) if name.startswith("REFRAIN_")}
    return " ".join(f"{name}={value}" for name, value in told.items() if name not in _NOT_TOLD)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
