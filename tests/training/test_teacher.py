"""Distillation: the loss is the published one, and a student learns what only its teacher knows."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.training.easy import assert_same_run, easy_records, metrics, tiny_config, write_easy, write_jsonl
from training import run as runs
from training import teacher
from training.architectures.encoder import Encoder
from training.errors import TrainingError
from training.evaluate import predict
from training.loop import train
from training.objectives import Classification, distillation_loss


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set `easy` whose training labels say nothing; validation is as ever."""
    directory = tmp_path_factory.mktemp("mislabelled")
    write_easy(directory)
    records, rng = easy_records(60), random.Random(0)
    write_jsonl(directory / "easy" / "train.jsonl", [one | {"label": rng.choice(("bad", "good"))} for one in records])
    return directory


def test_the_loss_is_the_divergence_of_softened_probabilities() -> None:
    student_RBC, teacher_BC = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)), torch.randn(5, 4)
    p_BC, q_RBC = (teacher_BC / 2).softmax(-1), (student_RBC / 2).softmax(-1)
    by_hand = 4 * (p_BC * (p_BC / q_RBC).log()).sum(-1).mean()
    assert distillation_loss(student_RBC, teacher_BC, 2.0) == pytest.approx(by_hand)
    assert distillation_loss(teacher_BC.expand(3, -1, -1), teacher_BC, 2.0) == pytest.approx(0, abs=1e-6)


def test_a_student_learns_what_only_its_teacher_knows(run: Path, mislabelled: Path, tmp_path: Path) -> None:
    """The teacher has another architecture, shape and tokenizer than the student."""
    shape = {"architecture": "baseline", "width": 16, "tokenizer": "bpe", "vocabulary": 320, "num_epochs": 8}
    train(tiny_config(mislabelled, tmp_path / "alone", **shape))
    train(tiny_config(mislabelled, tmp_path / "taught", teacher=(run,), teacher_weight=1.0, **shape))
    alone, taught = (
        max(line["validation"][-1]["accuracy"] for line in metrics(tmp_path / name) if "validation" in line)
        for name in ("alone", "taught")
    )
    assert taught > 0.9
    assert alone < 0.85
    info = runs.read_info(tmp_path / "taught")
    assert info.options["teacher"] == [runs.read_info(run).provenance["run_id"]]
    assert str(run) not in (tmp_path / "taught" / "config.json").read_text()


def test_a_run_tells_all_the_data_sets_that_it_learned_from(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    """Those of the run that it began from, and of its teachers, which may be older than this entry."""
    begun, other, old = (Path(shutil.copytree(run, tmp_path / name)) for name in ("begun", "teacher", "old"))
    info = runs.read_info(run)
    runs.write_info(begun, replace(info, provenance=info.provenance | {"learned_from": ["sst2", "imdb"]}))
    runs.write_info(other, replace(info, provenance=info.provenance | {"learned_from": ["imdb", "yelp_polarity"]}))
    del info.provenance["learned_from"]
    runs.write_info(old, info)
    several = {"init_from": begun, "teacher": (other, old)}
    train(tiny_config(easy_dir, tmp_path / "run", num_epochs=1, learning_rate=1e-12, **several))
    learned_from = runs.learned_from(runs.read_info(tmp_path / "run"))
    assert learned_from == ["sst2", "imdb", "yelp_polarity", info.provenance["dataset"]]


def test_several_teachers_are_averaged_and_asked_once(
    run: Path, easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train(tiny_config(easy_dir, tmp_path / "other", num_epochs=1, max_tokens=8))
    config = tiny_config(easy_dir, tmp_path / "run", teacher=(run, other), num_epochs=1)
    loss = Classification.loss

    def die(*_: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(Classification, "loss", die)
    with pytest.raises(MemoryError):
        train(config)
    monkeypatch.setattr(Classification, "loss", loss)
    texts = [record["text"] for record in easy_records(60)]
    said = [predict(runs.read_model(one), runs.read_tokenizer(one), texts)[-1] for one in (run, other)]
    torch.testing.assert_close(load_file(tmp_path / "run" / "teacher.safetensors")["logits"], sum(said) / 2)
    whole = train(tiny_config(easy_dir, tmp_path / "whole", teacher=(run, other), num_epochs=1))
    (other / "model.safetensors").unlink()
    assert_same_run(train(config), whole)


def test_teaching_goes_on_where_it_was_interrupted(
    run: Path, easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "BLOCK", 16)
    asked: list[int] = []

    def tire(model: Encoder, tokenizer: Tokenizer, texts: Sequence[str], *options: int | None) -> torch.Tensor:
        if len(asked) == 2:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(texts))
        return predict(model, tokenizer, texts, *options)  # type: ignore[arg-type]

    monkeypatch.setattr("training.evaluate.predict", tire)
    texts = [record["text"] for record in easy_records(60)]
    with pytest.raises(KeyboardInterrupt):
        teacher.teach([run], texts, tmp_path, torch.device("cpu"))
    taught_NC = teacher.teach([run], texts, tmp_path, torch.device("cpu"))
    assert asked == [16, 16, 0, 16, 12]
    said_NC = predict(runs.read_model(run), runs.read_tokenizer(run), texts)[-1]
    torch.testing.assert_close(taught_NC, said_NC)


def test_a_teacher_of_another_task_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, easy_dir: Path
) -> None:
    records = [one | {"label": "no" if one["label"] == "bad" else "yes"} for one in easy_records(30)]
    write_jsonl(tmp_path / "data" / "answers" / "train.jsonl", records)
    with pytest.raises(TrainingError, match="knows the labels bad, good, not no, yes"):
        train(tiny_config(tmp_path / "data", tmp_path / "run", dataset="answers", teacher=(run,)))
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_weights_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, easy_dir: Path
) -> None:
    """Or the directory would be taken, by a run that cannot begin."""
    begun = Path(shutil.copytree(run, tmp_path / "begun"))
    (begun / runs.WEIGHTS).unlink()
    with pytest.raises(TrainingError, match=r"begun.model\.safetensors is missing: the run has no checkpoint yet"):
        train(tiny_config(easy_dir, tmp_path / "run", teacher=(run, begun)))
    assert not (tmp_path / "run").exists()
