"""Which room may import which, and that serving loads nothing of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEVER_IN_THE_SERVICE = (
    "torch onnx onnxscript accelerate datasets sklearn training model_export loadtest "
    "opentelemetry.sdk "  # an extra
    "ray pyarrow"  # an extra as well, and slow to start
)

IMPORT_ALL = """
import importlib, pkgutil, sys
import service
for module in pkgutil.walk_packages(service.__path__, "service."):
    importlib.import_module(module.name)
print(" ".join(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_the_rooms_import_what_they_may() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_importing_the_whole_service_loads_no_torch() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, *NEVER_IN_THE_SERVICE.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"
