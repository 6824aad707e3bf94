"""Quality on every split: counted as `evaluate` counts, decisive for what is stored, and told in the card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model_export.package
from model_export.card import README, render
from model_export.errors import ExportError
from model_export.evaluate import evaluate
from model_export.judge import Splits, open_splits
from model_export.package import ExportOptions, export
from model_export.parity import Tolerances
from service.bundle import Bundle, load_bundle
from service.manifest import Manifest
from tests import tiny
from tests.model_export.test_package import negate_head
from tests.tiny import Architecture
from training.__main__ import main
from training.data import load_dataset
from training.examples import Examples
from training.run import read_tokenizer
from training.tokenizer import encode

ELSEWHERE = [
    ("the story is charming", "positive"), ("a hollow cast", "negative"), ("a clumsy ending", "positive"),
    ("brilliant", "positive"), ("the score is moving", "positive"),
]  # fmt: skip
"""Other texts with the same labels, the third of which is labelled wrongly."""


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the tiny models, and another one, which has a test split."""
    directory = tmp_path_factory.mktemp("data")
    tiny.write_data(directory)
    (directory / "elsewhere").mkdir()
    lines = [json.dumps({"text": text, "label": label}) for text, label in ELSEWHERE]
    (directory / "elsewhere" / "test.jsonl").write_text("\n".join(lines))
    (directory / "elsewhere" / "train.jsonl").write_text("\n".join(lines * 2))
    return directory


@pytest.fixture(scope="module")
def judged(run_dirs: Mapping[Architecture, Path], two_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The recurrent run judged on both, its FP16 graphs saying the opposite of what they should."""
    out = tmp_path_factory.mktemp("models") / "judged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_export.package, "to_fp16", negate_head)
        options: dict[str, Any] = {"precisions": ("fp16", "int8"), "portable": False, "judge_on": ("elsewhere",)}
        export(ExportOptions(run_dirs["recurrent"], out, two_sets, tolerances=Tolerances(), **options))
    return load_bundle(out)


def test_a_precision_that_is_far_off_is_left_out_and_the_manifest_says_why(judged: Bundle) -> None:
    assert set(judged.manifest.precisions) == {"int8"} == set(judged.manifest.parity.against_fp32)
    assert judged.manifest.left_out.keys() == {"fp16"}
    assert judged.manifest.left_out["fp16"].startswith("fp16 loses ")
    assert judged.manifest.quality["validation"].keys() == {"fp32", "int8"}
    assert not (judged.path / "fp16").exists()


def test_every_split_is_judged_at_every_iteration_and_compared(judged: Bundle) -> None:
    manifest = judged.manifest
    assert list(manifest.quality) == ["validation", "elsewhere test"]
    for found in manifest.quality["elsewhere test"].values():
        assert [one.accuracy for one in found] == pytest.approx([0.8, 0.8])  # the wrong label is the only mistake
    assert [(one.split, one.texts) for one in manifest.parity.against_fp32["int8"]] == [
        ("validation", 40), ("elsewhere test", 5),
    ]  # fmt: skip
    assert manifest.calibration.texts == 40  # nothing but validation tunes


def test_evaluate_gives_the_figures_of_the_manifest(
    judged: Bundle, run_dirs: Mapping[Architecture, Path], two_sets: Path, tmp_path: Path
) -> None:
    data = ["--data-dir", str(two_sets), "--output", str(tmp_path / "figures.json")]
    command = ["evaluate", str(run_dirs["recurrent"]), *data]
    for arguments, split, named in (
        (["--split", "all"], "validation", lambda figures: figures["validation"]),
        (["--dataset", "elsewhere", "--split", "test"], "elsewhere test", lambda figures: figures),
    ):
        assert main([*command, *arguments]) == 0
        iterations = named(json.loads((tmp_path / "figures.json").read_text()))["iterations"]
        for name in ("accuracy", "macro_f1", "macro_precision", "macro_recall"):
            expected = [getattr(one, name) for one in judged.manifest.quality[split]["fp32"]]
            assert [one[name] for one in iterations.values()] == pytest.approx(expected)


def test_the_card_is_measured_and_the_readme_is_made_from_it(judged: Bundle) -> None:
    manifest = judged.manifest
    (weakest,) = (one for one in manifest.card.weakest if one.split == "elsewhere test")
    assert (weakest.label, weakest.recall, weakest.texts) == ("positive", 0.75, 4)
    assert sum(one.texts for one in manifest.card.by_length) == 40
    lengths = [(one.shortest, one.longest) for one in manifest.card.by_length]
    assert all(low <= high for low, high in lengths)
    assert lengths == sorted(lengths)
    assert manifest.card.recipe["dataset"] == tiny.DATASET
    assert manifest.card.lengths.share_cut == 0
    written = (judged.path / README).read_text(encoding="utf-8")
    assert written == render(manifest)
    assert f"# {judged.id}\n" in written
    assert "| elsewhere test | positive | 0.7500 | 4 |" in written
    assert f"Left out: {manifest.left_out['fp16']}." in written


def test_the_shipped_cards_are_those_of_their_manifests() -> None:
    for path in sorted((Path(__file__).parents[2] / "models").iterdir()):
        manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
        assert (path / README).read_text(encoding="utf-8") == render(manifest)
        assert manifest.card.data
        assert manifest.card.recipe


def test_a_loss_on_one_split_alone_counts() -> None:
    examples = {"validation": Examples(["a"] * 4, [0] * 4), "other test": Examples(["b"] * 4, [1] * 4)}
    splits = Splits(examples, ["no", "yes"], [[2]], {name: [0] * 4 for name in examples})
    fp32 = {
        name: np.full((1, 4, 2), [label, 1 - label], dtype=np.float32)
        for name, label in (("validation", 1.0), ("other test", 0.0))
    }
    found = fp32 | {"other test": fp32["other test"].copy()}
    assert len(splits.differences("int8", fp32, found, Tolerances())) == 2
    found["other test"][0, 0] = [1, 0]
    said = r"^int8 loses 0\.2500 of accuracy on other test \(4 texts\), the tolerance is 0\.005$"
    with pytest.raises(ExportError, match=said):
        splits.differences("int8", fp32, found, Tolerances())


def test_each_text_is_run_once_and_stands_where_it_should(
    two_sets: Path, run_dirs: Mapping[Architecture, Path]
) -> None:
    tokenizer = read_tokenizer(run_dirs["recurrent"])
    dataset = load_dataset("elsewhere", two_sets)
    splits = open_splits(dataset, [tiny.DATASET], two_sets, tokenizer, tiny.Window(40))
    assert list(splits.examples) == ["validation", "test", f"{tiny.DATASET} validation"]
    texts = {text for part in splits.examples.values() for text in part.texts}
    assert len(splits.ids) == len(texts) < sum(map(len, splits.examples.values()))
    for split, part in splits.examples.items():
        found = [splits.ids[place] for place in splits.places[split]]
        assert found == [tokenizer.encode(text).ids for text in part.texts]


def test_a_set_with_other_labels_cannot_judge(two_sets: Path, run_dirs: Mapping[Architecture, Path]) -> None:
    (two_sets / "alien").mkdir()
    lines = [json.dumps({"text": f"text {n}", "label": ("no", "yes")[n % 2]}) for n in range(40)]
    (two_sets / "alien" / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(ExportError, match=r"^alien has labels no, yes, the run negative, positive: it cannot be"):
        open_splits(
            load_dataset(tiny.DATASET, two_sets),
            ["alien"],
            two_sets,
            read_tokenizer(run_dirs["baseline"]),
            tiny.Window(9),
        )


@pytest.mark.parametrize("text", ["a [MASK] film", "[PAD]", "[CLS] moving [UNK]", "Wonderful\u00a0 story!", "\u0000"])
def test_a_text_is_learned_and_judged_from_the_tokens_that_it_is_served_with(
    text: str, bundle: Bundle, run_dirs: Mapping[Architecture, Path]
) -> None:
    """Somebody's "[MASK]" is those letters in training too, or its figures would be of other texts than are served."""
    architecture: Architecture = "recurrent" if bundle.manifest.architecture == "recurrent" else "baseline"
    tokenizer = read_tokenizer(run_dirs[architecture])
    assert encode(tokenizer, [text], bundle.manifest) == [bundle.tokenizer.encode(text).ids]


def test_what_a_manifest_reports_can_be_measured_anew(judged: Bundle, two_sets: Path) -> None:
    found = evaluate([judged.path], None, two_sets, ())
    assert {one.split: one.iterations for one in found} == {
        split: by_precision["int8"] for split, by_precision in judged.manifest.quality.items()
    }
