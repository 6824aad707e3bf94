"""The figures: right against counting by hand, per class and per iteration, as JSON and as a table."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.training.easy import LABELS, easy_records, tiny_config, write_easy, write_jsonl
from training import run as runs
from training.__main__ import main
from training.architectures import Encoder
from training.errors import TrainingError
from training.evaluate import evaluate, predict, read_classifier, table
from training.loop import train
from training.scores import score
from training.shapes import AS_IN_TRAINING, Reading

#          truth:    a  a  a  a  b  b  b  c  c  c
TRUTH, PREDICTED = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 2, 1, 1, 0, 0, 0, 0]


def test_the_scores_are_those_counted_by_hand() -> None:
    figures = score(TRUTH, PREDICTED, ["a", "b", "c"])
    assert figures["confusion_matrix"] == [[2, 1, 1], [1, 2, 0], [3, 0, 0]]
    assert figures["texts"] == 10
    assert figures["accuracy"] == pytest.approx(4 / 10)
    precision, recall = (2 / 6, 2 / 3, 0 / 1), (2 / 4, 2 / 3, 0 / 3)
    f1 = (2 * 2 / (6 + 4), 2 * 2 / (3 + 3), 0)  # 2 hits / (predicted + true)
    assert figures["macro_precision"] == pytest.approx(sum(precision) / 3)
    assert figures["macro_recall"] == pytest.approx(sum(recall) / 3)
    assert figures["macro_f1"] == pytest.approx(sum(f1) / 3)
    for label, p, r, f, texts in zip("abc", precision, recall, f1, (4, 3, 3), strict=True):
        assert figures["per_class"][label] == pytest.approx({"precision": p, "recall": r, "f1": f, "texts": texts})


def test_a_class_that_never_occurs_counts_as_nothing() -> None:
    figures = score([0, 0], [0, 0], ["a", "b"])
    assert (figures["accuracy"], figures["macro_f1"]) == (1.0, 0.5)
    assert figures["confusion_matrix"] == [[2, 0], [0, 0]]


def test_predictions_keep_the_order_of_the_texts_and_equal_each_text_alone(run: Path) -> None:
    model, tokenizer = runs.read_model(run), runs.read_tokenizer(run)
    texts = [record["text"] for record in easy_records(70, seed=5)]  # more than one batch
    together_RNC = predict(model, tokenizer, texts)
    assert together_RNC.shape == (2, 70, 2)
    for number, text in enumerate(texts):
        torch.testing.assert_close(predict(model, tokenizer, [text])[:, 0], together_RNC[:, number], rtol=0, atol=1e-5)


def test_a_training_in_bf16_is_judged_in_fp32(run: Path) -> None:
    model, tokenizer = runs.read_model(run), runs.read_tokenizer(run)
    texts = [record["text"] for record in easy_records(20, seed=5)]
    expected_RNC = predict(model, tokenizer, texts)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    trained = accelerator.unwrap_model(accelerator.prepare_model(model))
    ids_BL = torch.tensor([[2, 5, 6, 7]])
    assert not torch.equal(trained(ids_BL), Encoder.forward(trained, ids_BL)), "it would be rounded otherwise"
    assert torch.equal(predict(trained, tokenizer, texts), expected_RNC)


def test_predicting_leaves_a_model_in_training_in_training(run: Path) -> None:
    model = runs.read_model(run).train()
    tokenizer = runs.read_tokenizer(run)
    once, again = (predict(model, tokenizer, ["a charming film"]) for _ in range(2))
    assert torch.equal(once, again), "dropout is off"
    assert model.training


def test_evaluation_counts_what_the_model_predicts(run: Path, easy_dir: Path) -> None:
    figures = evaluate(run, easy_dir, "test", None, None)
    records = easy_records(13, seed=2)  # what `easy` has as its test split
    logits_RNC = predict(runs.read_model(run), runs.read_tokenizer(run), [record["text"] for record in records])
    assert list(figures["iterations"]) == ["1", "2"]
    for iteration, one in figures["iterations"].items():
        matrix = [[0, 0], [0, 0]]
        for record, predicted in zip(records, logits_RNC[int(iteration) - 1].argmax(-1).tolist(), strict=True):
            matrix[LABELS.index(record["label"])][predicted] += 1
        assert one["confusion_matrix"] == matrix
        assert one["accuracy"] == pytest.approx((matrix[0][0] + matrix[1][1]) / 13)
    parameters = sum(weight.numel() for weight in runs.read_model(run).parameters())
    assert figures["parameters"] == parameters
    assert figures["megabytes_fp32"] == pytest.approx(parameters * 4 / 1e6)
    assert figures["milliseconds_per_text"] > 0


@pytest.mark.parametrize("reading", [Reading(3), Reading(64), Reading(None, 8), Reading(12, 5)], ids=str)
def test_it_may_read_other_parts_of_each_text_than_in_training(run: Path, reading: Reading) -> None:
    texts = [" ".join(["the film was"] * 8 + [record["text"]]) for record in easy_records(13, seed=2)]
    as_trained, otherwise = (
        read_classifier(run, torch.device("cpu"), reading=one) for one in (AS_IN_TRAINING, reading)
    )
    model, tokenizer = runs.read_model(run, Reading(64)), runs.read_tokenizer(run)
    most, tail = reading.max_tokens or 16, reading.tail_tokens or 0
    whole = [tokenizer.encode(text).ids for text in texts]
    read = [ids if len(ids) <= most else ids[: most - tail] + ids[len(ids) - tail :] for ids in whole]
    expected_RNC = torch.cat([model(torch.tensor([ids])) for ids in read], dim=1)
    torch.testing.assert_close(otherwise.logits(texts), expected_RNC, rtol=0, atol=1e-5)
    assert not torch.allclose(as_trained.logits(texts), expected_RNC, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "tokens", "possible"),
    [
        ("--max-tokens", 2, "3 to 8192 are possible"),
        ("--max-tokens", 8193, "3 to 8192 are possible"),
        ("--max-tokens", -5, "3 to 8192 are possible"),
        ("--max-tokens", 10**9, "3 to 8192 are possible"),
        ("--tail-tokens", -1, "0 to 15, below --max-tokens, are possible"),
        ("--tail-tokens", 16, "0 to 15, below --max-tokens, are possible"),
    ],
)
def test_too_few_or_too_many_tokens_to_read_are_named(
    option: str, tokens: int, possible: str, run: Path, easy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--data-dir", str(easy_dir), option, str(tokens)]) == 1
    assert f"{option} is {tokens}; {possible}" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_json(
    run: Path, easy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    arguments = ["evaluate", str(run), "--data-dir", str(easy_dir), "--split", "test", "--output", str(output)]
    assert main(arguments) == 0
    figures, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert printed == table(figures) + "\n"
    assert (figures["dataset"], figures["split"]) == ("easy", "test")
    accuracy = figures["iterations"]["2"]["accuracy"]
    assert any(line.split()[:2] == ["2", f"{accuracy:.4f}"] for line in printed.splitlines())
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("good ")]
    assert [int(number) for number in row[-3:]] == [6, *figures["iterations"]["2"]["confusion_matrix"][1]]


def test_the_table_holds_every_class_and_every_iteration() -> None:
    figures = {"run": "r", "dataset": "d", "split": "test", "parameters": 3_400_000, "megabytes_fp32": 13.6}
    iterations = {"1": score(TRUTH, TRUTH, ["a", "b", "c"]), "2": score(TRUTH, PREDICTED, ["a", "b", "c"])}
    lines = table(figures | {"milliseconds_per_text": 1.234, "iterations": iterations}).splitlines()
    assert lines[0] == "r on d test: 3.40 M parameters, 13.6 MB in FP32, 1.23 ms per text"
    rows = {words[0]: words[1:] for words in map(str.split, lines[1:]) if words}
    assert rows["1"] == ["1.0000"] * 4
    assert rows["2"] == ["0.4000", "0.3556", "0.3333", "0.3889"]
    assert rows["a"] == ["0.3333", "0.5000", "0.4000", "4", "2", "1", "1"]


@pytest.mark.parametrize("iterations", [1, 4])
def test_the_recurrent_model_runs_as_often_as_asked(iterations: int, run: Path, easy_dir: Path) -> None:
    figures = evaluate(run, easy_dir, "validation", None, iterations)
    assert list(figures["iterations"]) == [str(n) for n in range(1, iterations + 1)]
    trained = evaluate(run, easy_dir, "validation", None, None)
    assert figures["iterations"]["1"] == trained["iterations"]["1"]


def test_iterations_that_make_no_sense_are_refused(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^--iterations 0: at least 1"):
        evaluate(run, easy_dir, "validation", None, 0)
    train(tiny_config(easy_dir, tmp_path, architecture="baseline", num_epochs=1))
    with pytest.raises(TrainingError, match=r"^--iterations 2: .* for a recurrent model only, not baseline$"):
        evaluate(tmp_path, easy_dir, "validation", None, 2)


def test_a_run_is_measured_on_another_set_with_its_labels_and_on_no_other(run: Path, tmp_path: Path) -> None:
    write_easy(tmp_path, "alike")
    write_jsonl(
        tmp_path / "other" / "train.jsonl", [{"text": f"x {n}", "label": ("no", "yes")[n % 2]} for n in range(40)]
    )
    assert evaluate(run, tmp_path, "validation", "alike", None)["dataset"] == "alike"
    with pytest.raises(TrainingError, match=r"^other has labels no, yes, the run bad, good$"):
        evaluate(run, tmp_path, "validation", "other", None)


def test_a_split_that_is_not_there_is_said(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(easy_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "easy" / "test.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"^data set 'easy' has no labelled test split$"):
        evaluate(run, tmp_path, "test", None, None)


def test_texts_that_a_run_did_not_learn_from_do_not_pass_for_its_own(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(easy_dir, tmp_path, dirs_exist_ok=True)
    write_jsonl(tmp_path / "easy" / "train.jsonl", easy_records(60)[::-1])
    for split in ("validation", "test"):
        with pytest.raises(
            TrainingError, match=r"was begun with other texts \(texts_sha256 of data set 'easy' changed\)"
        ):
            evaluate(run, tmp_path, split, None, None)
    assert evaluate(run, tmp_path, "test", "easy", None)["split"] == "test"  # asked for as another data set


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", None, "is not a run directory: it has no config.json"),
        ("config.json", b"{", "is not a run's configuration"),
        ("config.json", b'{"task": "x"}', "is not a run's configuration"),
        ("tokenizer.json", None, r"tokenizer.json is not a tokenizer: No such file"),
        ("tokenizer.json", b"{}", r"tokenizer.json is not a tokenizer: "),
        ("model.safetensors", None, "is missing: the run has no checkpoint yet"),
        ("model.safetensors", b"no weights", "does not hold weights of this shape"),
    ],
)
def test_a_directory_that_is_no_whole_run_is_said(
    name: str, content: bytes | None, complaint: str, run: Path, easy_dir: Path, tmp_path: Path
) -> None:
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=complaint):
        evaluate(tmp_path, easy_dir, "validation", None, None)
