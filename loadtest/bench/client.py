"""The load generator: drives the service at one pace for a while, and tells what became of each request.

It shares the cores with the service, so it does nothing while it measures that could be done before or after.
`python -m loadtest.bench.client` does one job for loadtest.bench.workers.
"""

import asyncio
import json
import math
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import uvloop

from loadtest.bench import processes, workers
from loadtest.bench.connection import GIVE_UP_SECONDS, Load, Request, Traffic, encode
from loadtest.bench.paces import Closed, Open, rest
from loadtest.schedule import arrivals, stages


async def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Load for `warmup` seconds, then for the measured ones; then waits for what is on its way.

    Open arrivals, and a closed loop that is `resting`, are not woken by what comes but look for it now and then.
    """
    load, traffics = Load(job["host"], job["port"]), [_traffic(one, job) for one in job["traffics"]]
    rate = job["arrivals_per_second"]
    due = arrivals(stages("steady", rate, job["seconds"]), poisson=True, seed=job["seed"]) if rate else []
    pace = Open(load, traffics[0], due) if rate else Closed(load, traffics)
    await pace.start()
    await asyncio.sleep(job["warmup"])
    service, own = processes.cpu_seconds(job["pid"]), time.process_time()
    load.begin = time.perf_counter()
    if isinstance(pace, Open):
        await pace.arrive()
    elif job["resting"]:
        while time.perf_counter() < load.begin + job["seconds"]:
            await rest(0.0)
    else:
        await asyncio.sleep(job["seconds"])
    load.end = time.perf_counter()
    used = {pid: used - service.get(pid, 0.0) for pid, used in processes.cpu_seconds(job["pid"]).items()}
    generator = time.process_time() - own
    await _last_answers(load, pace)
    seconds = load.end - load.begin
    for traffic in traffics:
        traffic.recording.generator_cpu_seconds, traffic.recording.generator_wall_seconds = generator, seconds
    return {
        "seconds": seconds,
        "sent": len(due),
        "late": sum(traffic.late for traffic in traffics),
        "recordings": [asdict(traffic.recording) for traffic in traffics],
        "per_second": [traffics[0].per_second.get(second, 0) for second in range(math.ceil(seconds))],
        "service_cpu_seconds": list(used.values()),
    }


async def _last_answers(load: Load, pace: Closed | Open) -> None:
    deadline = time.perf_counter() + GIVE_UP_SECONDS
    while (load.in_flight or pace.opening) and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)
    for connection in list(pace.connections):
        connection.give_up(f"no answer within {GIVE_UP_SECONDS:g} s of the end")


def _traffic(described: dict[str, Any], job: dict[str, Any]) -> Traffic:
    host = f"{job['host']}:{job['port']}"
    requests = [
        Request(
            encode(host, request["body"].encode()),
            [(json.dumps(label, ensure_ascii=False)[1:-1].encode(), score) for label, score in request["known"]],
        )
        for request in described["requests"]
    ]
    return Traffic(requests, described["connections"])


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    with suppress(ValueError, OSError):  # fewer files than we would like: a connection that fails will say so
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return lambda: uvloop.run(drive(job))


if __name__ == "__main__":
    workers.serve(prepare)
