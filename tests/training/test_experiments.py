"""The published experiments: right splits, each cell done once, and a report that is what was measured."""

import json
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.easy import write_jsonl
from training.__main__ import main
from training.errors import TrainingError
from training.experiments.cells import EXPERIMENTS
from training.experiments.children import Children
from training.experiments.gather import Result
from training.experiments.options import ExperimentsConfig
from training.experiments.report import as_markdown, write_report
from training.experiments.run import train_config
from training.experiments.selections import SELECTIONS, write_selection
from training.tables import grid, spread

WORDS = {
    "imdb": ("actor", "plot", "scene"),
    "yelp_polarity": ("waiter", "menu"),
    "amazon_polarity": ("parcel", "refund"),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 with texts of 1 to 25 words, and the three data sets of the domains."""
    directory, rng = tmp_path_factory.mktemp("sets"), random.Random(13)
    phrases = [
        {"text": " ".join([f"p{row}", *rng.choices(["good", "bad", "film"], k=rng.randrange(25))]), "label": row % 2}
        for row in range(1003)
    ]
    write_jsonl(directory / "sst2" / "train.jsonl", phrases[:900])
    write_jsonl(directory / "sst2" / "validation.jsonl", phrases[900:])
    for place, (name, words) in enumerate(WORDS.items()):
        count = 60 + 10 * place
        texts = [
            {"text": f"{name} {row} {' '.join(rng.choices(words, k=4))}", "label": row % 2} for row in range(count)
        ]
        write_jsonl(directory / name / "train.jsonl", texts)
    return directory


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }


def test_the_pool_is_split_by_the_seed_and_the_official_split_teaches_nothing(sets: Path, tmp_path: Path) -> None:
    first, second = (read(tmp_path / write_selection("pooled-sst2", seed, sets, tmp_path)) for seed in (13, 14))
    official = {json.loads(line)["text"] for line in (sets / "sst2" / "validation.jsonl").read_text().splitlines()}
    texts = {split: [one["text"] for one in part] for split, part in first.items()}
    assert len(texts["test"]) == 1003 - 802 - 100
    assert 802 - 103 <= len(texts["train"]) < 802
    assert official.isdisjoint(texts["train"] + texts["validation"])
    assert not official.isdisjoint(texts["test"]), "as in the source, the pool holds both splits"
    assert len(set(texts["train"] + texts["validation"] + texts["test"])) == sum(map(len, texts.values()))
    assert first["test"] != second["test"]
    assert {one["label"] for one in first["test"]} == {"negative", "positive"}


def test_the_same_seed_draws_the_same_and_what_was_drawn_stays(sets: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_selection("longest-sst2", 13, sets, tmp_path / place)
    assert read(tmp_path / "a" / "longest-sst2-13") == read(tmp_path / "b" / "longest-sst2-13")
    kept = tmp_path / "a" / "longest-sst2-13" / "test.jsonl"
    kept.write_text("")
    write_selection("longest-sst2", 13, sets, tmp_path / "a")
    assert kept.read_text() == ""


def test_longest_and_shortest_are_three_tenths_from_either_end(sets: Path, tmp_path: Path) -> None:
    words: dict[str, list[int]] = {}
    for name in ("longest-sst2", "shortest-sst2"):
        found = SELECTIONS[name](sets, random.Random(13))
        assert len(found) == 301
        words[name] = [len(text.split()) for text, _ in found]
        assert words[name] != sorted(words[name]), "the parts are drawn, not cut off"
    assert min(words["longest-sst2"]) >= max(words["shortest-sst2"]) > 1


def test_domains_are_balanced(sets: Path) -> None:
    found = SELECTIONS["balanced-domain"](sets, random.Random(13))
    labels = [label for _, label in found]
    assert {label: labels.count(label) for label in set(labels)} == dict.fromkeys(
        ("movies", "local business", "online shopping"), 60
    )
    assert all(text.startswith("imdb") == (label == "movies") for text, label in found)


def test_an_experiment_is_written_once_resumed_and_refused_with_other_options(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--data-dir", str(sets), "--output-dir", str(tmp_path / "out"), "--results-dir", str(tmp_path / "docs")]
    command = ["experiments", "domain", "--quick", "--seeds", "13", "--jobs", "2", *places]
    assert main(command) == 0
    results = tmp_path / "out" / "quick" / "results"
    assert {path.name for path in results.iterdir()} == {"domain.md", "domain.json", "domain.png"}
    assert not (tmp_path / "docs").exists(), "a quick look leaves the results alone"
    content = json.loads((results / "domain.json").read_text())
    assert {(one["model"], one["published"]) for one in content["results"]} == {
        ("baseline", 0.984),
        ("recurrent", 0.9865),
    }
    page = (results / "domain.md").read_text()
    for one in content["results"]:
        assert one["texts"] == 18
        assert re.search(rf"\| {one['model']} +\| {one['iterations'][-1]['accuracy']:.4f} ", page)
    logs = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.log.txt")}
    assert len(logs) == 2
    assert main(command) == 0, "now nothing is left to do"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.log.txt")} == logs
    again = json.loads((results / "domain.json").read_text())
    assert again["results"] == content["results"]
    capsys.readouterr()
    assert main([*command, "--learning-rate", "0.001"]) == 1
    assert "trained with other options (learning_rate): choose another --output-dir" in capsys.readouterr().err


def test_a_child_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"^python -m training ended with status 1: training: --batch-size is 0; .*log\)$"
    ):
        Children(1).run("training", ["train", "--batch-size=0"], tmp_path / "log")


def test_whatever_ends_an_experiment_ends_its_children(tmp_path: Path) -> None:
    ends: list[type[BaseException]] = []
    children, log = Children(1), tmp_path / "log"

    def wait() -> None:
        try:
            children.run("timeit", ["-n1", "-r1", "print('up', flush=True); import time; time.sleep(100)"], log)
        except BaseException as error:
            ends.append(type(error))

    thread = threading.Thread(target=wait, daemon=True)

    def fail_once_it_runs() -> None:
        with children:
            thread.start()
            for _ in range(600):
                if log.exists() and log.read_text():
                    break
                time.sleep(0.1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_once_it_runs()
    thread.join(30)
    assert ends == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        children.run("timeit", [], log)


def test_cells_that_train_the_same_share_a_run_and_others_do_not() -> None:
    config = ExperimentsConfig("data-size")
    by_run: dict[Path, Any] = {}
    for experiment in EXPERIMENTS.values():
        for cell in experiment.cells:
            options = train_config(config, cell, 13)
            assert by_run.setdefault(options.output_dir, options) == options
    # data-size, length, yelp, domain, the wider one of precision, and two of recurrence
    assert len(by_run) == 6 + 4 + 2 + 2 + 1 + 2
    assert {options.width for options in by_run.values()} == {None, 384, 256}
    assert {options.recurrent_depth for options in by_run.values()} == {1, 2}


def result(model: str, seed: int, accuracy: float, published: float | None = None) -> Result:
    figures = {"accuracy": accuracy, "macro_f1": 0.5}
    return Result("row", "test", model, seed, 10, 80, published, [{"accuracy": 0.1, "macro_f1": 0.1}, figures])


def test_the_report_shows_means_spread_and_paired_differences() -> None:
    accuracies = {"baseline": (0.80, 0.84), "recurrent": (0.82, 0.82)}
    published = {"baseline": 0.9, "recurrent": 0.89}
    results = [
        result(model, seed, accuracy, published[model])
        for model, found in accuracies.items()
        for seed, accuracy in zip((1, 2), found, strict=True)
    ]
    config = ExperimentsConfig("domain", seeds=(1, 2), effort=0.5)
    page = as_markdown(
        config, EXPERIMENTS["domain"], [{"num_epochs": 1, "seed": 1}, {"num_epochs": 2, "width": 384}], results, []
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| row")]
    assert rows[0] == ["row", "test", "baseline", "0.8200 ± 0.0283", "0.5000 ± 0.0000", "-", "-", "0.9000", "80 / 10"]
    assert rows[1][3] == "0.8200 ± 0.0000"
    assert rows[2] == ["row", "test", "recurrent", "+0.00 ± 2.83", "-1.00"]
    assert "num epochs 1 or 2, width 384 (some)." in page
    assert page.endswith("Made by `python -m training experiments domain --seeds 1 2 --effort 0.5`\n")


def test_seeds_may_come_one_by_one_if_the_recipe_stays(tmp_path: Path) -> None:
    def write(seed: int, accuracy: float, epochs: int = 1) -> str:
        config = ExperimentsConfig("domain", seeds=(seed,), results_dir=tmp_path)
        recipe = {"dataset": f"balanced-domain-{seed}", "seed": seed, "num_epochs": epochs, "pooling": "first"}
        return write_report(
            config, EXPERIMENTS["domain"], [recipe], [result("baseline", seed, accuracy)], []
        ).read_text()

    write(14, 0.5)
    write(14, 0.8)  # again: in the place of the first
    page = write(13, 0.9)
    assert "0.8500 ± 0.0707" in page
    assert "over the seeds 13, 14," in page
    assert page.endswith("Made by `python -m training experiments domain --seeds 13 14`\n")
    recorded = json.loads((tmp_path / "domain.json").read_text())
    assert [one["seed"] for one in recorded["results"]] == [13, 14]
    assert sorted(recipe["dataset"] for recipe in recorded["recipes"]) == ["balanced-domain-13", "balanced-domain-14"]
    with pytest.raises(TrainingError, match=r"domain --seeds 13 14` wrote it; give the same options"):
        write(15, 0.9, epochs=2)
    assert json.loads((tmp_path / "domain.json").read_text()) == recorded
    for recipe in recorded["recipes"]:  # as it stood before there was the choice
        del recipe["pooling"]
    (tmp_path / "domain.json").write_text(json.dumps(recorded))
    assert "over the seeds 13, 14, 15," in write(15, 0.9)


def test_counts_that_differ_by_the_seed_are_a_range() -> None:
    several = [
        replace(result("baseline", seed, 0.5), trained_on=texts) for seed, texts in ((1, 5000), (2, 4999), (3, 5000))
    ]
    page = as_markdown(ExperimentsConfig("domain", seeds=(1, 2, 3)), EXPERIMENTS["domain"], [], several, [])
    assert "4,999 to 5,000 / 10" in page


def test_a_figure_that_not_all_seeds_have_says_so() -> None:
    with_it = replace(result("baseline", 1, 0.5), iterations=[{"accuracy": 0.5, "macro_f1": 0.5, "macro_recall": 0.4}])
    config = ExperimentsConfig("domain", seeds=(1, 2))
    page = as_markdown(config, EXPERIMENTS["domain"], [], [with_it, result("baseline", 2, 0.6)], [])
    assert "| 0.4000 (1 of 2 seeds) |" in page


def test_one_seed_has_no_spread_and_nothing_is_a_dash() -> None:
    assert (spread([0.5]), spread([]), spread([-1.5], "+.2f")) == ("0.5000", "-", "-1.50")
    assert grid([["a", "bb"], ["ccc", "d"]]) == "| a   | bb |\n| --- | -- |\n| ccc | d  |"


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": ()}, {"seeds": (1, 1)}, {"seeds": (1, -1)}, {"jobs": 0}, {"effort": 0.0}, {"effort": float("nan")}],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"^--(seeds?|jobs) "):
        ExperimentsConfig("domain", **wrong)
