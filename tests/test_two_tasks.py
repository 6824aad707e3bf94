"""Two tasks side by side: `domain` trained, evaluated and exported by the commands, then served beside another."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from model_export.__main__ import main as model_export
from service.app import create_app
from service.settings import Settings
from tests import tiny
from tests.service.fakes import wait_until
from training.__main__ import main as training

WORDS = {
    "imdb": ("actor", "plot", "director", "scene"),
    "yelp_polarity": ("waiter", "menu", "table", "parking"),
    "amazon_polarity": ("battery", "parcel", "charger", "refund"),
}
LABELS = ["movies", "local business", "online shopping"]


@pytest.fixture(scope="module")
def domain_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three data sets that the domain task is made of, each with words of its own."""
    directory, rng = tmp_path_factory.mktemp("data"), random.Random(13)
    for name, words in WORDS.items():
        (directory / name).mkdir()
        for split, count in (("train", 50), ("validation", 20)):
            records = [
                {"text": f"the {rng.choice(words)} was {rng.choice(words)}", "label": n % 2} for n in range(count)
            ]
            lines = [json.dumps(record) for record in records]
            (directory / name / f"{split}.jsonl").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module")
def both_tasks(domain_data: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory: domain in INT8 alone, and the other task's recurrent bundle."""
    directory = tmp_path_factory.mktemp("two")
    models, run = directory / "models", directory / "run"
    options = tiny.train_options("recurrent") | {"dataset": "domain"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    data = ["--data-dir", str(domain_data)]
    assert training(["train", *arguments, *data, "--output-dir", str(run)]) == 0
    assert training(["evaluate", str(run), *data]) == 0
    out = str(models / "domain-recurrent")
    assert model_export([str(run), out, *data, "--precisions", "int8"]) == 0
    shutil.copytree(models_dir / f"{tiny.DATASET}-recurrent", models / f"{tiny.DATASET}-recurrent")
    return models


def test_domain_ships_in_int8_alone_with_its_card(both_tasks: Path) -> None:
    manifest = json.loads((both_tasks / "domain-recurrent" / "manifest.json").read_text())
    assert (manifest["task"], manifest["labels"]) == ("domain", LABELS)
    assert list(manifest["precisions"]) == ["int8"]
    assert [one["name"] for one in manifest["card"]["data"]] == ["imdb", "yelp_polarity", "amazon_polarity"]
    evaluation = json.loads((both_tasks.parent / "run" / "evaluation.json").read_text())
    found = [one["accuracy"] for one in evaluation["iterations"].values()]
    assert found == pytest.approx([one["accuracy"] for one in manifest["quality"]["validation"]["fp32"]])
    assert found[-1] >= 0.9


def test_each_task_answers_with_its_own_labels(both_tasks: Path) -> None:
    with TestClient(create_app(Settings(models_dir=both_tasks, default_task="domain"))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
        for task, text, label in (
            (tiny.DATASET, "a wonderful film", "positive"),
            ("domain", "the menu was parking", "local business"),
            (None, "the battery was refund", "online shopping"),
        ):
            asked = {"inputs": text} | ({"task": task} if task else {})
            answer = client.post("/classify", json=asked).json()
            assert answer["task"] == (task or "domain")
            assert answer["results"][0]["label"] == label
        shown = {model["task"]: model for model in client.get("/models").json()["models"]}
        assert shown["domain"]["precision"] == "int8"
        assert shown["domain"]["card"]["limits"]


def test_without_a_default_the_task_must_be_named(both_tasks: Path) -> None:
    with TestClient(create_app(Settings(models_dir=both_tasks))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
        answer = client.post("/classify", json={"inputs": "the menu"})
    (error,) = answer.json()["errors"]
    assert (answer.status_code, error["field"]) == (422, "task")
    assert error["problem"] == f"must be one of domain, {tiny.DATASET}"
