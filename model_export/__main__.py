"""`python -m model_export RUN OUT`, `... inspect BUNDLE`, `... evaluate BUNDLE ...` and `... speed BUNDLE ...`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from model_export.errors import ExportError
from service.errors import StartError
from training.errors import TrainingError


@dataclass(frozen=True)
class Export:
    """Exports a run as a bundle: ONNX graphs in FP16 and INT8, proved against PyTorch and FP32, with a manifest.

    `python -m model_export inspect BUNDLE` prints what is in one, `python -m model_export evaluate BUNDLE ...` measures
    how good some are, on what their manifests report or on your texts.
    """

    run: tyro.conf.Positional[Path]
    """The run directory."""
    out: tyro.conf.Positional[Path]
    """The bundle directory to write, models/TASK-ARCHITECTURE by custom; one of that name that is there is replaced."""
    data_dir: Path | None = None
    """Read the run's data set here instead of from the hub: INT8's scales, calibration and proof need it."""
    judge_on: tuple[str, ...] = ()
    """Other data sets with the same labels whose test splits quality is reported on too; nothing is tuned on them."""
    max_tokens: int | None = None
    """How much of a text it reads; as much as in training unless given. More may help long texts, for more time."""
    tail_tokens: int | None = None
    """How many of these are a longer text's last ones; as in training unless given. An end often says how it was."""
    precisions: tuple[Literal["fp16", "int8"], ...] = ("fp16", "int8")
    """One that is too far from FP32 on some split is left out, and the manifest says why."""
    portable: bool = False
    """Also write one self-contained graph per precision (ids, mask -> logits), for serving elsewhere. For INT8 on an
    x86 CPU without VNNI set `session.x64quantprecision` to 1 there, as this service does, or its 8-bit sums saturate.
    """
    max_accuracy_lost: float = 0.005
    """Most accuracy (0 to 1) that a precision may lose against FP32 at full depth, on any split."""
    min_labels_agree: float = 0.98
    """Least share of labels on which a precision must agree with FP32."""


@dataclass(frozen=True)
class Inspect:
    """Verifies a bundle and prints what is in it."""

    bundle: tyro.conf.Positional[Path]
    figure: Path | None = None
    """Also draw its calibration and its exit curve into this PNG file."""


@dataclass(frozen=True)
class Evaluate:
    """Measures bundles with the engine that serves them, in each precision: what their manifests say, or on your texts.

    As served: texts leave at the bundle's own exit threshold. The exit status is 1 where a manifest says otherwise.
    """

    bundles: tyro.conf.Positional[tuple[Path, ...]]
    """Of several, each is also compared with those after it."""
    texts: Path | None = None
    """Your own: a .jsonl, .csv, .tsv or .parquet with a `text` and a `label`, one of the bundles', in each row."""
    data_dir: Path | None = None
    """Read the data sets that the manifests name here instead of from the hub."""
    precisions: tuple[Literal["fp16", "int8"], ...] = ()
    """These alone; all that a bundle has unless given."""
    output: Path | None = None
    """Also write all figures, with macro F1, precision and recall, to this JSON file."""


@dataclass(frozen=True)
class Speed:
    """Times the bundles' precisions against each other, on one thread, at full depth."""

    bundles: tyro.conf.Positional[tuple[Path, ...]]
    texts: Path
    """A file of records with a `text`: .jsonl, .csv, .tsv, .parquet."""
    output: Path
    """Where the JSON goes."""
    most: int = 512
    """Texts taken from the file."""
    rounds: int = 5


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status (130 after Ctrl-C)."""
    try:
        if arguments[:1] == ["inspect"]:
            _inspect(tyro.cli(Inspect, prog="python -m model_export inspect", args=arguments[1:]))
        elif arguments[:1] == ["evaluate"]:
            return _evaluate(tyro.cli(Evaluate, prog="python -m model_export evaluate", args=arguments[1:]))
        elif arguments[:1] == ["speed"]:
            _speed(tyro.cli(Speed, prog="python -m model_export speed", args=arguments[1:]))
        else:
            _export(tyro.cli(Export, prog="python -m model_export", args=arguments))
    except (ExportError, TrainingError, StartError) as error:
        print(f"model_export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("model_export: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _inspect(command: Inspect) -> None:
    from model_export.inspect import inspect  # --help shall not wait for it

    print(inspect(command.bundle))
    if command.figure:
        from model_export.figure import draw

        draw(command.bundle, command.figure)


def _evaluate(command: Evaluate) -> int:
    from model_export.evaluate import evaluate, table, to_json  # as above
    from training.run import make_room, write_json

    if command.output:
        make_room(command.output)
    figures = evaluate(command.bundles, command.texts, command.data_dir, command.precisions)
    print(table(figures))
    if command.output:
        write_json(command.output, to_json(figures))
    if wrong := [one for one in figures if one.differs]:
        print(f"model_export: {len(wrong)} of {len(figures)} differ from what the manifest says", file=sys.stderr)
    return int(bool(wrong))


def _speed(command: Speed) -> None:
    from model_export.speed import speed  # as above
    from training.run import make_room, write_json

    make_room(command.output)
    write_json(command.output, speed(command.bundles, command.texts, command.most, command.rounds))


def _export(command: Export) -> None:
    from model_export.inspect import inspect  # torch takes seconds to import
    from model_export.package import ExportOptions, export
    from model_export.parity import Tolerances
    from training.shapes import Reading

    tolerances = Tolerances(command.max_accuracy_lost, command.min_labels_agree)
    options = ExportOptions(
        command.run,
        command.out,
        command.data_dir,
        command.precisions,
        command.portable,
        tolerances,
        command.judge_on,
        Reading(command.max_tokens, command.tail_tokens),
    )
    print(inspect(export(options)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
