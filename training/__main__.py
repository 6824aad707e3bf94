"""`python -m training`: pretrain, train, linear, states, average, evaluate, seeds, record, experiments."""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.config import LinearConfig, PretrainConfig, RunConfig, StatesConfig, TrainConfig
from training.errors import TrainingError
from training.experiments.options import ExperimentsConfig
from training.shapes import Reading


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
    max_tokens: int | None = None
    """Read so much of each text instead of as much as in training."""
    tail_tokens: int | None = None
    """Read so many of a longer text's last tokens, as many fewer of its first, instead of as many as in training."""
    output: Path | None = None
    """Where the JSON goes; RUN/evaluation.json unless given."""


@dataclass(frozen=True)
class AverageConfig:
    """Writes a run whose weights are the mean of others', as of a network before and after it was trained further."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run directories, of one shape, with one tokenizer; options and texts will be the last one's."""
    output_dir: Path
    """The run directory that is written."""


@dataclass(frozen=True)
class RecordConfig:
    """Writes what each run cost, tokens per second and peak memory, as a table and as JSON."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run directories, in the order of the table."""
    output: Path = Path("docs/results/training")
    """Without the suffix: .md and .json are written."""


@dataclass(frozen=True)
class SeedsConfig:
    """Collects what `evaluate --split all` found of trainings that differ in their seed: mean and spread, as a table
    and as JSON.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The run directories, of one architecture or both."""
    output: Path
    """Without the suffix: .md and .json are written."""


TRAININGS: Mapping[str, type[RunConfig]] = {"pretrain": PretrainConfig, "train": TrainConfig}
RESUMED = frozenset({*TRAININGS, "states", "experiments"})


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status (130 after Ctrl-C)."""
    try:
        command = tyro.cli(
            Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
            | Annotated[TrainConfig, tyro.conf.subcommand("train")]
            | Annotated[LinearConfig, tyro.conf.subcommand("linear")]
            | Annotated[StatesConfig, tyro.conf.subcommand("states")]
            | Annotated[AverageConfig, tyro.conf.subcommand("average")]
            | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
            | Annotated[SeedsConfig, tyro.conf.subcommand("seeds")]
            | Annotated[RecordConfig, tyro.conf.subcommand("record")]
            | Annotated[ExperimentsConfig, tyro.conf.subcommand("experiments")],
            prog="python -m training",
            description="Trains and evaluates the text classifiers. `train --config FILE` and `pretrain --config FILE` "
            "read options from TOML or JSON; options on the command line win.",
            args=_take_config_file(arguments),
        )
        _run(command)
    except TrainingError as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if RESUMED.intersection(arguments[:1]) else ""
        print(f"training: stopped{goes_on}", file=sys.stderr)
        return 130
    return 0


def _run(
    command: PretrainConfig
    | TrainConfig
    | LinearConfig
    | StatesConfig
    | AverageConfig
    | EvaluateConfig
    | SeedsConfig
    | RecordConfig
    | ExperimentsConfig,
) -> None:
    match command:
        case PretrainConfig():
            from training.pretrain import pretrain  # torch takes seconds to import; --help shall not

            print(
                f"run written to {pretrain(command)}; next: python -m training train --init-from {command.output_dir}"
            )
        case TrainConfig():
            from training.loop import train  # as above

            data = "" if command.data_dir is None else f" --data-dir {command.data_dir}"
            print(f"run written to {train(command)}; next: python -m training evaluate {command.output_dir}{data}")
        case LinearConfig():
            from training.linear import fit  # as above

            figures = fit(command)
            print(
                f"run written to {command.output_dir}: validation accuracy {figures['accuracy']:.4f}, macro F1 "
                f"{figures['macro_f1']:.4f}; next: python -m training train --teacher {command.output_dir}"
            )
        case StatesConfig():
            from training.states import collect  # as above

            print(f"states written to {collect(command)}; next: python -m training train --states {command.output_dir}")
        case AverageConfig():
            from training.average import average  # as above

            print(
                f"run written to {average(command.runs, command.output_dir)}; next: python -m training evaluate "
                f"{command.output_dir}"
            )
        case EvaluateConfig():
            _evaluate(command)
        case SeedsConfig():
            from training.seeds import compare  # as above

            print(compare(command.runs, command.output))
        case RecordConfig():
            from training.record import record  # as above

            print(record(command.runs, command.output))
        case ExperimentsConfig():
            from training.experiments.run import run_experiment  # as above

            written = run_experiment(command)
            print(f"written: {written}, with a figure (.png) and every cell's figures (.json) beside it")


def _evaluate(config: EvaluateConfig) -> None:
    from training.evaluate import evaluate, evaluate_all, table  # as above
    from training.run import EVALUATION, make_room, write_json

    output = config.output or config.run / EVALUATION
    if config.output:
        make_room(output)
    reading = Reading(config.max_tokens, config.tail_tokens)
    if config.split == "all":
        splits = evaluate_all(config.run, config.data_dir, config.dataset, config.iterations, reading)
        print("\n\n".join(map(table, splits.values())))
        write_json(output, splits)
    else:
        figures = evaluate(config.run, config.data_dir, config.split, config.dataset, config.iterations, reading)
        print(table(figures))
        write_json(output, figures)


def _take_config_file(arguments: list[str]) -> list[str]:
    """Puts the options that `--config FILE` names before the other arguments, which thereby win."""
    parser = argparse.ArgumentParser(prog="python -m training", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    found, others = parser.parse_known_args(arguments)
    if found.config is None:
        return arguments
    if not others or others[0] not in TRAININGS:
        raise TrainingError(f"--config goes with {' and '.join(TRAININGS)}")
    return [others[0], *_read_options(found.config, TRAININGS[others[0]]), *others[1:]]


def _read_options(path: Path, kind: type[RunConfig]) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise TrainingError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise TrainingError(f"--config {path}: an object of options is needed")
    values = {name.replace("_", "-"): value for name, value in values.items()}
    known = {field.name.replace("_", "-"): field.default for field in fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise TrainingError(f"--config {path}: unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    arguments = []
    for name, value in values.items():
        several = isinstance(known[name], tuple) and isinstance(value, list)
        arguments += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
