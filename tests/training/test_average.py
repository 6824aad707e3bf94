"""The mean of runs' weights is a run like any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.easy import tiny_config
from training import run as runs
from training.__main__ import main
from training.average import average
from training.errors import TrainingError
from training.evaluate import evaluate
from training.loop import train


@pytest.fixture(scope="module")
def further(run: Path, easy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        tiny_config(easy_dir, tmp_path_factory.mktemp("further") / "run", init_from=run, max_tokens=12, seed=14)
    )


def test_the_mean_of_a_run_and_of_what_it_became(
    run: Path, further: Path, easy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mean"
    for _ in range(2):  # the same command again is no other run
        assert main(["average", str(run), str(further), "--output-dir", str(output)]) == 0
    assert f"run written to {output}; next: " in capsys.readouterr().out
    before, after, mean = (runs.read_model(one).state_dict() for one in (run, further, output))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (before[name] + after[name]) / 2)

    info, ends = runs.read_info(output), runs.read_info(further)
    assert info.options == ends.options | {
        "averaged": [runs.read_info(one).provenance["run_id"] for one in (run, further)]
    }
    assert info.encoder == ends.encoder
    assert info.provenance["run_id"] not in (ends.provenance["run_id"], runs.read_info(run).provenance["run_id"])
    assert evaluate(output, easy_dir, "validation", None, None)["run"] == info.provenance["run_id"]


def another_head(run: Path) -> None:
    info = json.loads((run / runs.CONFIG).read_text())
    info["encoder"]["pooling"] = "mean" if info["encoder"]["pooling"] == "first" else "first"
    (run / runs.CONFIG).write_text(json.dumps(info))


def another_tokenizer(run: Path) -> None:
    (run / runs.TOKENIZER).write_text((run / runs.TOKENIZER).read_text() + "\n")


@pytest.mark.parametrize(("change", "what"), [(another_head, "shape"), (another_tokenizer, "tokenizer")])
def test_runs_that_are_not_alike_have_no_mean(
    change: Callable[[Path], None], what: str, run: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    change(other)
    with pytest.raises(TrainingError, match=rf"^{run} and {other} differ in {what}: they have no mean$"):
        average([run, other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_one_run_has_no_mean_and_no_other_run_is_replaced(run: Path, further: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least two"):
        average([run], tmp_path / "mean")
    with pytest.raises(TrainingError, match=r"holds a run with other options \(.*averaged\)"):
        average([run, further], shutil.copytree(run, tmp_path / "standing"))
