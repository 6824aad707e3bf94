"""What the users do with one request; in a process of its own, since Locust patches the standard library."""

import json
import subprocess
import sys

import pytest

SENT_LATE = """
import json, sys, time
from contextlib import contextmanager
from types import SimpleNamespace
from loadtest.job import Job
from loadtest.users import Load

class Client:
    def __init__(self, load, answer):
        self.load, self.answer = load, answer

    @contextmanager
    def post(self, path, context, **_):
        faults, meta = [], {"response_time": 5.0}
        yield SimpleNamespace(status_code=200, content=self.answer.encode(), request_meta=meta, failure=faults.append)
        self.load.seen(meta["response_time"], Exception(faults[0]) if faults else None, context)

for answer in sys.argv[1:]:
    load = Load(Job("http://nowhere", [("recurrent", "{}")], 1, "poisson", "steady", 1, 1, 100, 100, "1"))
    load.send(Client(load, answer), time.perf_counter() - 0.5, 0)
    print(json.dumps([load.trace.answers, load.trace.failures]))
"""
WRONG = {
    '{"results": [{"architecture": "baseline"}]}': "results of ['baseline'], 1 in all",
    '{"results": []}': "results of [], 0 in all",
    "<html>": "HTTP 200 with a body that is not an answer",
    '["results"]': "HTTP 200 with a body that is not an answer",
}


def test_a_request_that_is_sent_late_has_waited_since_it_was_due_and_a_wrong_answer_is_a_failure() -> None:
    command = [sys.executable, "-c", SENT_LATE, '{"results": [{"architecture": "recurrent"}]}', *WRONG]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (right, no_failure), *wrong = [json.loads(line) for line in ended.stdout.splitlines()]
    ((_, architecture, _, milliseconds, late_ms),) = right
    assert (architecture, no_failure) == ("recurrent", {})
    assert late_ms >= 500
    assert milliseconds == pytest.approx(late_ms + 5)
    assert wrong == [[[], {said: 1}] for said in WRONG.values()]
