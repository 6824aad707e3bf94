"""A job's units on Ray Data: a pool of workers, each with an engine, over the units whose shards are missing."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.bulk.classifier import Counts, UnitWorker
from service.errors import BulkError
from service.settings import available_cpus

OBJECT_STORE_BYTES = 128 << 20  # what passes through it are numbers of units and counts: texts never do
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # whatever the system: no process of Ray listens elsewhere
TOKEN_BYTES = 32
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports to its makers unless told not to
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it warns of what it will do in a later release
    "TOKENIZERS_PARALLELISM": "false",  # each worker has a core, not all of them
}


def run_units(
    units: Sequence[int],
    *,
    out: Path,
    bundle: Path,
    batch_tokens: int,
    workers: int | None,
    gpus: int,
    address: str | None,
) -> Iterator[Counts]:
    """What became of each unit, as they are done; raises BulkError where Ray or a worker fails."""
    if not units:
        return
    ray = _import_ray(QUIET if address else QUIET | LOOPBACK | _own_token())
    with _started(ray, address, workers or available_cpus()):
        there = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
        rows = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        done = rows.map(
            UnitWorker,
            fn_constructor_args=(str(out.resolve()), str(bundle.resolve()), batch_tokens),
            compute=ray.data.ActorPoolStrategy(size=min(workers or there, len(units))),
            num_cpus=1,
            num_gpus=gpus,
        )
        try:
            for row in done.iter_rows():
                yield Counts(**row)
        except ray.exceptions.RayError as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise BulkError(f"a worker failed: {last.strip()}. The same command goes on from here") from error


def _own_token() -> dict[str, str]:
    """A secret for this run's cluster alone; Ray would otherwise keep one in the user's home, for all of them."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(TOKEN_BYTES)}


def _import_ray(environment: Mapping[str, str]) -> Any:
    os.environ.update(environment)  # before Ray is imported, and for the processes that it starts
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise BulkError(f"Ray Data is not installed ({error}): pip install -e '.[cpu,bulk]'") from error
    return ray


@contextmanager
def _started(ray: Any, address: str | None, cpus: int) -> Iterator[None]:
    """A cluster of this process' own on loopback, without a dashboard; or the one at the address."""
    local = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(
            address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else local),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BulkError(f"Ray does not start at {address or 'this machine'}: {str(error).strip()}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts shards of the whole job
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()
