"""Mean and spread over seeds: against the same by hand, and what cannot be compared."""

import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

from training.__main__ import main


def write_run(directory: Path, architecture: str, seed: int, *accuracies: float, tail_tokens: int = 0) -> str:
    """A run that was evaluated on two splits, the second of which it answers a tenth worse."""
    directory.mkdir()
    splits = {
        name: {
            "architecture": architecture,
            "seed": seed,
            "reads": {"max_tokens": 64, "tail_tokens": tail_tokens},
            "iterations": {
                str(number): {"accuracy": accuracy - less, "macro_f1": accuracy - less - 0.01, "texts": texts}
                for number, accuracy in enumerate(accuracies, start=1)
            },
        }
        for name, less, texts in (("validation", 0.0, 1200), ("far test", 0.1, 80))
    }
    (directory / "evaluation.json").write_text(json.dumps(splits))
    return str(directory)


def test_mean_and_spread_of_both_and_of_their_difference_seed_by_seed(tmp_path: Path) -> None:
    recurrent, baseline = {1: 0.90, 2: 0.92, 3: 0.91}, {1: 0.91, 2: 0.92, 3: 0.93, 4: 0.5}
    runs = [write_run(tmp_path / f"r{seed}", "recurrent", seed, 0.1, last) for seed, last in recurrent.items()]
    runs += [write_run(tmp_path / f"b{seed}", "baseline", seed, last) for seed, last in baseline.items()]
    output = tmp_path / "results" / "seeds"
    assert main(["seeds", *runs, "--output", str(output)]) == 0
    page = output.with_suffix(".md").read_text()
    assert "on texts of up to 64 tokens and the first 64 of longer ones;" in page
    assert "over the seeds 1, 2, 3, 4;" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["validation", "1,200"], ["far test", "80"]]
    assert rows[0][2::2] == ["recurrent, accuracy", "baseline, accuracy", "recurrent less baseline, points"]
    for row, less in zip(rows[2:], (0, 0.1), strict=True):
        for column, found in ((2, recurrent), (4, baseline)):
            middle, width = mean(found.values()) - less, stdev(found.values())
            assert row[column : column + 2] == [f"{middle:.4f} ± {width:.4f}", f"{middle - 0.01:.4f} ± {width:.4f}"]
        assert row[6] == f"-1.00 ± {stdev([-1, 0, -2]):.2f}"  # seed 4 has no partner
    assert len(json.loads(output.with_suffix(".json").read_text())["runs"]) == 7


def test_one_architecture_alone_has_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one", "baseline", 13, 0.75)
    assert main(["seeds", run, "--output", str(tmp_path / "seeds")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["far test", "80", "0.6500", "0.6400"]


def test_what_cannot_be_compared_is_said_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = (write_run(tmp_path / name, "recurrent", 13, 0.9) for name in ("one", "same"))
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "evaluation.json").write_text(json.dumps({"run": "x", "seed": 13, "iterations": {}}))
    elsewhere = write_run(tmp_path / "elsewhere", "recurrent", 14, 0.9)
    splits = json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())
    (tmp_path / "elsewhere" / "evaluation.json").write_text(json.dumps({"far test": splits["far test"]}))
    both_ends = write_run(tmp_path / "ends", "recurrent", 15, 0.9, tail_tokens=32)
    for runs, complaint in (
        ([one, same], "same: another run is recurrent with seed 13 as well"),
        ([one, str(tmp_path / "single")], "evaluation.json is not of all splits; `python -m training evaluate"),
        ([one, str(tmp_path / "none")], "No such file or directory: '"),
        ([one, elsewhere], "elsewhere was evaluated on far test, "),
        ([one, both_ends], "the first 32 and last 32 of longer ones, "),
        ([], "no run: give the directories of some that differ in their seed"),
    ):
        assert main(["seeds", *runs, "--output", str(tmp_path / "seeds")]) == 1
        assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("seeds*"))


def test_what_evaluate_writes_of_all_splits_is_what_it_takes(run: Path, easy_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    assert main(["evaluate", str(run), "--data-dir", str(easy_dir), "--split", "all"]) == 0
    assert main(["seeds", str(run), "--output", str(tmp_path / "seeds")]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    rows = [line.split("|")[1:4] for line in (tmp_path / "seeds.md").read_text().splitlines() if line.startswith("|")]
    for (split, texts, accuracy), (name, figures) in zip(rows[2:], found.items(), strict=True):
        last = figures["iterations"]["2"]
        assert (split.strip(), int(texts)) == (name, last["texts"])
        assert accuracy.strip() == f"{last['accuracy']:.4f}"
