"""`python -m training`: train, evaluate and repeat the published experiments."""

import argparse
import json
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.config import TrainConfig
from training.errors import TrainingError
from training.experiments.options import ExperimentsConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures a run on a split: accuracy, macro F1, precision, recall, per class and at every iteration."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    split: Literal["train", "validation", "test", "all"] = "validation"
    """all: each that a bundle's manifest reports, of a mix also each of its sources."""
    dataset: str | None = None
    """Another data set with the same labels; the run's own unless given."""
    data_dir: Path | None = None
    """Read the data set here instead of from the hub."""
    iterations: int | None = None
    """Run the recurrent model this many times instead of as often as trained."""
    output: Path | None = None
    """Where the JSON goes; RUN/evaluation.json unless given."""


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status (130 after Ctrl-C)."""
    try:
        command = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train")]
            | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
            | Annotated[ExperimentsConfig, tyro.conf.subcommand("experiments")],
            prog="python -m training",
            description="Trains and evaluates the text classifiers. `train --config FILE` reads options from TOML or "
            "JSON; options on the command line win.",
            args=_take_config_file(arguments),
        )
        if isinstance(command, TrainConfig):
            _train(command)
        elif isinstance(command, EvaluateConfig):
            _evaluate(command)
        else:
            _experiments(command)
    except TrainingError as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("training: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(config: TrainConfig) -> None:
    from training.loop import train  # torch takes seconds to import; --help shall not

    run = train(config)
    print(f"run written to {run}; next: python -m training evaluate {run}")


def _evaluate(config: EvaluateConfig) -> None:
    from training.evaluate import evaluate, evaluate_all, table  # as above
    from training.run import write_json

    output = config.output or config.run / "evaluation.json"
    if config.split == "all":
        splits = evaluate_all(config.run, config.data_dir, config.dataset, config.iterations)
        write_json(output, splits)
        print("\n\n".join(map(table, splits.values())))
    else:
        figures = evaluate(config.run, config.data_dir, config.split, config.dataset, config.iterations)
        write_json(output, figures)
        print(table(figures))


def _experiments(config: ExperimentsConfig) -> None:
    from training.experiments.run import run_experiment  # as above

    written = run_experiment(config)
    print(f"written: {written}, with a figure (.png) and every cell's figures (.json) beside it")


def _take_config_file(arguments: list[str]) -> list[str]:
    """Puts the options that `train --config FILE` names before the other arguments, which thereby win."""
    parser = argparse.ArgumentParser(prog="python -m training", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    found, others = parser.parse_known_args(arguments)
    if found.config is None:
        return arguments
    if others[:1] != ["train"]:
        raise TrainingError("--config goes with train")
    return ["train", *_read_options(found.config), *others[1:]]


def _read_options(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise TrainingError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise TrainingError(f"--config {path}: an object of options is needed")
    values = {name.replace("_", "-"): value for name, value in values.items()}
    known = {field.name.replace("_", "-") for field in fields(TrainConfig)}
    if unknown := sorted(values.keys() - known):
        raise TrainingError(f"--config {path}: unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return [f"--{name}={value}" for name, value in values.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
