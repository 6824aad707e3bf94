"""How good trainings of one recipe are over several seeds: mean, spread, and recurrent against baseline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training import run as runs
from training.errors import TrainingError
from training.tables import grid, spread

Splits = dict[str, dict[str, Any]]


def compare(directories: Sequence[Path], output: Path) -> str:
    """Writes `output`.json and `output`.md of what `evaluate --split all` found; returns the table.

    Raises TrainingError where there is no run, or one that was not evaluated so, was on other splits than the first
    or read more or less of a text, or has another's architecture and seed.
    """
    if not directories:
        raise TrainingError("no run: give the directories of some that differ in their seed")
    found: dict[tuple[str, int], Splits] = {}
    for run in directories:
        splits = _read(run)
        first = next(iter(found.values()), splits)
        if splits.keys() != first.keys():
            raise TrainingError(f"{run} was evaluated on {', '.join(splits)}, {directories[0]} on {', '.join(first)}")
        read, others = _what_was_read(splits), _what_was_read(first)
        if read != others:
            raise TrainingError(f"{run} was evaluated on {read}, {directories[0]} on {others}")
        figures = next(iter(splits.values()))
        if found.setdefault((figures["architecture"], figures["seed"]), splits) is not splits:
            raise TrainingError(f"{run}: another run is {figures['architecture']} with seed {figures['seed']} as well")
    table = _table(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(output.with_suffix(".json"), {"runs": list(found.values())})
    seeds = ", ".join(map(str, sorted({seed for _, seed in found})))
    text = (
        f"# Quality over seeds\n\nWritten by `python -m training seeds`. FP32, at full depth, on {others}; mean ± "
        f"standard deviation over the seeds {seeds}; the difference is that of runs with the same seed.\n\n{table}\n"
    )
    runs.replace(output.with_suffix(".md"), text.encode())
    return table


def _read(run: Path) -> Splits:
    path = run / runs.EVALUATION
    try:
        splits: Splits = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {error}; `python -m training evaluate {run} --split all` writes it") from error
    of_splits = isinstance(splits, dict) and splits and all(isinstance(one, dict) for one in splits.values())
    if not of_splits or not all({"seed", "reads"} <= figures.keys() for figures in splits.values()):
        raise TrainingError(
            f"{path} is not of all splits; `python -m training evaluate {run} --split all` writes it so"
        )
    return splits


def _what_was_read(splits: Splits) -> str:
    reads: dict[str, int] | str = next(iter(splits.values()))["reads"]
    if isinstance(reads, str):  # a linear model's
        return "whole texts"
    most, tail = reads["max_tokens"], reads["tail_tokens"]
    cut = f"first {most - tail} and last {tail}" if tail else f"first {most}"
    return f"texts of up to {most} tokens and the {cut} of longer ones"


def _table(found: dict[tuple[str, int], Splits]) -> str:
    architectures = list(dict.fromkeys(architecture for architecture, _ in found))
    seeds = sorted({seed for _, seed in found})
    head = ["split", "texts", *(f"{one}, {figure}" for one in architectures for figure in ("accuracy", "macro F1"))]
    lines = [[*head, f"{architectures[0]} less {architectures[1]}, points"] if len(architectures) == 2 else head]
    for split in next(iter(found.values())):
        last = {key: list(splits[split]["iterations"].values())[-1] for key, splits in found.items()}
        line = [split, f"{next(iter(last.values()))['texts']:,}"]
        for one in architectures:
            several = [last[one, seed] for seed in seeds if (one, seed) in last]
            line += [spread([figures[name] for figures in several]) for name in ("accuracy", "macro_f1")]
        if len(architectures) == 2:
            first, second = architectures
            both = [seed for seed in seeds if (first, seed) in last and (second, seed) in last]
            differences = [100 * (last[first, seed]["accuracy"] - last[second, seed]["accuracy"]) for seed in both]
            line.append(spread(differences, "+.2f"))
        lines.append(line)
    return grid(lines)
