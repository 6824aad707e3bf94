"""What an experiment found, as Markdown, JSON and a figure: means over the seeds, spread, the published figures."""

import json
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from training import run as runs
from training.errors import TrainingError
from training.experiments.cells import Experiment
from training.experiments.figure import draw
from training.experiments.gather import SCORES, Result, Size
from training.experiments.options import ExperimentsConfig
from training.tables import grid, spread

Group = tuple[str, str, str]
"""Row, test and model: what several seeds repeat."""


def write_report(
    config: ExperimentsConfig,
    experiment: Experiment,
    recipes: Sequence[Mapping[str, Any]],
    results: Sequence[Result],
    sizes: Sequence[Size],
) -> Path:
    """Writes NAME.md, NAME.json and NAME.png, other seeds' results there included; returns the first."""
    others = recorded_results(config, recipes)
    results = sorted([*others, *results], key=lambda one: one.seed)
    recipes = [*_recipes_of({one.seed for one in others}, recipes), *recipes]
    config = replace(config, seeds=tuple(dict.fromkeys(one.seed for one in results)))
    config.results.mkdir(parents=True, exist_ok=True)
    page = config.results / f"{config.name}.md"
    content = {
        "command": command(config),
        "machine": machine(),
        "recipes": [dict(recipe) for recipe in recipes],
        "results": [asdict(one) for one in results],
        "sizes": [asdict(one) for one in sizes],
    }
    runs.replace(page.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode())
    draw(experiment.title, results, page.with_suffix(".png"))
    runs.replace(page, as_markdown(config, experiment, recipes, results, sizes).encode())
    return page


def recorded_results(config: ExperimentsConfig, recipes: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Results of other seeds that an earlier run wrote, perhaps on another machine.

    TrainingError where they come from other recipes, since no mean could be taken over both.
    """
    path = config.results / f"{config.name}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    others = [Result(**one) for one in content["results"] if one["seed"] not in config.seeds]
    ours = _without_seeds(recipes)
    for recipe in _without_seeds([recipe for recipe in content["recipes"] if recipe["seed"] not in config.seeds]):
        # An option that is younger than the record had no other value then.
        if not any(all(recipe.get(name, value) == value for name, value in one.items()) for one in ours):
            raise TrainingError(
                f"{path} holds other seeds by another recipe: `{content['command']}` wrote it; give the same "
                "options, or another --results-dir"
            )
    return others


def _without_seeds(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: str(value).removesuffix(f"-{recipe['seed']}") if name == "dataset" else value
         for name, value in recipe.items() if name != "seed"}
        for recipe in recipes
    ]  # fmt: skip


def _recipes_of(seeds: Collection[int], recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same recipes with other seeds."""
    distinct = {json.dumps(recipe): recipe for recipe in _without_seeds(recipes)}.values()
    return [
        recipe | {"seed": seed, "dataset": f"{recipe['dataset']}-{seed}"}
        for seed in sorted(seeds)
        for recipe in distinct
    ]


def as_markdown(
    config: ExperimentsConfig,
    experiment: Experiment,
    recipes: Sequence[Mapping[str, Any]],
    results: Sequence[Result],
    sizes: Sequence[Size],
) -> str:
    parts = [
        f"# {experiment.title}",
        *(["A quick look with tiny models: nothing follows from these figures."] if config.quick else []),
        *experiment.notes,
        _results_table(results),
        _spread_note(config.seeds),
        "## Recurrent less baseline, in points of accuracy",
        _differences_table(results),
        "Under one protocol: the same split, recipe and seed for both; mean of the differences by seed.",
        "## Size and time",
        _sizes_table(sizes),
        "One thread, texts sorted by length in batches, the models of one seed, medians of rounds in which all take "
        f"turns. {'; '.join(_machine_words())}.",
        f"![accuracy]({config.name}.png)",
        f"Recipe, for both models alike: {_recipe_words(recipes)}. Every cell's figures, also after each iteration: "
        f"[{config.name}.json]({config.name}.json).",
        f"Made by `{command(config)}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def groups(results: Sequence[Result]) -> dict[Group, list[Result]]:
    """The results that differ in the seed alone, together."""
    found: dict[Group, list[Result]] = {}
    for one in results:
        found.setdefault((one.row, one.test, one.model), []).append(one)
    return found


def _results_table(results: Sequence[Result]) -> str:
    head = ["", "tested on", "model", "accuracy", "macro F1", "precision", "recall", "published accuracy",
            "texts to train / test"]  # fmt: skip
    lines = [
        [
            row,
            test,
            model,
            *(_of_seeds(name, several) for name in SCORES),
            "-" if several[0].published is None else f"{several[0].published:.4f}",
            f"{_range([one.trained_on for one in several])} / {_range([one.texts for one in several])}",
        ]
        for (row, test, model), several in groups(results).items()
    ]
    return grid([head, *lines])


def _of_seeds(name: str, several: Sequence[Result]) -> str:
    """One figure's mean over the seeds; how many, where not all have it."""
    values = [one.last[name] for one in several if name in one.last]
    some = f" ({len(values)} of {len(several)} seeds)" if 0 < len(values) < len(several) else ""
    return spread(values) + some


def _range(counts: Sequence[int]) -> str:
    """The lowest and the highest, or the one that all seeds have."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _differences_table(results: Sequence[Result]) -> str:
    """Each recurrent model beside the baseline of the same row, test and seed."""
    accuracy = {(one.row, one.test, one.model, one.seed): one.last["accuracy"] for one in results}
    lines = []
    for (row, test, model), several in groups(results).items():
        if model.startswith("baseline") or (row, test, "baseline", several[0].seed) not in accuracy:
            continue
        ours = [100 * (one.last["accuracy"] - accuracy[row, test, "baseline", one.seed]) for one in several]
        published = groups(results)[row, test, "baseline"][0].published
        theirs = (
            "-"
            if several[0].published is None or published is None
            else f"{100 * (several[0].published - published):+.2f}"
        )
        lines.append([row, test, model, spread(ours, "+.2f"), theirs])
    return grid([["", "tested on", "model", "ours", "published"], *lines])


def _sizes_table(sizes: Sequence[Size]) -> str:
    lines = [
        [one.row, one.model, one.how, f"{one.parameters:,}", f"{one.megabytes:.1f}", f"{one.milliseconds_per_text:.2f}"]
        for one in sizes
    ]
    return grid([["", "model", "as", "parameters", "MB", "ms per text"], *lines])


def _spread_note(seeds: Sequence[int]) -> str:
    named, means = ", ".join(map(str, seeds)), "Precision, recall and F1 are means over the labels."
    if len(seeds) == 1:
        return f"One seed ({named}), so nothing is known of the spread. {means}"
    return f"Mean ± standard deviation over the seeds {named}, each of which draws its own split. {means}"


def _recipe_words(recipes: Sequence[Mapping[str, Any]]) -> str:
    """What all trainings have in common, and what some have otherwise."""
    names = dict.fromkeys(
        name for recipe in recipes for name in recipe if name not in ("architecture", "dataset", "seed")
    )
    words = []
    for name in names:
        values = list(dict.fromkeys(str(recipe[name]) for recipe in recipes if name in recipe))
        some = "" if all(name in recipe for recipe in recipes) else " (some)"
        words.append(f"{name.replace('_', ' ')} {' or '.join(values)}{some}")
    return ", ".join(words)


def command(config: ExperimentsConfig) -> str:
    """What repeats the experiment, but for the places of one machine."""
    given = {name: getattr(config, name) for name in ("effort", "batch_size", "learning_rate", "mixed_precision")}
    defaults = {one.name: one.default for one in fields(config)}
    return " ".join(
        [
            f"python -m training experiments {config.name} --seeds {' '.join(map(str, config.seeds))}",
            *(f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value != defaults[name]),
            *(["--quick"] if config.quick else []),
        ]
    )


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def _machine_words() -> list[str]:
    return [f"{name} {value}" for name, value in machine().items() if value]
