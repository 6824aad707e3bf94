"""Pretraining: what is guessed, from which texts, and that training can go on from what it leaves behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.easy import assert_same_run, best, difference, easy_records, metrics, tiny_config, write_jsonl
from training import run as runs
from training.__main__ import main
from training.config import PretrainConfig
from training.data import load_dataset, unlabelled
from training.errors import TrainingError
from training.loop import train
from training.objectives import Classification
from training.pretrain import MaskedLanguage, MaskedLanguageModel, mask_words, pack, pretrain
from training.tokenizer import CLASSIFY_ID, MASK_ID, PAD_ID

SHAPE = {"layers": 1, "width": 32, "heads": 2, "feed_forward": 32, "max_tokens": 16, "vocabulary": 300}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`easy` has a validation and a test split, `other` neither; they share texts. Who reads `counting` learns to."""
    directory = tmp_path_factory.mktemp("texts")
    write_jsonl(directory / "easy" / "train.jsonl", easy_records(300))
    write_jsonl(directory / "easy" / "validation.jsonl", easy_records(60, seed=1))
    write_jsonl(directory / "easy" / "test.jsonl", easy_records(30, seed=2))
    shared = easy_records(40) + easy_records(60, seed=1)[:20] + easy_records(30, seed=2)[:10]
    write_jsonl(directory / "other" / "train.jsonl", shared + easy_records(60, seed=3))
    numbers = [chr(97 + i) * 3 for i in range(20)] * 3
    counting = [" ".join(numbers[start : start + count]) for start in range(20) for count in range(15, 30)]
    write_jsonl(
        directory / "counting" / "train.jsonl", [{"text": t, "label": str(i % 2)} for i, t in enumerate(counting)]
    )
    return directory


def config(data_dir: Path, output_dir: Path, **changes: Any) -> PretrainConfig:
    options: dict[str, Any] = SHAPE | {
        "datasets": ("easy", "other"), "batch_size": 8, "learning_rate": 1e-2, "num_epochs": 2, "checkpoint_steps": 10,
    }  # fmt: skip
    return PretrainConfig(data_dir=data_dir, output_dir=output_dir, **options | changes)


@pytest.fixture(scope="module")
def pretrained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from accelerate.state import AcceleratorState

    options = {"datasets": ("counting",), "num_epochs": 6, "learning_rate": 3e-3, "early_stopping_patience": 6}
    directory = pretrain(config(data_dir, tmp_path_factory.mktemp("runs") / "pretrained", **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    return directory


def test_only_training_texts_are_read_and_each_once(data_dir: Path) -> None:
    dataset = unlabelled(["easy", "other"], data_dir)
    read = dataset.train.texts + dataset.validation.texts
    parts = [load_dataset(name, data_dir) for name in ("easy", "other")]
    held = {text for part in parts for split in (part.validation, part.test) if split for text in split.texts}
    assert held.isdisjoint(read)
    assert len(read) == len(set(read))
    assert set(read) == {text for part in parts for text in part.train.texts} - held
    assert len(dataset.validation) == round(len(read) / 100)


def test_packing_leaves_nothing_out_and_fills_every_row_but_the_last() -> None:
    texts = [[CLASSIFY_ID, *range(10, 10 + length)] for length in (3, 40, 0, 7)]
    rows = pack(texts, 16)
    assert [token for row in rows for token in row] == [token for ids in texts for token in ids]
    assert [len(row) for row in rows] == [16, 16, 16, 6]


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_a_share_of_the_words_is_to_be_guessed_most_of_them_masked(share: float) -> None:
    torch.manual_seed(0)
    ids_BL = torch.randint(4, 5000, (100, 60))
    ids_BL[:, 0], ids_BL[:, 50:] = CLASSIFY_ID, PAD_ID
    seen_BL, chosen_BL = mask_words(ids_BL, share, 5000)
    assert int(chosen_BL.sum()) == share * 100 * 49
    assert not chosen_BL[:, 0].any()
    assert not chosen_BL[:, 50:].any()
    assert torch.equal(seen_BL[~chosen_BL], ids_BL[~chosen_BL])
    masked, left = seen_BL[chosen_BL] == MASK_ID, seen_BL[chosen_BL] == ids_BL[chosen_BL]
    assert 0.75 < masked.float().mean() < 0.85
    assert 0.06 < left.float().mean() < 0.14
    assert seen_BL.min() >= 0
    assert seen_BL.max() < 5000


def test_a_single_word_is_guessed_where_a_share_would_be_none() -> None:
    _, chosen_BL = mask_words(torch.tensor([[CLASSIFY_ID, 7, PAD_ID]]), 0.15, 300)
    assert chosen_BL.tolist() == [[False, True, False]]


def test_every_iteration_learns_to_guess(pretrained: Path) -> None:
    first, *_, last = (line["validation"] for line in metrics(pretrained) if "validation" in line)
    assert len(last) == 2
    for before, after in zip(first, last, strict=True):
        assert after["loss"] < before["loss"]
        assert after["accuracy"] > 0.6


def test_the_head_shares_the_embedding_and_is_not_saved(pretrained: Path) -> None:
    info = runs.read_info(pretrained)
    assert (info.task, info.labels) == ("pretraining", [])
    encoder = info.build_model()
    assert best(pretrained).keys() == {name for name in encoder.state_dict() if not name.startswith("head.")}
    model = MaskedLanguageModel(encoder)
    matrices = [p.shape for p in model.parameters() if p.requires_grad and encoder.config.vocabulary in p.shape]
    assert sorted(len(shape) for shape in matrices) == [1, 2], "the embedding, and a bias for each word"


def test_the_classification_head_is_not_run(pretrained: Path) -> None:
    model, asked = MaskedLanguageModel(runs.read_info(pretrained).build_model()), []
    model.encoder.head.register_forward_hook(lambda *_: asked.append(True))
    ids_BL = torch.tensor([[CLASSIFY_ID, 7, 8]])
    assert len(model(ids_BL, None, ids_BL == 7, None)) == 2
    assert not asked


def test_training_goes_on_from_it_with_a_new_head(pretrained: Path, data_dir: Path, tmp_path: Path) -> None:
    options = {"init_from": pretrained, "learning_rate": 1e-12, "num_epochs": 1}
    train(tiny_config(data_dir, tmp_path / "run", **options))
    weights, before = best(tmp_path / "run"), load_file(pretrained / "model.safetensors")
    assert difference({name: weights[name] for name in before}, before) < 1e-6
    assert weights["head.classify.weight"].abs().max() > 0
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (pretrained / "tokenizer.json").read_bytes()
    said = runs.read_info(tmp_path / "run").provenance["initialised_from"]
    assert said == runs.read_info(pretrained).provenance["run_id"]
    assert said.startswith("pretraining-counting-recurrent-")


def test_by_itself_it_decides_nothing(pretrained: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(pretrained), "--data-dir", str(data_dir)]) == 1
    assert "was pretrained and decides nothing yet: go on with train --init-from" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"architecture": "baseline"}, {"sample_iterations": 3}])
def test_a_killed_pretraining_ends_as_an_uninterrupted_one(
    options: dict[str, Any], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 17, seven steps after the last checkpoint."""
    whole, killed = (config(data_dir, tmp_path / name, **options) for name in ("whole", "killed"))
    pretrain(whole)
    loss, asked = MaskedLanguage.loss, 0

    def die(self: MaskedLanguage, *arguments: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        if asked == 17:
            raise MemoryError
        return loss(self, *arguments)

    monkeypatch.setattr(MaskedLanguage, "loss", die)
    with pytest.raises(MemoryError):
        pretrain(killed)
    pretrain(killed)
    assert_same_run(whole.output_dir, killed.output_dir)


def test_the_command_takes_names_from_the_line_and_from_a_file(data_dir: Path, tmp_path: Path) -> None:
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    places = ["--data-dir", str(data_dir), "--output-dir", str(tmp_path / "run"), "--num-epochs", "1"]
    (tmp_path / "options.toml").write_text('datasets = ["easy", "other"]\nmask_share = 0.3\n')
    assert main(["pretrain", "--config", str(tmp_path / "options.toml"), *places, *shape]) == 0
    info = runs.read_info(tmp_path / "run")
    assert (info.options["datasets"], info.options["mask_share"]) == (["easy", "other"], 0.3)
    assert main(["pretrain", "--datasets", "easy", "other", "--mask-share", "0.3", *places, *shape]) == 0


def test_sampled_iterations_reach_the_model(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], None]
) -> None:
    """From one to three, though the model is trained for two; the same for both objectives."""
    counts: dict[str, list[int]] = {"train": [], "pretrain": []}
    for name, kind in (("train", Classification), ("pretrain", MaskedLanguage)):
        loss = kind.loss

        def spy(self: Any, model: Any, batch: Any, iterations: Any, name: str = name, loss: Any = loss) -> torch.Tensor:
            counts[name].append(iterations)
            taken: torch.Tensor = loss(self, model, batch, iterations)
            return taken

        monkeypatch.setattr(kind, "loss", spy)
    pretrain(config(data_dir, tmp_path / "pretrain", sample_iterations=3, num_epochs=1))
    train(tiny_config(data_dir, tmp_path / "train", sample_iterations=3, num_epochs=1))
    shorter = min(map(len, counts.values()))
    assert counts["train"][:shorter] == counts["pretrain"][:shorter]
    assert set(counts["train"]) == {1, 2, 3}
    assert len(metrics(tmp_path / "train")[-1]["validation"]) == 2


def test_sampling_iterations_is_for_the_recurrent_model(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--sample-iterations is for a recurrent model only, not baseline"):
        tiny_config(data_dir, tmp_path, architecture="baseline", sample_iterations=2)
