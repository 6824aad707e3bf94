"""The linear model: it learns, is read back as it was, is measured and teaches as networks do, and is no network."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from model_export.__main__ import main as export_main
from tests.training.easy import easy_records, metrics, tiny_arguments, tiny_config, write_easy, write_jsonl
from training import linear
from training import run as runs
from training.__main__ import main
from training.config import LinearConfig
from training.data import load_dataset
from training.errors import TrainingError
from training.evaluate import evaluate, read_classifier
from training.linear import LinearModel, count_words, fit, read_linear, weigh
from training.loop import train
from training.record import cost
from training.shapes import Reading

TEXTS = [record["text"] for record in easy_records(60)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _few_columns() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(linear, "FEATURES", 2**12)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def floor(easy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "linear"
    fit(LinearConfig("easy", easy_dir, directory))
    return directory


def test_a_text_is_weighed_as_by_hand() -> None:
    """Words and pairs in lower case, marks of exclamation and question as words; no comma, no full stop."""
    counts_NV = count_words(["So, SO good!", "", "so"], 2**18)
    assert sorted(counts_NV[0].data) == [1, 1, 1, 1, 1, 2], "good, !, so so, so good, good !; and so twice"
    (so,) = counts_NV[2].indices
    idf_V = np.ones(2**18, np.float32)
    idf_V[so] = 3
    x_NV = weigh(counts_NV, idf_V)
    weight = 3 * (1 + np.log(2))
    assert x_NV[0, so] == pytest.approx(weight / np.sqrt(weight**2 + 5))
    assert (x_NV[1].nnz, x_NV[2].data.tolist()) == (0, [1.0])


def test_it_learns_and_is_read_back_as_it_was(floor: Path, easy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[LinearModel] = []
    solve = linear._solve

    def slowly(*given: Any) -> LinearModel:
        time.sleep(0.02)  # so that there are hours to be told of, to the hundredth of a second
        fitted.append(solve(*given))
        return fitted[0]

    monkeypatch.setattr(linear, "_solve", slowly)
    figures = fit(LinearConfig("easy", easy_dir, floor))  # the same options again: the same run
    assert figures["accuracy"] > 0.9
    logits_RNC = read_linear(floor).logits(TEXTS)
    assert logits_RNC.shape == (1, 60, 2)
    assert torch.equal(logits_RNC, fitted[0].logits(TEXTS))
    assert logits_RNC.dtype == torch.float32
    assert torch.equal(logits_RNC[:, :1], fitted[0].logits(TEXTS[:1])), "of a text alone as among others"
    validation = [{name: round(figures[name], 4) for name in ("accuracy", "macro_f1")}]
    assert metrics(floor) == [{"step": 1, "epoch": 1, "validation": validation}]
    found = cost(floor)
    assert (found["stage"], found["architecture"], found["steps"], found["precision"]) == (
        "linear",
        "linear",
        None,
        None,
    )
    assert found["hours"] > 0


def test_the_run_says_what_it_is(floor: Path) -> None:
    info = runs.read_info(floor)
    assert (info.task, info.labels, info.architecture) == ("easy", ["bad", "good"], "linear")
    assert info.encoder == {"features": 2**12, "classes": 2}
    assert info.options == {"architecture": "linear", "dataset": "easy", "seed": 13}
    assert info.provenance["run_id"].startswith("easy-linear-")
    assert info.provenance["texts"] == {"train": 60, "validation": 21}
    assert set(info.provenance["versions"]) == {"scikit-learn", "numpy"}


def test_two_classes_probabilities_are_the_regressions(floor: Path, easy_dir: Path) -> None:
    train_texts = load_dataset("easy", easy_dir).train
    model = read_linear(floor)
    x_NV = weigh(count_words(train_texts.texts, 2**12), model.idf_V)
    regression = LogisticRegression(C=4, solver="liblinear").fit(x_NV, train_texts.labels)
    probabilities_NC = model.logits(train_texts.texts)[0].softmax(-1).numpy()
    np.testing.assert_allclose(probabilities_NC, regression.predict_proba(x_NV), atol=1e-3)


def test_what_a_single_text_has_says_nothing(floor: Path, tmp_path: Path) -> None:
    write_easy(tmp_path)
    records = easy_records(60)
    records[1]["text"] += " zebra"
    write_jsonl(tmp_path / "easy" / "train.jsonl", records)
    fit(LinearConfig("easy", tmp_path, tmp_path / "run"))
    without, zebra = read_linear(tmp_path / "run").logits(["", "zebra"])[0]
    assert torch.equal(zebra, without)


def test_three_labels_are_learned(tmp_path: Path) -> None:
    records = easy_records(90)
    for record in records[::3]:
        record |= {"label": "so-so", "text": f"{record['text']} middling"}
    write_jsonl(tmp_path / "three" / "train.jsonl", records)
    fit(LinearConfig("three", tmp_path, tmp_path / "run"))
    labels = runs.read_info(tmp_path / "run").labels
    assert labels == ["bad", "good", "so-so"]
    said = read_linear(tmp_path / "run").logits(["an awful film", "a brilliant film", "some middling film"])[0]
    assert said.argmax(-1).tolist() == [0, 1, 2]


def test_it_is_evaluated_as_a_network_is_with_one_iteration(
    floor: Path, easy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(floor), "--data-dir", str(easy_dir), "--split", "all"]) == 0
    written = json.loads((floor / "evaluation.json").read_text())
    assert list(written) == ["validation", "test"]
    figures = written["validation"]
    assert list(figures["iterations"]) == ["1"]
    assert figures["iterations"]["1"]["accuracy"] == pytest.approx(metrics(floor)[0]["validation"][0]["accuracy"], 1e-3)
    assert figures["parameters"] == 3 * 2**12 + 2 == sum(t.numel() for t in load_file(floor / runs.WEIGHTS).values())
    assert "easy-linear-" in capsys.readouterr().out
    with pytest.raises(TrainingError, match=r"^--iterations 2: .* for a recurrent model only, not linear$"):
        evaluate(floor, easy_dir, "validation", None, 2)
    with pytest.raises(
        TrainingError, match=r"is linear, and reads all of a text: leave --max-tokens and --tail-tokens out$"
    ):
        evaluate(floor, easy_dir, "validation", None, None, Reading(tail_tokens=4))


def test_it_teaches_alone_and_beside_a_network(floor: Path, run: Path, easy_dir: Path, tmp_path: Path) -> None:
    train(tiny_config(easy_dir, tmp_path / "alone", teacher=(floor,), teacher_weight=0.9, num_epochs=1))
    train(tiny_config(easy_dir, tmp_path / "both", teacher=(floor, run), num_epochs=1))
    alone, both = (load_file(tmp_path / name / "teacher.safetensors")["logits"] for name in ("alone", "both"))
    floor_NC, network_NC = (read_classifier(one, CPU).logits(TEXTS)[-1] for one in (floor, run))
    torch.testing.assert_close(alone, floor_NC)
    torch.testing.assert_close(both, (floor_NC + network_NC) / 2)
    assert runs.read_info(tmp_path / "alone").options["teacher"] == [runs.read_info(floor).provenance["run_id"]]


def test_it_neither_begins_a_network_nor_is_exported(
    floor: Path, easy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complaint = f"{floor} is linear, not a network: it can be evaluated, and be a --teacher\n"
    assert main(tiny_arguments(easy_dir, tmp_path / "run", init_from=floor)) == 1
    assert capsys.readouterr().err == f"training: {complaint}"
    assert not (tmp_path / "run").exists()
    assert export_main([str(floor), str(tmp_path / "bundle"), "--data-dir", str(easy_dir)]) == 1
    assert capsys.readouterr().err == f"model_export: {complaint}"


def test_a_teacher_of_other_labels_is_refused(floor: Path, tmp_path: Path) -> None:
    records = [one | {"label": "no" if one["label"] == "bad" else "yes"} for one in easy_records(30)]
    write_jsonl(tmp_path / "answers" / "train.jsonl", records)
    with pytest.raises(TrainingError, match="knows the labels bad, good, not no, yes"):
        train(tiny_config(tmp_path, tmp_path / "run", dataset="answers", teacher=(floor,)))
    with pytest.raises(TrainingError, match=r"^answers has labels no, yes, the run bad, good$"):
        evaluate(floor, tmp_path, "validation", "answers", None)


def test_no_other_run_is_overwritten(floor: Path, run: Path, easy_dir: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for one in (floor, run) for path in one.iterdir()}
    write_easy(tmp_path, "alike")
    with pytest.raises(TrainingError, match=r"holds a run with other options \(dataset\): choose another --output-dir"):
        fit(LinearConfig("alike", tmp_path, floor))
    with pytest.raises(TrainingError, match=r"holds a run with other options \(architecture\)"):
        fit(LinearConfig("easy", easy_dir, run))
    with pytest.raises(TrainingError, match=r"holds a run with other options .*architecture"):
        train(tiny_config(easy_dir, floor))
    assert {path: path.read_bytes() for one in (floor, run) for path in one.iterdir()} == before


def test_it_is_fitted_again_to_the_same_texts_alone(floor: Path, easy_dir: Path, tmp_path: Path) -> None:
    """Others would leave a run whose configuration tells of texts that it has not seen."""
    again = Path(shutil.copytree(floor, tmp_path / "again"))
    fit(LinearConfig("easy", easy_dir, again))
    assert runs.read_info(again) == runs.read_info(floor)
    write_easy(tmp_path, train=62)
    with pytest.raises(TrainingError, match="was begun with other texts"):
        fit(LinearConfig("easy", tmp_path, again))


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "is missing"), (b"no weights", "does not hold a linear model's weights")]
)
def test_missing_or_broken_weights_are_said(
    content: bytes | None, complaint: str, floor: Path, easy_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / runs.CONFIG).write_bytes((floor / runs.CONFIG).read_bytes())
    if content is not None:
        (tmp_path / runs.WEIGHTS).write_bytes(content)
    with pytest.raises(TrainingError, match=complaint):
        evaluate(tmp_path, easy_dir, "validation", None, None)
