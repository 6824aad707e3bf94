"""The loop: it learns, stops when asked or when nothing improves, and resumed it ends as if never stopped."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.easy import (
    assert_same_run,
    best,
    difference,
    easy_records,
    last,
    metrics,
    tiny_config,
    write_easy,
    write_jsonl,
)
from training import run as runs
from training.config import LinearConfig, TrainConfig
from training.data import load_dataset
from training.errors import TrainingError
from training.evaluate import evaluate
from training.linear import fit
from training.loop import learning_rate, train
from training.objectives import Classification, drop_tokens
from training.prepare import provenance
from training.stopping import StopRequest
from training.tokenizer import CLASSIFY_ID, MASK_ID, PAD_ID


def test_it_learns_an_easy_set(easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loop.LOG_STEPS", 1)
    train(tiny_config(easy_dir, tmp_path, num_epochs=8, token_dropout=0.0))  # which may take both telling words
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert len(losses) == 120
    assert losses[0] == pytest.approx(math.log(2), rel=0.1), "it begins by guessing"
    assert sum(losses[-15:]) / 15 < losses[0] / 4


def test_every_iteration_learns(run: Path) -> None:
    validations = [line["validation"] for line in metrics(run) if "validation" in line]
    assert len(validations) == 8
    assert len(validations[-1]) == 2
    assert all(figures["accuracy"] > 0.8 for figures in validations[-1])


def test_the_run_says_what_it_is(run: Path, easy_dir: Path) -> None:
    info = runs.read_info(run)
    assert (info.task, info.labels, info.architecture) == ("easy", ["bad", "good"], "recurrent")
    assert info.options["learning_rate"] == 5e-3
    assert {"data_dir", "output_dir"}.isdisjoint(info.options), "where files lie is nobody's business"
    assert info.provenance["texts"] == {"train": 60, "validation": 21}
    assert info.provenance["seed"] == 13
    assert str(easy_dir) not in (run / "config.json").read_text()
    assert not list(run.glob("*.partial"))


def test_runs_begun_at_once_are_told_apart(easy_dir: Path) -> None:
    """As those of three seeds, begun by one line: a student keeps its teacher's id alone, and so does who begins."""
    dataset = load_dataset("easy", easy_dir)
    assert len({provenance(dataset, "recurrent", 13, ())["run_id"] for _ in range(9)}) == 9


def test_checkpoints_hold_tensors_and_numbers_only(run: Path) -> None:
    checkpoint = torch.load(run / "last.pt", weights_only=True)  # which refuses every other pickled object
    assert checkpoint["progress"]["finished"] is True
    assert checkpoint["progress"]["step"] == 120


def test_best_and_last_are_different_checkpoints_when_later_epochs_gain_nothing(easy_dir: Path, tmp_path: Path) -> None:
    """With next to no learning rate the first epoch stays the best, and patience ends."""
    stuck = train(tiny_config(easy_dir, tmp_path, learning_rate=1e-7, num_epochs=20, early_stopping_patience=2))
    assert [line["epoch"] for line in metrics(stuck)] == [1, 2, 3]
    assert last(stuck)["progress"]["best_epoch"] == 1
    assert difference(best(stuck), last(stuck)["model"]) > 0
    one_epoch = train(tiny_config(easy_dir, tmp_path / "one", learning_rate=1e-7, num_epochs=1))
    assert difference(best(stuck), last(one_epoch)["model"]) < 1e-6


def test_validation_within_an_epoch_counts_but_patience_counts_epochs(easy_dir: Path, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-7, "num_epochs": 20, "early_stopping_patience": 2, "validations_per_epoch": 3}
    train(tiny_config(easy_dir, tmp_path, **options))
    steps = [line["step"] for line in metrics(tmp_path) if "validation" in line]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40, 45], "the best at step 5, in the first epoch; two more follow"


def test_the_best_weights_are_those_with_the_best_validation_accuracy(run: Path, easy_dir: Path) -> None:
    best_seen = max(line["validation"][-1]["accuracy"] for line in metrics(run) if "validation" in line)
    assert evaluate(run, easy_dir, "validation", None, None)["iterations"]["2"]["accuracy"] == pytest.approx(
        best_seen, abs=1e-4
    )


@pytest.mark.parametrize("steps", [1, 23, 30])
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    steps: int, easy_dir: Path, tmp_path: Path, stop_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first step, in the middle of the second epoch, and at its end."""
    whole, stopped = (tiny_config(easy_dir, tmp_path / name, dropout=0.2) for name in ("whole", "stopped"))
    train(whole)
    stop_at(steps)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    assert last(stopped.output_dir)["progress"]["step"] == steps
    train(stopped)
    assert_same_run(whole.output_dir, stopped.output_dir)


@pytest.mark.parametrize("write", range(1, 8))
def test_a_crash_at_any_checkpoint_loses_nothing(
    write: int, easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints every five steps fall on the validations, and on the ends of epochs before theirs."""
    options = {"num_epochs": 2, "checkpoint_steps": 5, "validations_per_epoch": 3}
    whole, crashed = (tiny_config(easy_dir, tmp_path / name, **options) for name in ("whole", "crashed"))
    train(whole)
    write_checkpoint, written = runs.write_checkpoint, 0

    def crash(run: Path, checkpoint: Mapping[str, Any]) -> None:
        nonlocal written
        written += 1
        if written == write:
            raise OSError("no space left")
        write_checkpoint(run, checkpoint)

    monkeypatch.setattr(runs, "write_checkpoint", crash)
    with pytest.raises(OSError, match="no space left"):
        train(crashed)
    train(replace(crashed, checkpoint_steps=7))
    assert_same_run(whole.output_dir, crashed.output_dir)


@pytest.mark.parametrize(("broken_at", "kept"), [(12, 10), (25, 20), (1, None)])
def test_weights_that_are_no_numbers_end_the_training_and_are_never_kept(
    broken_at: int, kept: int | None, easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come apart before a validation, before a checkpoint, and before there is anything to keep."""
    loss, asked = Classification.loss, 0

    def overflow(self: Classification, *arguments: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return loss(self, *arguments) * (math.nan if asked >= broken_at else 1)

    monkeypatch.setattr(Classification, "loss", overflow)
    with pytest.raises(TrainingError, match=r"the weights are no numbers any more.* a lower --learning-rate"):
        train(tiny_config(easy_dir, tmp_path))
    checkpoint = runs.read_checkpoint(tmp_path)
    assert (checkpoint and checkpoint["progress"]["step"]) == kept
    assert kept is None or all(weight.isfinite().all() for weight in [*best(tmp_path).values()])
    assert kept is None or all(weight.isfinite().all() for weight in last(tmp_path)["model"].values())


def test_a_finished_run_is_left_as_it_is(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    train(tiny_config(easy_dir, again, num_epochs=8))
    assert_same_run(run, again)


def test_a_training_stopped_before_its_first_validation_can_be_evaluated(
    easy_dir: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(easy_dir, tmp_path))
    assert difference(best(tmp_path), last(tmp_path)["model"]) == 0
    assert evaluate(tmp_path, easy_dir, "validation", None, None)["iterations"]["2"]["texts"] == 21


def test_a_second_signal_ends_at_once_but_not_the_echo_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.4, 12.0])
    monkeypatch.setattr("training.stopping.time", SimpleNamespace(monotonic=lambda: next(clock)))
    request = StopRequest()
    assert not request.asked
    request(signal.SIGINT, None)
    try:
        request(signal.SIGTERM, None)
    except KeyboardInterrupt:
        pytest.fail("the echo should change nothing")
    assert request.asked
    with pytest.raises(KeyboardInterrupt):
        request(signal.SIGINT, None)


def test_a_run_with_other_options_is_not_resumed(run: Path, easy_dir: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(TrainingError, match=r"holds a run with other options \(learning_rate, seed\): choose another"):
        train(tiny_config(easy_dir, run, num_epochs=8, learning_rate=1e-3, seed=5))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_two_trainings_never_work_in_one_run(easy_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(easy_dir, tmp_path / "run", num_epochs=1)
    train(config)
    before = {path.name: path.read_bytes() for path in config.output_dir.iterdir()}
    with runs.hold(config.output_dir), pytest.raises(TrainingError, match=r"another training is at work in .*run: let"):
        train(config)
    assert {path.name: path.read_bytes() for path in config.output_dir.iterdir()} == before
    assert train(config) == config.output_dir


@pytest.mark.parametrize("kind", ["network", "linear"])
def test_two_trainings_never_begin_one_run(kind: str, easy_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with runs.hold(run):
        with pytest.raises(TrainingError, match=r"another training is at work in .*run: let"):
            train(tiny_config(easy_dir, run)) if kind == "network" else fit(LinearConfig("easy", easy_dir, run))
        assert [path.name for path in run.iterdir()] == [runs.LOCK]
    assert not run.exists(), "one that could not begin leaves nothing"


def test_a_run_goes_on_with_the_texts_that_it_was_begun_with_wherever_they_lie(run: Path, tmp_path: Path) -> None:
    def go_on(into: str, data: Path) -> Path:
        again = shutil.copytree(run, tmp_path / into)
        return train(tiny_config(data, again, num_epochs=8))

    write_easy(tmp_path / "moved")
    assert_same_run(run, go_on("again", tmp_path / "moved"))
    for name, records in {
        "other-text": [*easy_records(59), {"text": "something else", "label": "good"}],
        "other-label": [*easy_records(59), easy_records(60)[-1] | {"label": "bad"}],
        "another": easy_records(62),
        "third-label": [*easy_records(59), {"text": "neither", "label": "middling"}],
    }.items():
        write_easy(tmp_path / name)
        write_jsonl(tmp_path / name / "easy" / "train.jsonl", records)
        with pytest.raises(
            TrainingError, match=r"was begun with other texts.* another training needs another --output-dir$"
        ):
            go_on(f"run-{name}", tmp_path / name)


def test_a_run_that_kept_no_digest_is_held_to_the_number_of_its_texts(
    run: Path, easy_dir: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(run, tmp_path / "older")
    info = runs.read_info(older)
    del info.provenance["texts_sha256"]
    runs.write_info(older, info)
    train(tiny_config(easy_dir, older, num_epochs=8))
    write_easy(tmp_path / "more", train=62)
    with pytest.raises(TrainingError, match="was begun with other texts"):
        train(tiny_config(tmp_path / "more", older, num_epochs=8))


def test_a_run_older_than_an_option_has_its_default(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    older = shutil.copytree(run, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["options"]["sample_iterations"], config["options"]["teacher"]
    (older / "config.json").write_text(json.dumps(config))
    assert_same_run(train(tiny_config(easy_dir, older, num_epochs=8)), run)
    with pytest.raises(TrainingError, match=r"other options \(sample_iterations\)"):
        train(tiny_config(easy_dir, older, num_epochs=8, sample_iterations=2))


def test_a_broken_checkpoint_is_said_in_one_line(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    content = (again / "last.pt").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"no checkpoint"):
        (again / "last.pt").write_bytes(broken)
        with pytest.raises(TrainingError, match=r"last\.pt is not a readable checkpoint"):
            train(tiny_config(easy_dir, again, num_epochs=8))


def test_the_seed_decides_the_result(easy_dir: Path, tmp_path: Path) -> None:
    first, again, other = (
        train(tiny_config(easy_dir, tmp_path / name, num_epochs=1, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert_same_run(first, again)
    assert difference(last(first)["model"], last(other)["model"]) > 1e-2


def test_fewer_batches_than_a_step_adds_up_are_one_step(
    easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifteen batches where sixteen are asked for: every text once, and those of one batch twice."""
    loss, seen = Classification.loss, list[int]()

    def count(self: Classification, model: Any, batch: list[int], iterations: int | None) -> torch.Tensor:
        seen.extend(batch)
        return loss(self, model, batch, iterations)

    monkeypatch.setattr(Classification, "loss", count)
    train(tiny_config(easy_dir, tmp_path, gradient_accumulation=16, num_epochs=1))
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    assert (len(seen), set(seen)) == (64, set(range(60)))


def test_accumulated_gradients_equal_those_of_the_bigger_batch(tmp_path: Path) -> None:
    """Sixteen texts are one step as one batch and as two of eight, if nothing is dropped at random."""
    write_easy(tmp_path, train=16)
    still = {"dropout": 0.0, "token_dropout": 0.0, "num_epochs": 6}
    big, small = (
        train(tiny_config(tmp_path, tmp_path / name, batch_size=size, gradient_accumulation=batches, **still))
        for name, size, batches in (("big", 16, 1), ("small", 8, 2))
    )
    assert last(big)["progress"]["step"] == last(small)["progress"]["step"] == 6
    assert difference(last(big)["model"], last(small)["model"]) < 1e-5
    start = train(tiny_config(tmp_path, tmp_path / "start", learning_rate=1e-12, batch_size=16, **still))
    assert difference(last(big)["model"], last(start)["model"]) > 1e-2, "else equality would say nothing"


def test_bf16_trains_and_keeps_its_weights_in_float32(easy_dir: Path, tmp_path: Path) -> None:
    train(tiny_config(easy_dir, tmp_path, mixed_precision="bf16", num_epochs=8))
    assert {tensor.dtype for tensor in best(tmp_path).values()} == {torch.float32}
    assert max(line["validation"][-1]["accuracy"] for line in metrics(tmp_path) if "validation" in line) > 0.9


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot take denormal numbers for zero")
def test_denormal_numbers_are_zero_while_it_trains_and_not_after(
    easy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product() -> float:
        return (torch.tensor(1e-30) * torch.tensor(1e-10)).item()  # 1e-40 is denormal

    products: dict[str, float] = {}
    loss = Classification.loss

    def watched(*given: Any) -> torch.Tensor:
        products["forward"] = product()
        value = loss(*given)
        value.register_hook(lambda gradient: products.update(backward=product()))
        return value

    monkeypatch.setattr(Classification, "loss", watched)
    assert product() > 0
    train(tiny_config(easy_dir, tmp_path, num_epochs=1))
    assert products == {"forward": 0, "backward": 0}
    assert product() > 0


def test_a_share_of_the_training_texts_is_drawn_by_the_seed(easy_dir: Path, tmp_path: Path) -> None:
    part, other = (
        train(tiny_config(easy_dir, tmp_path / name, train_share=0.5, num_epochs=1, seed=seed))
        for name, seed in (("part", 1), ("other", 2))
    )
    assert runs.read_info(part).provenance["texts"] == {"train": 30, "validation": 21}
    assert last(part)["progress"]["step"] == 8, "batches of four out of thirty texts"
    assert (part / "tokenizer.json").read_bytes() != (other / "tokenizer.json").read_bytes()


def test_a_training_can_start_from_another_runs_weights(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(easy_dir, tmp_path / "on", init_from=run, learning_rate=1e-12, num_epochs=1)
    train(config)
    assert difference(best(config.output_dir), best(run)) < 1e-6
    assert (config.output_dir / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    info = runs.read_info(config.output_dir)
    assert info.provenance["initialised_from"] == runs.read_info(run).provenance["run_id"]
    assert str(run) not in (config.output_dir / "config.json").read_text()
    with pytest.raises(TrainingError, match=r"does not hold weights of this shape"):
        train(tiny_config(easy_dir, tmp_path / "wide", init_from=run, width=64))
    assert not (tmp_path / "wide").exists(), "or the directory would be taken, by a run that cannot begin"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA, so fp16 is welcome")
def test_fp16_without_cuda_is_refused_before_anything_is_written(easy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^--mixed-precision fp16 needs CUDA; on a CPU take bf16 or no$"):
        train(tiny_config(easy_dir, tmp_path / "run", mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("architecture", ["recurrent", "baseline"])
def test_the_architecture_and_its_depth_are_options(architecture: Any, easy_dir: Path, tmp_path: Path) -> None:
    train(tiny_config(easy_dir, tmp_path, architecture=architecture, recurrent_depth=3, num_epochs=1))
    (line,) = metrics(tmp_path)
    assert len(line["validation"]) == (3 if architecture == "recurrent" else 1)
    assert runs.read_model(tmp_path).config.iterations == len(line["validation"])


def test_the_rate_warms_up_to_its_peak_and_decays_to_nothing() -> None:
    config = TrainConfig(learning_rate=0.1, warmup_share=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.01 * step for step in range(1, 11)])
    assert max(rates) == rates[10] == 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.05)
    assert rates[100] == pytest.approx(0)
    assert learning_rate(0, 1, config) == 0.1, "a single step has no time to warm up"


def test_dropped_tokens_become_masks_and_only_tokens_are_dropped() -> None:
    ids_BL = torch.randint(4, 50, (40, 50))
    ids_BL[:, 0], ids_BL[:, 40:] = CLASSIFY_ID, PAD_ID
    torch.manual_seed(0)
    dropped_BL = drop_tokens(ids_BL, 0.3)
    changed_BL = dropped_BL != ids_BL
    assert (dropped_BL[changed_BL] == MASK_ID).all()
    assert not changed_BL[:, 0].any()
    assert not changed_BL[:, 40:].any()
    assert 0.25 < changed_BL[:, 1:40].float().mean() < 0.35
    assert drop_tokens(ids_BL, 0.0) is ids_BL


def test_metrics_are_json_lines_with_what_a_plot_needs(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    for line in lines:
        cost = {"tokens_per_second", "seconds", "peak_memory_mb"}
        expected = {"validation"} if "validation" in line else {"loss", "learning_rate"} | cost
        assert line.keys() - {"peak_cuda_mb"} == {"step", "epoch"} | expected
