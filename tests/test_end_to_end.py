"""The whole path as an operator walks it: train, export, serve, classify, scrape, stop; and the starts that fail."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from service.bundle import MANIFEST
from tests import tiny
from tests.service.fakes import wait_until
from tests.serving import ROOT, SECONDS, environment, samples, serving
from tests.tiny import Architecture

CLIENTS = 8
GOOD, BAD = "a wonderful film , i found it charming", "a dreadful film , i found it tedious"


def run_module(*arguments: str | Path, **settings: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(settings), capture_output=True, text=True, timeout=SECONDS)


def train_and_export(architecture: Architecture, data_dir: Path, run: Path, out: Path) -> None:
    """By the commands of the README."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.train_options(architecture).items()]
    trained = run_module("training", "train", *options, "--data-dir", data_dir, "--output-dir", run)
    assert trained.returncode == 0, trained.stderr
    assert f"run written to {run}" in trained.stdout
    exported = run_module("model_export", run, out, "--data-dir", data_dir)
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.startswith(f"{tiny.DATASET}-{architecture}@")


def test_train_export_serve_classify_scrape(models_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    names = {name: f"{tiny.DATASET}-{name}" for name in tiny.ARCHITECTURES}
    train_and_export("recurrent", data_dir, tmp_path / "run", models / names["recurrent"])
    shutil.copytree(models_dir / names["baseline"], models / names["baseline"])
    with serving(tmp_path / "log", models_dir=models) as served:
        for architecture, iterations in (("recurrent", 2), ("baseline", 1)):
            asked = {"inputs": [GOOD, BAD], "architecture": architecture}
            status, body = served.ask("POST", "/classify", asked)
            assert status == 200, body
            answer = json.loads(body)
            version = json.loads((models / names[architecture] / MANIFEST).read_text())["version"]
            assert answer["task"] == tiny.DATASET
            assert [result["label"] for result in answer["results"]] == ["positive", "negative"]
            for result in answer["results"]:
                assert result["architecture"] == architecture
                assert result["model"] == f"{names[architecture]}@{version}"
                assert result["iterations"] == iterations
                assert sum(result["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert json.loads(served.ask("POST", "/classify", {"inputs": GOOD})[1])["results"][0]["label"] == "positive"

        status, body = served.ask("GET", "/models")
        assert status == 200
        loaded = {model["name"]: model for model in json.loads(body)["models"]}
        assert loaded.keys() == set(names.values())
        assert all(model["precision"] == "int8" and model["quality"]["validation"] for model in loaded.values())

        status, exposition = served.ask("GET", "/metrics")
        assert status == 200
        found = samples(exposition)
        for architecture, requests, texts in (("recurrent", 2, 3), ("baseline", 1, 2)):
            labels = {("architecture", architecture), ("task", tiny.DATASET)}
            assert found["refrain_requests_total", frozenset({*labels, ("code", "200")})] == requests
            assert found["refrain_exits_total", frozenset({*labels, ("reason", "depth")})] == texts
            assert found["refrain_queue_depth", frozenset(labels)] == 0


@dataclass
class Load:
    """Clients that send as fast as they are answered, until the service is gone."""

    port: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    codes: dict[str, int] = field(default_factory=dict)  # request's id -> status that came back, whole
    torn: list[str] = field(default_factory=list)  # answers that began and did not end
    across: int = 0  # answered 200 after the signal, sent before
    signalled: float = float("inf")

    def client(self) -> None:
        """Keeps its connection until the service closes it, then opens another; ends when nobody listens."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        while True:
            try:
                connection.connect()
            except OSError:
                return
            with closing(connection):
                while self.send(connection, f"request-{next(self.numbers)}"):
                    pass

    def send(self, connection: HTTPConnection, name: str) -> bool:
        """Whether the connection is good for another request."""
        body = json.dumps({"inputs": [GOOD, BAD] * 50, "max_iterations": 16})
        sent = time.monotonic()
        try:
            connection.request("POST", "/classify", body, {"x-request-id": name})
            answer = connection.getresponse()
        except (OSError, HTTPException):  # closed before an answer began: the service's log says whether it was taken
            return False
        try:
            whole = json.loads(answer.read())
        except (OSError, HTTPException, ValueError):
            self.torn.append(name)
            return False
        assert answer.status != 200 or len(whole["results"]) == 100
        self.codes[name] = answer.status
        self.across += answer.status == 200 and sent < self.signalled < time.monotonic()
        return not answer.will_close


def test_a_signal_under_load_loses_no_request(models_dir: Path, tmp_path: Path) -> None:
    # No 429, of which not each has a line in the log.
    patient = {"deadline_ms": "600000", "drain_seconds": "600", "max_queue_ms": "600000"}
    with serving(tmp_path / "log", models_dir=models_dir, **patient) as served:
        load = Load(served.port)
        clients = [threading.Thread(target=load.client, daemon=True) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        wait_until(lambda: len(load.codes) > 2 * CLIENTS, SECONDS)
        load.signalled = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(SECONDS) == 0
        for client in clients:
            client.join(SECONDS)
            assert not client.is_alive()
    taken = {line["id"]: line["code"] for line in served.log_lines() if line.get("path") == "/classify"}
    assert not load.torn
    assert taken == load.codes  # what the service took in, it answered, and the client has that answer
    assert set(Counter(taken.values())) <= {200, 503}
    assert load.across > 0


def fails_to_start(**settings: str | Path) -> str:
    """The one line on stderr."""
    done = run_module("service", **{"processes": "2"} | settings)
    assert done.returncode == 1
    assert "listening" not in done.stdout
    assert done.stderr.startswith("refrain: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def damaged(models_dir: Path, tmp_path: Path) -> Path:
    """Bundles that may be changed."""
    return shutil.copytree(models_dir, tmp_path / "models")


def test_a_corrupt_bundle_is_said(damaged: Path) -> None:
    file = damaged / f"{tiny.DATASET}-recurrent" / "int8" / "step.onnx"
    file.write_bytes(file.read_bytes()[::-1])
    assert f"{file} is damaged" in fails_to_start(models_dir=damaged)


def test_a_wrong_hash_is_said(damaged: Path) -> None:
    manifest = damaged / f"{tiny.DATASET}-baseline" / MANIFEST
    document = json.loads(manifest.read_text())
    document["tokenizer"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(document))
    assert "tokenizer.json is damaged: its SHA-256 begins" in fails_to_start(models_dir=damaged)


def test_a_manifest_that_is_none_is_said(damaged: Path) -> None:
    (damaged / f"{tiny.DATASET}-baseline" / MANIFEST).write_text("{")
    assert f"{MANIFEST}: the document: Invalid JSON" in fails_to_start(models_dir=damaged)


def test_a_misspelt_setting_is_said(models_dir: Path) -> None:
    said = fails_to_start(models_dir=models_dir, max_bach_tokens="100")
    assert said == "refrain: REFRAIN_MAX_BACH_TOKENS is no setting; did you mean REFRAIN_MAX_BATCH_TOKENS?\n"


def test_a_taken_port_is_said(models_dir: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", models_dir=models_dir) as served:
        said = fails_to_start(models_dir=models_dir, port=str(served.port))
    assert (
        said
        == f"refrain: REFRAIN_HOST, REFRAIN_PORT: cannot listen on 127.0.0.1:{served.port}: Address already in use\n"
    )
