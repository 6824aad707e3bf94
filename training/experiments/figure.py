"""An experiment's accuracies as one picture: a panel for each test, a group of marks for each row."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.errors import TrainingError
from training.experiments.gather import Result

_COLOURS = ("#999999", "#0072b2", "#56b4e9", "#d55e00")  # told apart by colour-blind readers too


def draw(title: str, results: Sequence[Result], path: Path) -> None:
    """Writes a PNG: means over the seeds, a line from the lowest to the highest, the published figure as a mark."""
    tests = list(dict.fromkeys(one.test for one in results))
    models = list(dict.fromkeys(one.model for one in results))
    figure = Figure(figsize=(max(5.0, 4.0 * len(tests)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(tests), squeeze=False, sharey=True)[0]
    for panel, test in zip(axes, tests, strict=True):
        _panel(panel, test, [one for one in results if one.test == test], models)
    axes[0].set_ylabel("accuracy")
    figure.legend(*_legend(axes), loc="outside lower center", ncols=len(models) + 1, frameon=False)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120, format="png", bbox_inches="tight")  # a title may be wider than its panels
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from error


def _panel(panel: Axes, test: str, results: Sequence[Result], models: Sequence[str]) -> None:
    rows = list(dict.fromkeys(one.row for one in results))
    for place, model in enumerate(models):
        colour = _COLOURS[place % len(_COLOURS)]
        for at, row in enumerate(rows):
            several = [one for one in results if (one.row, one.model) == (row, model)]
            if not several:
                continue
            x = at + (place - (len(models) - 1) / 2) * 0.22
            values = [one.last["accuracy"] for one in several]
            reach = [[mean(values) - min(values)], [max(values) - mean(values)]]
            panel.errorbar(
                [x], [mean(values)], reach, color=colour, marker="o", capsize=4, label=model, linestyle="none"
            )
            if (published := several[0].published) is not None:
                panel.plot(
                    [x], [published], color=colour, marker="D", fillstyle="none", linestyle="none", label="published"
                )
    panel.set(title=test, xticks=range(len(rows)), xlim=(-0.5, len(rows) - 0.5))
    panel.set_xticklabels(rows)
    panel.grid(axis="y", linewidth=0.4)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Each name once."""
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
