"""Runs an experiment: every cell for every seed, several at once, each going on where it was."""

import json
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training import run as runs
from training.config import TrainConfig
from training.errors import TrainingError
from training.evaluate import evaluate
from training.experiments.cells import EXPERIMENTS, RECIPE, Cell, Exam, Experiment
from training.experiments.children import Children
from training.experiments.gather import Finished, of_precisions, of_tests
from training.experiments.options import ExperimentsConfig
from training.experiments.report import recorded_results, write_report
from training.experiments.selections import SELECTIONS, write_selection
from training.prepare import recorded_options

FIGURES, LOG, MANIFEST = "figures.json", "log.txt", "manifest.json"
QUICK: Mapping[str, Any] = {
    "layers": 1, "width": 32, "heads": 2, "feed_forward": 32, "max_tokens": 32, "vocabulary": 400, "num_epochs": 1,
    "batch_size": 16,
}  # fmt: skip
QUICK_TEXTS = 300


def run_experiment(config: ExperimentsConfig) -> Path:
    """Trains and tests what is missing, then writes table, figure and JSON; returns the table's file."""
    experiment = EXPERIMENTS[config.name]
    recipes = [_recipe(train_config(config, cell, seed)) for seed in config.seeds for cell in experiment.cells]
    recorded_results(config, recipes)  # what could not be written together is said before the work
    _write_selections(config, experiment)
    torch.set_num_threads(1)  # testing, and above all timing
    with _told_to_end_as_by_ctrl_c(), Children(threads=1 if config.jobs > 1 else None) as children:
        finished = _finish_all(config, experiment, children)
        gather = of_precisions if experiment.by_precision else of_tests
        results, sizes = gather(finished, config.place, children)
    return write_report(config, experiment, recipes, results, sizes)


@contextmanager
def _told_to_end_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, whose default would leave the trainings behind, does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_selections(config: ExperimentsConfig, experiment: Experiment) -> None:
    needed = {cell.data for cell in experiment.cells} | {test.data for cell in experiment.cells for test in cell.tests}
    for name in sorted(needed & SELECTIONS.keys()):
        for seed in config.seeds:
            write_selection(name, seed, config.data_dir, config.place / "data", QUICK_TEXTS if config.quick else None)


def _finish_all(config: ExperimentsConfig, experiment: Experiment, children: Children) -> list[Finished]:
    """Every cell for every seed, in their order."""
    cells = [(cell, seed) for seed in config.seeds for cell in experiment.cells]
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(cells), unit="cell", smoothing=0) as bar:
        begun = [pool.submit(_finish, config, experiment, cell, seed, children) for cell, seed in cells]
        try:
            for done in as_completed(begun):
                bar.set_postfix_str(done.result().run.name)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()  # or leaving the pool would wait for them
            raise
    return [one.result() for one in begun]


def _finish(config: ExperimentsConfig, experiment: Experiment, cell: Cell, seed: int, children: Children) -> Finished:
    """Trains, tests and exports a cell as far as that is missing."""
    options = train_config(config, cell, seed)
    run = options.output_dir
    if not (run / FIGURES).exists():
        children.run("training", ["train", *_arguments(options)], run.with_name(f"{run.name}.{LOG}"))
        runs.write_json(run / FIGURES, {})
    _check_same(options)
    figures: dict[str, Any] = json.loads((run / FIGURES).read_text(encoding="utf-8"))
    for test in cell.tests:
        if test.key not in figures:
            figures[test.key] = _evaluate(config, run, test, seed)
            runs.write_json(run / FIGURES, figures)
    bundle = config.place / "bundles" / run.name
    if experiment.by_precision and not is_of(bundle, run):
        # However far INT8 is off: that is what is asked here.
        limits = ["--max-accuracy-lost", "1", "--min-labels-agree", "0"]
        children.run("model_export", [run, bundle, "--data-dir", config.place / "data", *limits], run / f"export.{LOG}")
    return Finished(cell, seed, run, figures, bundle if experiment.by_precision else None)


def is_of(bundle: Path, run: Path) -> bool:
    """Whether the bundle is there, and of this run and not of one that stood there before."""
    if not (bundle / MANIFEST).exists():
        return False
    made_of = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["training"]["run_id"]
    return bool(made_of == runs.read_info(run).provenance["run_id"])


def train_config(config: ExperimentsConfig, cell: Cell, seed: int) -> TrainConfig:
    """The options of one training; it reads the split that was written for its seed."""
    options: dict[str, Any] = {
        "num_epochs": max(1, round(cell.epochs * config.effort)),
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "mixed_precision": config.mixed_precision,
        **RECIPE,
        **cell.options,
        **(QUICK if config.quick else {}),
    }
    return TrainConfig(
        dataset=f"{cell.data}-{seed}",
        data_dir=config.place / "data",
        output_dir=config.place / "runs" / cell.run_name(seed),
        architecture=cell.architecture,
        seed=seed,
        **options,
    )


def _arguments(options: TrainConfig) -> list[str]:
    """The command line that says the same."""
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    return [
        f"--{one.name.replace('_', '-')}={given[one.name]}" for one in fields(options) if given[one.name] != one.default
    ]


def _check_same(options: TrainConfig) -> None:
    """TrainingError where the run that stands there was trained in another way."""
    there, wanted = runs.read_info(options.output_dir).options, recorded_options(options)
    changed = [name for name, value in there.items() if name in wanted and wanted[name] != value]
    if changed:
        raise TrainingError(
            f"{options.output_dir} was trained with other options ({', '.join(changed)}): choose another --output-dir"
        )


def _recipe(options: TrainConfig) -> dict[str, Any]:
    """What a reader needs to repeat the training; where files lie is his own affair."""
    return {name: value for name, value in recorded_options(options).items() if value not in (None, [])}


def _evaluate(config: ExperimentsConfig, run: Path, test: Exam, seed: int) -> dict[str, Any]:
    own = test.data in SELECTIONS
    dataset, data_dir = (f"{test.data}-{seed}", config.place / "data") if own else (test.data, config.data_dir)
    return evaluate(run, data_dir, test.split, dataset, None)
