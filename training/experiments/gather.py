"""From finished cells to what the report shows: a result for each test and seed, a size and a speed for each model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from training import run as runs
from training.evaluate import predict
from training.examples import read_records
from training.experiments.cells import Cell
from training.experiments.children import Children

TIMED_TEXTS = 512
ROUNDS = 5
SCORES = ("accuracy", "macro_f1", "macro_precision", "macro_recall")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Finished:
    """A cell that was trained and tested; `figures` are `evaluate`'s, by the test's key."""

    cell: Cell
    seed: int
    run: Path
    figures: Mapping[str, Any]
    bundle: Path | None


@dataclass(frozen=True)
class Result:
    """How good one model is in one row of the table, for one seed, after each of its iterations."""

    row: str
    test: str
    model: str
    seed: int
    texts: int
    trained_on: int
    published: float | None
    iterations: Sequence[Mapping[str, float]]

    @property
    def last(self) -> Mapping[str, float]:
        return self.iterations[-1]


@dataclass(frozen=True)
class Size:
    """What one model takes; `how` says in which form, and by what it is run."""

    row: str
    model: str
    how: str
    parameters: int
    megabytes: float
    milliseconds_per_text: float


def of_tests(finished: Sequence[Finished], place: Path, children: Children) -> tuple[list[Result], list[Size]]:
    """Every test of every cell, as PyTorch answers in FP32; the models of the first seed are timed."""
    results = [
        Result(
            row=one.cell.row,
            test=test.title,
            model=one.cell.model,
            seed=one.seed,
            texts=_first(one.figures[test.key])["texts"],
            trained_on=_trained_on(one),
            published=one.cell.published.get(test.title),
            iterations=[{name: at[name] for name in SCORES} for at in one.figures[test.key]["iterations"].values()],
        )
        for one in finished
        for test in one.cell.tests
    ]
    timed = [one for one in finished if one.seed == finished[0].seed]
    speeds = _milliseconds_per_text(timed, place)
    return results, [
        Size(one.cell.row, one.cell.model, "FP32, PyTorch", _parameters(one), _parameters(one) * 4 / 1e6, speed)
        for one, speed in zip(timed, speeds, strict=True)
    ]


def of_precisions(finished: Sequence[Finished], place: Path, children: Children) -> tuple[list[Result], list[Size]]:
    """Every precision of every cell's bundle, as the engine that serves answers; those of the first seed are timed."""
    results, bundles = [], [one.bundle for one in finished if one.bundle]
    for one, bundle in zip(finished, bundles, strict=True):
        quality = _read(bundle / "manifest.json")["quality"]["test"]
        texts = _first(one.figures[one.cell.tests[0].key])["texts"]
        results += [
            Result(
                precision.upper(), one.cell.tests[0].title, one.cell.model, one.seed, texts, _trained_on(one),
                one.cell.published.get(precision), quality[precision],
            )
            for precision in PRECISIONS
            if precision in quality
        ]  # fmt: skip
    timed = [one for one in finished if one.seed == finished[0].seed]
    return results, [size for one, speeds in zip(timed, _engine_speeds(timed, place, children), strict=True)
                     for size in _stored_sizes(one, speeds)]  # fmt: skip


def _stored_sizes(one: Finished, speeds: Mapping[str, Any]) -> list[Size]:
    return [
        Size("", one.cell.model, f"{name.upper()}, run as {speed['run_as']}", _parameters(one), speed["bytes"] / 1e6,
             speed["milliseconds_per_text"])
        for name, speed in speeds.items()
    ]  # fmt: skip


def _engine_speeds(timed: Sequence[Finished], place: Path, children: Children) -> list[Any]:
    output = place / "bundles" / "speed.json"
    bundles = [one.bundle for one in timed if one.bundle]
    texts = _test_file(timed[0], place)
    children.run("model_export", ["speed", *bundles, "--texts", texts, "--output", output], output.with_suffix(".log"))
    speeds = _read(output)
    return [speeds[bundle.name] for bundle in bundles]


def _milliseconds_per_text(timed: Sequence[Finished], place: Path) -> list[float]:
    """Median over rounds in which all take turns, each on texts of its own test part, sorted by length in batches."""
    models = [(runs.read_model(one.run), runs.read_tokenizer(one.run)) for one in timed]
    texts = [[record["text"] for record in read_records(_test_file(one, place))][:TIMED_TEXTS] for one in timed]
    seconds: list[list[float]] = [[] for _ in timed]
    for _ in range(ROUNDS):
        for place_of, ((model, tokenizer), mine) in enumerate(zip(models, texts, strict=True)):
            started = perf_counter()
            predict(model, tokenizer, mine)
            seconds[place_of].append(perf_counter() - started)
    return [median(taken) * 1000 / len(mine) for taken, mine in zip(seconds, texts, strict=True)]


def _test_file(one: Finished, place: Path) -> Path:
    return place / "data" / f"{one.cell.data}-{one.seed}" / "test.jsonl"


def _parameters(one: Finished) -> int:
    parameters: int = next(iter(one.figures.values()))["parameters"]
    return parameters


def _trained_on(one: Finished) -> int:
    texts: int = runs.read_info(one.run).provenance["texts"]["train"]
    return texts


def _first(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    at: Mapping[str, Any] = next(iter(figures["iterations"].values()))
    return at


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
