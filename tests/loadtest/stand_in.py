"""A stand-in for the service, small enough to be right; copied to `service/__main__.py` it runs as `-m service`.

FAULT in its environment makes it misbehave, in one way or, after commas, several: `start` (ends at once), `unready`,
`stop` (ends with 3 on SIGTERM), `deaf` (ignores SIGTERM), `refuse` (429 for every fifth request), `other` (answers from
an architecture that was not asked for), `stall` (nobody is answered for STALL_SECONDS after the twentieth request),
`uncounted` (its metrics do not count requests). With KEY in its environment it asks for that API key. Its memory is
50 MB, but 60 MB at the third scrape.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

FAULTS = os.environ.get("FAULT", "").split(",")
ARCHITECTURES = os.environ["REFRAIN_ARCHITECTURES"].split(",")
SLOWNESS_SECONDS = {"recurrent": 0.002, "baseline": 0.01}
STALL_SECONDS = 0.8
MODEL_BYTES = {"recurrent": 4e6, "baseline": 12e6}

served = itertools.count(1)
answered: list[None] = []
turn = threading.Lock()
scraped = itertools.count(1)


def results(texts: list[str], architecture: str) -> list[dict[str, Any]]:
    time.sleep(SLOWNESS_SECONDS[architecture] * len(texts))
    named = "somebody-else" if "other" in FAULTS else architecture
    return [{"label": "positive", "score": 0.9, "architecture": named, "tokens": len(text)} for text in texts]


def metrics() -> str:
    labels = 'architecture="{0}",task="sentiment"'
    memory = 6e7 if next(scraped) == 3 else 5e7
    lines = [f"process_resident_memory_bytes {memory}", f"process_cpu_seconds_total {time.process_time()}"]
    if "uncounted" not in FAULTS:
        lines.append(f'refrain_requests_total{{code="200"}} {len(answered)}')
    for name in ARCHITECTURES:
        lines.append(f"refrain_model_memory_bytes{{{labels.format(name)}}} {MODEL_BYTES[name]}")
        lines.append(f'refrain_model_info{{{labels.format(name)},version="abc123",precision="int8",provider="cpu"}} 1')
    return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, metrics())
        elif self.path == "/models":
            loaded = [{"task": "sentiment", "architecture": name} for name in ARCHITECTURES]
            self.answer(200 if self.knows_key() else 401, json.dumps({"models": loaded}))
        else:
            self.answer(503 if "unready" in FAULTS else 200, "{}")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = request["inputs"] if isinstance(request["inputs"], list) else [request["inputs"]]
        number = next(served)
        with turn:
            if "stall" in FAULTS and number == 20:
                time.sleep(STALL_SECONDS)
        if not self.knows_key():
            self.answer(401, json.dumps({"status": 401, "code": "unauthorized"}))
        elif "refuse" in FAULTS and number % 5 == 0:
            self.answer(429, json.dumps({"status": 429, "code": "queue_full"}))
        elif request["architecture"] not in ARCHITECTURES:
            self.answer(404, json.dumps({"status": 404, "code": "unknown_architecture"}))
        else:
            answer = json.dumps({"results": results(texts, request["architecture"])})
            answered.append(None)
            self.answer(200, answer)

    def knows_key(self) -> bool:
        return self.headers["X-API-Key"] == os.environ.get("KEY")

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def on_terminate(*_: int | FrameType | None) -> None:
    if "deaf" not in FAULTS:
        os._exit(3 if "stop" in FAULTS else 0)


if __name__ == "__main__":
    if "start" in FAULTS:
        sys.exit("no bundle in models/")
    signal.signal(signal.SIGTERM, on_terminate)
    Server((os.environ["REFRAIN_HOST"], int(os.environ["REFRAIN_PORT"])), Handler).serve_forever()
