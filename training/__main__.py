"""`python -m training`: train and evaluate."""

import json
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from training.config import TrainConfig
from training.errors import TrainingError


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures a run on a split: accuracy, macro F1, precision, recall, per class and at every iteration."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    split: Literal["train", "validation", "test"] = "validation"
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
        defaults, arguments = _take_config_file(arguments)
        command = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train", default=defaults)]
            | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")],
            prog="python -m training",
            description="Trains and evaluates the text classifiers. `train --config FILE` reads options from TOML or "
            "JSON; options on the command line win.",
            args=arguments,
        )
        _train(command) if isinstance(command, TrainConfig) else _evaluate(command)
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
    from training.evaluate import evaluate, table  # as above
    from training.run import write_json

    figures = evaluate(config.run, config.data_dir, config.split, config.dataset, config.iterations)
    write_json(config.output or config.run / "evaluation.json", figures)
    print(table(figures))


def _take_config_file(arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """Takes `--config FILE` out of the arguments and makes its values the defaults."""
    if "--config" not in arguments:
        return TrainConfig(), arguments
    at = arguments.index("--config")
    if at + 1 == len(arguments):
        raise TrainingError("--config needs a file (TOML or JSON)")
    path = Path(arguments[at + 1])
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise TrainingError(f"--config {path}: {error}") from error
    known = {field.name for field in fields(TrainConfig)}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(values.keys() - known):
        raise TrainingError(f"--config {path}: unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    values |= {name: Path(values[name]) for name in ("data_dir", "output_dir") if name in values}
    return TrainConfig(**values), arguments[:at] + arguments[at + 2 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
