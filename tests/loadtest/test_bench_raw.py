"""The raw runtime on the tiny bundles, and the processes that it runs in."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.bench import workers
from loadtest.bench.raw import RawModel, answers, batches, calls, has_vnni
from loadtest.errors import LoadTestError
from tests import tiny

TEXTS = ["a wonderful film", "the cast is hollow", "moving , moving ending !", "a tedious story"] * 3
SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recurrent(models_dir: Path) -> RawModel:
    return RawModel(models_dir / f"{tiny.DATASET}-recurrent", "int8", "cpu")


def job(**fields: Any) -> dict[str, Any]:
    return {"texts": TEXTS, "iterations": 2, "size": 5, "seconds": 0.0, "seed": "1", "exit_threshold": 1} | fields


def test_answers_are_the_same_alone_and_in_any_batch(recurrent: RawModel) -> None:
    together, alone = answers(recurrent, job()), answers(recurrent, job(size=1))
    for one, other in zip(together, alone, strict=True):
        # The mean of the tokens of one text alone is added up otherwise: the last bit may differ.
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=0, atol=1e-6)
    for answered in (together, alone):
        assert [one["tokens"] for one in answered] == [len(ids) for ids in recurrent.tokenize(TEXTS)]
    assert all(len(one["scores"]) == 2 for one in together)
    assert all(sum(scores) == pytest.approx(1) for one in together for scores in one["scores"])


@pytest.mark.parametrize("tail_tokens", [0, 15])
def test_answers_are_those_of_the_service(tail_tokens: int, models_dir: Path, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from service.app import create_app
    from service.manifest import Manifest, content_version
    from service.settings import Settings
    from tests.service.fakes import wait_until

    name = f"{tiny.DATASET}-recurrent"
    path = shutil.copytree(models_dir / name, tmp_path / name) / "manifest.json"
    manifest = Manifest.model_validate(json.loads(path.read_text()) | {"tail_tokens": tail_tokens})
    path.write_text(manifest.model_copy(update={"version": content_version(manifest)}).model_dump_json())
    texts = [*TEXTS, "a [MASK] film", "a wonderful story , but " * 20 + "a dull and tedious ending"]
    with TestClient(create_app(Settings(models_dir=tmp_path))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
        said = client.post("/classify", json={"inputs": texts, "exit_threshold": 1}).json()
        (model,) = client.get("/models").json()["models"]
    assert (model["max_tokens"], model["tail_tokens"]) == (tiny.MAX_TOKENS, tail_tokens)
    known = [one["scores"][-1] for one in answers(RawModel(tmp_path / name, "int8", "cpu"), job(texts=texts))]
    assert [one["score"] for one in said["results"]] == pytest.approx([max(scores) for scores in known], abs=1e-5)
    assert said["results"][-1]["truncated"]


def test_a_run_ends_once_every_text_is_sure_enough(recurrent: RawModel) -> None:
    ids = recurrent.tokenize(TEXTS)
    sure = [float(scores_BC.max(axis=1).min()) for scores_BC in recurrent.run(ids, 3)]
    for threshold in (sure[0], max(sure), 1.0):
        expected = next((count for count, least in enumerate(sure, 1) if least >= threshold), 3)
        assert len(recurrent.run(ids, 3, threshold)) == expected
    assert len(recurrent.run(ids, 3, sure[0])) == 1


def test_temperatures_of_the_bundle_make_the_probabilities(
    models_dir: Path, recurrent: RawModel, tmp_path: Path
) -> None:
    bundle = models_dir / f"{tiny.DATASET}-recurrent"
    for path in bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (tmp_path / "manifest.json").unlink()
    flat = manifest | {"calibration": {"temperatures": [1e6, 1.0]}}
    (tmp_path / "manifest.json").write_text(json.dumps(flat))
    first, second = answers(RawModel(tmp_path, "int8", "cpu"), job(texts=TEXTS[:1]))[0]["scores"]
    assert first == pytest.approx([0.5, 0.5], abs=1e-4)
    assert max(second) > 0.51


@pytest.mark.parametrize(
    ("flags", "has"), [("avx2 avx512_vnni", True), ("avx2 avx_vnni", True), ("avx2 vnniless", False)]
)
def test_the_exact_kernel_is_asked_for_where_the_fast_one_is_not_exact(tmp_path: Path, flags: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {flags} fma\n")
    assert has_vnni(tmp_path / "cpuinfo") == has
    assert not has_vnni(tmp_path / "nothing")


def test_every_batch_runs_even_when_there_is_no_time(recurrent: RawModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    run = recurrent.run
    monkeypatch.setattr(recurrent, "run", lambda ids, *how: (sizes.append(len(ids)), run(ids, *how)))
    found = batches(recurrent, job())
    assert sorted(sizes) == [2, 5, 5]
    assert found["texts_per_second"] > 0
    assert found["cpu_ms_per_text"] > 0
    assert len(calls(recurrent, job())["milliseconds"]) == 1


def test_workers_begin_together_and_give_their_results(models_dir: Path, tmp_path: Path) -> None:
    bundle = {"bundle": str(models_dir / f"{tiny.DATASET}-baseline"), "precision": "int8", "provider": "cpu"}
    jobs = [job(do="batches", **bundle) | {"iterations": 1}, job(do="answers", **bundle) | {"iterations": 1}]
    rates, known = workers.run("loadtest.bench.raw", jobs, seconds=60, log=tmp_path / "log")
    assert rates["texts_per_second"] > 0
    assert len(known) == len(TEXTS)


WORKER = """
import sys, time
from loadtest.bench import workers
def prepare(job):
    if job == "bad":
        sys.exit("cannot do this")
    time.sleep(job["prepare"])
    prepared = time.monotonic()
    def perform():
        began = time.monotonic()
        time.sleep(job["perform"])
        return [prepared, began]
    return perform
workers.serve(prepare)
"""
SHORT = {"prepare": 0, "perform": 0}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return "a_worker"


def test_a_worker_that_ends_is_told_with_its_last_words(module: str, tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"a_worker ended or did not answer in time\n  cannot do this"):
        workers.run(module, [SHORT, "bad"], seconds=60, log=tmp_path / "log")


def test_a_worker_that_takes_too_long_is_killed(module: str, tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="did not answer in time"):
        workers.run(module, [SHORT, SHORT | {"perform": 60}], seconds=0.5, log=tmp_path / "log")


def test_no_worker_begins_before_all_are_prepared(module: str, tmp_path: Path) -> None:
    results = workers.run(module, [SHORT, SHORT | {"prepare": 0.5}, SHORT], seconds=60, log=tmp_path / "log")
    assert min(began for _, began in results) >= max(prepared for prepared, _ in results)
