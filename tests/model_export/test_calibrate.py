"""Calibration: figures counted by hand, temperatures that are known, and a curve that the service keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

import model_export.calibrate
from model_export.__main__ import main
from model_export.calibrate import (
    THRESHOLDS,
    bins,
    calibrate,
    calibration_error,
    choose_threshold,
    exit_curve,
    fit_temperature,
    probabilities,
)
from model_export.inspect import inspect
from model_export.package import export
from model_export.parity import run_engine
from service.app import create_app
from service.bundle import MANIFEST, Bundle, load_bundle
from service.engine import open_engine
from service.manifest import ExitPoint, Manifest, content_version
from service.settings import Settings
from tests import tiny
from tests.model_export.test_package import altered_run, export_options
from tests.service.fakes import wait_until
from tests.tiny import Architecture
from training.data import load_dataset
from training.run import read_info

FloatArray = NDArray[np.floating]


def drawn(texts: int, temperature: float, seed: int = 3) -> tuple[FloatArray, NDArray[np.integer]]:
    """Logits of three classes whose labels are drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits_NC = rng.normal(0, 3, (texts, 3))
    edges_NC = probabilities(logits_NC[None], [temperature])[0].cumsum(axis=1)
    return logits_NC, (rng.random((texts, 1)) > edges_NC[:, :-1]).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_the_temperature_that_labels_were_drawn_at_is_found_and_makes_the_error_small(temperature: float) -> None:
    logits_NC, truth_N = drawn(20_000, temperature)
    found = fit_temperature(logits_NC, truth_N)
    assert found == pytest.approx(temperature, rel=0.05)
    assert calibration_error(probabilities(logits_NC[None], [found])[0], truth_N) < 0.015
    if temperature != 1:
        assert calibration_error(probabilities(logits_NC[None], [1.0])[0], truth_N) > 0.03


def test_a_split_without_a_mistake_asks_for_no_extreme_and_a_handful_for_hardly_anything() -> None:
    logits_NC, truth_N = np.array([[4.0, 0.0]] * 1000), np.zeros(1000, dtype=int)
    assert 0.2 < fit_temperature(logits_NC, truth_N) < 1
    assert 1 < fit_temperature(logits_NC, truth_N + 1) < 50
    assert fit_temperature(logits_NC[:4], truth_N[:4]) == pytest.approx(1, abs=0.2)


def test_the_error_is_the_one_counted_by_hand() -> None:
    # 0.9 and 0.93 share the 14th bin (13/15 to 14/15), 0.6 closes the 9th in which 0.55 is, 1.0 the 15th
    best = [0.9, 0.93, 0.6, 1.0, 1.0, 0.55]
    right = [True, False, True, True, False, True]
    found_NC = np.array([[value, 1 - value] for value in best])
    truth_N = np.array([0 if one else 1 for one in right])
    counted = [(one.texts, one.confidence, one.accuracy) for one in bins(found_NC, truth_N)]
    assert counted == [(2, pytest.approx(0.575), 1.0), (2, pytest.approx(0.915), 0.5), (2, 1.0, 0.5)]
    assert calibration_error(found_NC, truth_N) == pytest.approx((2 * 0.425 + 2 * 0.415 + 2 * 0.5) / 6)


def test_the_exit_curve_is_the_one_counted_by_hand() -> None:
    best_RN = np.array([[0.7, 0.5, 1.0], [0.6, 0.9, 0.6], [0.8, 0.8, 0.8]])
    found_RNC = np.stack([best_RN, 1 - best_RN], axis=-1)
    found_RNC[0, 0] = found_RNC[0, 0, ::-1]  # the first text is wrong after one iteration
    points = {point.threshold: point for point in exit_curve(found_RNC, np.zeros(3, dtype=int))}
    assert tuple(points) == THRESHOLDS
    counted = {t: (p.accuracy, p.mean_iterations, p.changed) for t, p in points.items()}
    assert counted[0.5] == pytest.approx((2 / 3, 1.0, 1))
    assert counted[0.7] == pytest.approx((2 / 3, (1 + 2 + 1) / 3, 1))
    assert counted[0.75] == pytest.approx((1, (3 + 2 + 1) / 3, 0))
    assert counted[0.995] == pytest.approx((1, (3 + 3 + 1) / 3, 0))
    assert counted[1.0] == pytest.approx((1, 3, 0))  # never, also for the text that is perfectly sure


def curve(*points: tuple[float, float, int]) -> list[ExitPoint]:
    """Of (accuracy, mean iterations, texts changed), for rising thresholds; the last is full depth."""
    return [
        ExitPoint(threshold=threshold, accuracy=accuracy, mean_iterations=mean, changed=changed)
        for threshold, (accuracy, mean, changed) in zip((0.5, 0.7, 0.9, 1.0), points, strict=True)
    ]


FULL, FREE = (0.9, 2.0, 0), (0.9, 1.2, 0)


@pytest.mark.parametrize(
    ("curves", "texts", "chosen"),
    [
        ([curve(FREE, FREE, FREE, FULL)], 1000, 0.5),
        ([curve((0.890, 1.0, 10), FREE, FREE, FULL)], 1000, 0.7),
        ([curve((0.899, 1.0, 1), FREE, FREE, FULL)], 1000, 0.7),  # 0.1 points lost, and as much again uncertain
        ([curve((0.899, 1.0, 99), FREE, FREE, FULL)], 100_000, 0.5),
        ([curve((0.897, 1.0, 99), FREE, FREE, FULL)], 100_000, 0.7),  # sure enough, and too much
        ([curve((0.910, 1.0, 10), FREE, FREE, FULL)], 1000, 0.5),
        ([curve((0.910, 1.0, 9), (0.88, 1.1, 20), FREE, FULL)], 1000, 0.9),  # good again below bad is luck
        ([curve(FREE, FREE, FREE, FULL), curve((0.890, 1.0, 10), FREE, FREE, FULL)], 1000, 0.7),  # in each precision
        ([curve(FREE, FREE, FREE, FULL)], 499, None),  # one text is more than the loss that is allowed
        ([curve(FREE, FREE, FREE, FULL)], 500, 0.5),
        ([curve((0.8, 1.0, 100), (0.8, 1.1, 100), (0.8, 1.2, 100), FULL)], 1000, None),
        ([curve((0.8, 1.0, 100), (0.8, 1.1, 100), FULL, FULL)], 1000, None),  # free, and saves nothing
    ],
)
def test_the_edges_of_choosing_a_threshold(
    curves: Sequence[Sequence[ExitPoint]], texts: int, chosen: float | None
) -> None:
    assert choose_threshold(curves, texts) == chosen


def test_each_iteration_gets_its_own_temperature_and_all_precisions_share_them() -> None:
    logits_NC, truth_N = drawn(5000, 1.0)
    fp32 = np.stack([logits_NC * 3, logits_NC / 2])
    found = calibrate("validation", {"fp32": fp32, "int8": fp32 * 1.01}, truth_N.tolist())
    assert found.temperatures == pytest.approx([3, 0.5], rel=0.05)
    assert [one.before > 3 * one.after for one in (*found.ece["fp32"], *found.ece["int8"])] == [True] * 4
    assert [len(one.before) > 5 for one in found.reliability] == [True] * 2
    assert found.exit_curve.keys() == {"fp32", "int8"}
    assert (found.split, found.texts, found.exit_threshold) == ("validation", 5000, 0.5)  # both label alike


def test_a_model_of_one_iteration_has_nothing_to_leave_early() -> None:
    logits_NC, truth_N = drawn(1000, 2.0)
    found = calibrate("validation", {"fp32": logits_NC[None]}, truth_N.tolist())
    assert (len(found.temperatures), found.exit_threshold, found.exit_curve) == (1, None, {})


def test_every_bundle_is_calibrated(bundle: Bundle) -> None:
    calibration, iterations = bundle.manifest.calibration, bundle.manifest.iterations
    assert len(calibration.temperatures) == len(calibration.reliability) == iterations
    assert all(len(found) == iterations for found in calibration.ece.values())
    assert calibration.ece.keys() == {"fp32", "fp16", "int8"}
    assert set(calibration.exit_curve) == (set(calibration.ece) if iterations > 1 else set())
    assert (calibration.split, calibration.texts, calibration.exit_threshold) == ("validation", 40, None)
    for name, points in calibration.exit_curve.items():
        assert points[-1].accuracy == bundle.manifest.quality["validation"][name][-1].accuracy


def recalibrated(bundle: Path, to: Path, **changed: Any) -> Path:
    """A copy with other entries in its calibration, and the version that follows."""
    shutil.copytree(bundle, to)
    document = json.loads((to / MANIFEST).read_text())
    document["calibration"] |= changed
    document["version"] = content_version(Manifest.model_validate(document))
    (to / MANIFEST).write_text(json.dumps(document))
    return to


def test_the_service_brings_what_the_curve_promises(
    models_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [json.loads(line) for line in (data_dir / tiny.DATASET / "validation.jsonl").read_text().splitlines()]
    texts, labels = [record["text"] for record in records], [record["label"] for record in records]
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-recurrent")
    engine = open_engine(bundle, provider="cpu", precision="int8", threads=1)
    logits_RNC = run_engine(engine, [one.ids for one in bundle.tokenizer.encode_batch(texts)], 2)
    temperatures = np.median(np.abs(np.diff(logits_RNC)), axis=(1, 2)).tolist()  # nobody is very sure
    truth_N = np.array([bundle.manifest.labels.index(label) for label in labels])
    found_RNC = probabilities(logits_RNC, temperatures)
    first_N = np.unique(found_RNC[0].max(axis=-1))
    gaps_N = np.sort(
        np.argsort(np.diff(first_N))[-4:]
    )  # between texts that are far apart, so that rounding is no matter
    thresholds = [float(first_N[gap : gap + 2].mean()) for gap in gaps_N]
    monkeypatch.setattr(model_export.calibrate, "THRESHOLDS", (0.5, *thresholds, 1.0))
    points = exit_curve(found_RNC, truth_N)
    assert len({point.mean_iterations for point in points}) == 6
    default = thresholds[1]
    recalibrated(bundle.path, tmp_path / "models" / bundle.path.name, temperatures=temperatures, exit_threshold=default)
    with TestClient(create_app(Settings(models_dir=tmp_path / "models"))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
        for point in points:
            asked = {} if point.threshold == default else {"exit_threshold": point.threshold}
            results = client.post("/classify", json={"inputs": texts} | asked).json()["results"]
            right = [result["label"] == label for result, label in zip(results, labels, strict=True)]
            assert np.mean(right) == pytest.approx(point.accuracy)
            assert np.mean([result["iterations"] for result in results]) == pytest.approx(point.mean_iterations)


def test_without_a_validation_file_the_tenth_that_training_kept_aside_calibrates_and_sets_no_threshold(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path
) -> None:
    own = tmp_path / "data" / tiny.DATASET
    own.mkdir(parents=True)
    shutil.copy(data_dir / tiny.DATASET / "train.jsonl", own)
    dataset, provenance = load_dataset(tiny.DATASET, own.parent), read_info(run_dirs["recurrent"]).provenance
    del provenance["texts_sha256"]  # of the data with its validation file
    provenance["texts"] = {"train": len(dataset.train), "validation": len(dataset.validation)}
    run = altered_run(run_dirs["recurrent"], tmp_path / "run", provenance=provenance)
    found = load_bundle(export(export_options(run, tmp_path / "out", own.parent))).manifest
    assert (found.calibration.texts, found.calibration.exit_threshold) == (8, None)
    assert all(0.3 < temperature < 3 for temperature in found.calibration.temperatures)  # eight texts move it little
    assert "by default never: 8 texts show no threshold" in inspect(tmp_path / "out")


def test_inspect_prints_calibration_and_exit_curve_and_draws_them(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "calibration.png"
    assert main(["inspect", str(bundle.path), "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    calibration = bundle.manifest.calibration
    assert ", ".join(f"{one:.4f}" for one in calibration.temperatures) + " (validation, 40 texts)" in printed
    assert printed.count("calibration error without and with it") == 3
    for points in calibration.exit_curve.values():
        for point in points:
            assert f"{point.accuracy:.4f}, {point.mean_iterations:.2f}" in printed
    assert ("one iteration, so no text leaves early" in printed) == (bundle.manifest.iterations == 1)


def test_a_figure_that_cannot_be_written_is_said_in_one_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bundle.path), "--figure", str(tmp_path / "nowhere" / "a.png")]) == 1
    assert capsys.readouterr().err.endswith("a.png cannot be written: No such file or directory\n")


@pytest.mark.parametrize(
    ("mean", "said"),
    [(1.4, "saves 30% of the iterations\n"), (1.8, "saves 10% of the iterations, not the 25% aimed at\n")],
)
def test_inspect_says_what_the_default_saves_and_when_that_is_little(
    models_dir: Path, tmp_path: Path, mean: float, said: str
) -> None:
    full = {"threshold": 1.0, "accuracy": 1.0, "mean_iterations": 2.0, "changed": 0}
    curve = [full | {"threshold": 0.8, "mean_iterations": mean, "changed": 3}, full]
    changed = {"exit_threshold": 0.8, "exit_curve": {"fp32": curve, "int8": curve}}
    printed = inspect(recalibrated(models_dir / f"{tiny.DATASET}-recurrent", tmp_path / "bundle", **changed))
    assert "by default at 0.8: makes 3 of 40 texts right or wrong, " + said in printed
    assert "\n  exit        0.8 *" in printed
