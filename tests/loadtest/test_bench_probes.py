"""Probes while something else goes on: every path is asked, and what is wrong with an answer is said."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

from loadtest.bench import probes

ENOUGH_SECONDS = 10.0


@contextmanager
def server(seconds: dict[str, float], codes: dict[str, int]) -> Iterator[str]:
    """Answers each path with its code, 200 unless given, after so many seconds; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sleep(seconds.get(self.path, 0.0))
            self.send_response(codes.get(self.path, 200))
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}"
        finally:
            serving.shutdown()
            thread.join()


def seen(url: str, folder: Path) -> probes.Probes:
    """What was found until every path had been asked."""
    paths = {*probes.PATHS, probes.METRICS}
    with probes.asked(url, folder / "idle") as found:
        until = monotonic() + ENOUGH_SECONDS
        while {path for path, _ in found.milliseconds} < paths and monotonic() < until:
            sleep(0.01)
    assert {path for path, _ in found.milliseconds} == paths
    return found


def test_the_slowest_answer_is_the_one_that_took_longest(tmp_path: Path) -> None:
    with server({"/readyz": 0.3}, {}) as url:
        found = seen(url, tmp_path)
    assert max(found.milliseconds, key=lambda one: one[1])[0] == "/readyz"
    assert found.slowest["slowest_probe_ms"] >= 300
    assert not found.failures


def test_an_idle_server_is_asked_as_often_and_does_not_wait_for_the_service(tmp_path: Path) -> None:
    with server(dict.fromkeys((*probes.PATHS, probes.METRICS), 0.3), {}) as url:
        found = seen(url, tmp_path)
    assert len(found.idle) == len(found.milliseconds)
    assert sum(found.idle) < sum(took for _, took in found.milliseconds)
    assert probes.Probes().slowest == {}


def test_an_answer_that_is_not_ok_is_a_failure(tmp_path: Path) -> None:
    with server({}, {"/healthz": 503}) as url:
        found = seen(url, tmp_path)
    assert set(found.failures) == {"/healthz: HTTP 503"}


def test_nobody_there_is_a_failure(tmp_path: Path) -> None:
    with server({}, {}) as url:
        pass
    found = seen(url, tmp_path)
    assert sum(found.failures.values()) == len(found.milliseconds)
