"""Bundles measured anew: on what their manifests report, and on texts of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_export.__main__ import main
from model_export.evaluate import Figures, compare
from service.bundle import MANIFEST, load_bundle
from service.manifest import Quality
from tests import tiny

OWN = [("a moving story", "positive"), ("a hollow cast", "negative"), ("the score is brilliant", "positive"),
       ("a clumsy ending", "positive")]  # fmt: skip
"""The last one is labelled wrongly."""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in OWN))
    return path


def bundles_in(models_dir: Path) -> list[Path]:
    return [models_dir / f"{tiny.DATASET}-{name}" for name in tiny.ARCHITECTURES]


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_the_manifests_figures_come_out_again(
    models_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles, output = bundles_in(models_dir), tmp_path / "figures.json"
    assert evaluate(*bundles, "--data-dir", data_dir, "--output", output) == 0
    found = json.loads(output.read_text())["figures"]
    assert {(one["bundle"], one["precision"]) for one in found} == {
        (bundle.name, name) for bundle in bundles for name in ("fp16", "int8")
    }
    for one in found:
        manifest = load_bundle(models_dir / one["bundle"]).manifest
        said = [quality.model_dump() for quality in manifest.quality[one["split"]][one["precision"]]]
        assert one["iterations"] == one["manifest"] == said
        assert one["texts"] == 40
        assert one["as_served"]["exit_threshold"] == manifest.calibration.exit_threshold
    assert "DIFFERS" not in capsys.readouterr().out


def test_a_manifest_that_says_more_than_is_true_is_told(
    models_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles_in(models_dir)[0], bundle)
    document = json.loads((bundle / MANIFEST).read_text())
    document["quality"]["validation"]["int8"][0]["accuracy"] = 0.123
    (bundle / MANIFEST).write_text(json.dumps(document))
    assert evaluate(bundle, "--data-dir", data_dir) == 1
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if "DIFFERS" in line)
    assert "int8" in line
    assert "0.1230" in line
    assert printed.err == "model_export: 1 of 2 differ from what the manifest says\n"


def test_a_split_that_the_data_has_not_is_said(
    models_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles_in(models_dir)[0], bundle)
    document = json.loads((bundle / MANIFEST).read_text())
    document["quality"]["test"] = document["quality"]["validation"]
    (bundle / MANIFEST).write_text(json.dumps(document))
    assert evaluate(bundle, "--data-dir", data_dir) == 1
    assert capsys.readouterr().err == f"model_export: the data has no test, which the manifest of {bundle} reports\n"


def test_bundles_of_the_same_name_are_told_apart_by_their_paths(
    models_dir: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, other = tmp_path / "old" / "it", tmp_path / "new" / "it", tmp_path / "other"
    for folder, source in zip((old, new, other), (*bundles_in(models_dir), bundles_in(models_dir)[0]), strict=True):
        shutil.copytree(source, folder)
    assert evaluate(old, new, other, "--texts", own, "--precisions", "int8") == 0
    printed = capsys.readouterr().out
    for one, another in ((old, new), (old, "other"), (new, "other")):
        assert f"{one} against {another}, int8, own.jsonl: " in printed


def test_where_figures_cannot_go_is_said_before_the_work(
    models_dir: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (tmp_path, own / "figures.json"):
        assert evaluate(bundles_in(models_dir)[0], "--texts", own, "--output", output) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith(f"model_export: {output} cannot be written: ")
        assert not printed.out
    output = tmp_path / "not" / "yet" / "there.json"
    assert evaluate(bundles_in(models_dir)[0], "--texts", own, "--output", output) == 0
    assert output.exists()


def test_texts_of_one_s_own(models_dir: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    assert evaluate(*bundles_in(models_dir), "--texts", own, "--precisions", "int8", "--output", output) == 0
    found = json.loads(output.read_text())
    assert [one["split"] for one in found["figures"]] == ["own.jsonl"] * 2
    for one in found["figures"]:
        assert one["texts"] == 4
        assert one["as_served"]["accuracy"] == one["iterations"][-1]["accuracy"] == 0.75
        assert one["manifest"] is None
    (comparison,) = found["comparisons"]
    assert (comparison["difference"], comparison["standard_error"]) == (0, 0)
    recurrent, baseline = (bundle.name for bundle in bundles_in(models_dir))
    assert f"{recurrent} against {baseline}, int8, own.jsonl: +0.00 +- 0.00" in capsys.readouterr().out


def figures(bundle: str, right: str, **changed: Any) -> Figures:
    quality = [Quality(accuracy=0.5, macro_f1=0.5)]
    right_N = np.array([letter == "+" for letter in right])
    texts = [f"text {number}" for number in range(len(right))]
    fields: dict[str, Any] = {"precision": "int8", "split": "test", "texts": texts}
    fields |= {"iterations": quality, "exit_threshold": None, "mean_iterations": 1.0, "manifest": None}
    return Figures(bundle, right=right_N, **fields | changed)


def test_bundles_are_compared_where_they_answered_the_same_texts() -> None:
    one, other = figures("one", "+++--+++++"), figures("other", "---+-+++++")
    elsewhere, fewer = figures("else", "++++++++++", split="validation"), figures("fewer", "+++")
    its_own = figures("its own", "++++++++++", texts=[f"another {number}" for number in range(10)])
    (found,) = compare([one, elsewhere, its_own, other, fewer, figures("one", "----------", precision="fp16")])
    assert (found.bundle, found.other) == ("one", "other")
    assert found.difference == pytest.approx((3 - 1) / 10)
    each = one.right.astype(float) - other.right
    assert found.standard_error == pytest.approx(each.std() / np.sqrt(10))


@pytest.mark.parametrize(
    ("texts", "more", "differs"), [(100, 2, False), (100, 3, True), (10_000, 19, False), (10_000, 21, True)]
)
def test_another_cpu_may_turn_two_texts_or_one_in_five_hundred(texts: int, more: int, differs: bool) -> None:
    right = texts // 2
    said, found = (Quality(accuracy=count / texts, macro_f1=0.5) for count in (right, right + more))
    one = figures("one", "+" * texts, iterations=[found], manifest=[said])
    assert one.differs is differs


def test_a_label_that_the_bundle_does_not_know_is_said(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "fine", "label": "meh"}))
    assert evaluate(bundles_in(models_dir)[0], "--texts", path) == 1
    known = "known: negative, positive (or 0 to 1)"
    assert capsys.readouterr().err == f"model_export: {path}, row 1: unknown label 'meh'; {known}\n"


def test_without_a_bundle_there_is_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 1
    assert capsys.readouterr().err == "model_export: no bundle: give the directories of some\n"


def test_a_precision_that_is_not_there_is_said(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    assert evaluate(root / "models" / "domain-baseline", "--texts", own, "--precisions", "fp16") == 1
    assert capsys.readouterr().err.endswith("domain-baseline has no fp16; it has int8\n")
