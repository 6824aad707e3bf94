"""Time by precision, and the experiment that shows it beside what each precision costs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model_export.__main__ import main
from model_export.speed import speed
from service.bundle import MANIFEST, load_bundle
from service.engine import Engine
from tests import tiny
from tests.tiny import Architecture
from training.experiments.cells import Cell, Exam
from training.experiments.children import Children
from training.experiments.gather import Finished, of_precisions
from training.experiments.run import is_of


def test_every_stored_precision_is_timed(models_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    bundles = [models_dir / f"{tiny.DATASET}-{name}" for name in tiny.ARCHITECTURES]
    texts, output = data_dir / tiny.DATASET / "validation.jsonl", tmp_path / "speed.json"
    arguments = ["speed", *bundles, "--texts", texts, "--output", output, "--rounds", 2, "--most", 20]
    assert main([str(one) for one in arguments]) == 0
    found = json.loads(output.read_text())
    assert found.keys() == {bundle.name for bundle in bundles}
    for bundle in bundles:
        manifest = load_bundle(bundle).manifest
        for name, stored in manifest.precisions.items():
            one = found[bundle.name][name]
            assert one["bytes"] == sum(graph.bytes for graph in stored.graphs.values())
            assert one["milliseconds_per_text"] > 0
        assert found[bundle.name]["fp16"]["run_as"] == "fp32 on cpu"
        assert found[bundle.name]["int8"]["run_as"] == "int8 on cpu"


def test_one_thread_is_timed(models_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, busy = 0, threading.Lock()
    step = Engine.step

    def watched(*given: Any) -> Any:
        nonlocal steps
        assert busy.acquire(blocking=False), "another batch runs"
        time.sleep(0.002)
        steps += 1
        busy.release()
        return step(*given)

    monkeypatch.setattr("model_export.parity.BATCH_TOKENS", 1)
    monkeypatch.setattr(Engine, "step", watched)
    texts = data_dir / tiny.DATASET / "validation.jsonl"
    speed([models_dir / f"{tiny.DATASET}-baseline"], texts, most=20, rounds=1)
    assert steps >= 10


def test_a_bundle_is_known_by_the_run_that_it_was_made_of(
    models_dir: Path, run_dirs: Mapping[Architecture, Path], tmp_path: Path
) -> None:
    bundle = models_dir / f"{tiny.DATASET}-recurrent"
    assert is_of(bundle, run_dirs["recurrent"])
    assert not is_of(bundle, run_dirs["baseline"])
    assert not is_of(tmp_path, run_dirs["recurrent"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "--rounds 0 --most 512: at least 1 of each is needed"),
        (["--most", "0"], "--rounds 5 --most 0: at least 1 of each is needed"),
    ],
)
def test_what_cannot_be_timed_is_said(
    arguments: list[str], complaint: str, models_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = data_dir / tiny.DATASET / "validation.jsonl"
    bundle = models_dir / f"{tiny.DATASET}-baseline"
    assert main(["speed", str(bundle), "--texts", str(texts), "--output", "none.json", *arguments]) == 1
    assert capsys.readouterr().err == f"model_export: {complaint}\n"


def test_the_precision_experiment_reads_what_the_export_wrote(
    models_dir: Path, data_dir: Path, run_dirs: Mapping[Architecture, Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundles" / f"{tiny.DATASET}-recurrent"
    shutil.copytree(models_dir / bundle.name, bundle)
    document = json.loads((bundle / MANIFEST).read_text())
    document["quality"] = {"test": document["quality"]["validation"]}
    (bundle / MANIFEST).write_text(json.dumps(document))
    texts = tmp_path / "data" / f"{tiny.DATASET}-13" / "test.jsonl"
    texts.parent.mkdir(parents=True)
    shutil.copy(data_dir / tiny.DATASET / "validation.jsonl", texts)
    cell = Cell("", "recurrent", tiny.DATASET, 1, (Exam("exam", tiny.DATASET),), {"fp32": 0.5, "fp16": 0.4})
    figures = {cell.tests[0].key: {"parameters": 7, "iterations": {"1": {"texts": 40}}}}
    finished = Finished(cell, 13, run_dirs["recurrent"], figures, bundle)
    results, sizes = of_precisions([finished], tmp_path, Children(1))
    assert [(one.row, one.published) for one in results] == [("FP32", 0.5), ("FP16", 0.4), ("INT8", None)]
    quality = document["quality"]["test"]
    assert [one.last for one in results] == [quality[name][-1] for name in ("fp32", "fp16", "int8")]
    assert {(one.test, one.texts, one.trained_on) for one in results} == {("exam", 40, 80)}
    assert [(one.how, one.parameters) for one in sizes] == [
        ("FP16, run as fp32 on cpu", 7), ("INT8, run as int8 on cpu", 7),
    ]  # fmt: skip
    assert all(one.milliseconds_per_text > 0 for one in sizes)
