"""The comparison as one picture: what each load showed, recurrent beside baseline, with the spread over the rounds."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log10
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadtest import machine
from loadtest.figures import CURVE
from loadtest.options import Load, Options
from loadtest.rounds import Measured, Round, Subject, subjects
from loadtest.summary import MEMORY, Summary, find, summarise
from loadtest.tables import Spread, number

COLOURS: dict[str, str] = {"recurrent": "#0072b2", "baseline": "#e69f00", "both": "#009e73"}
"""Told apart by colour-blind readers too."""
_NAMES = {"both": "both in one process, half and half"}
_COLUMNS = 3
_MARKS = {50: "50", 90: "90", 99: "99", 99.9: "99.9"}

Panel = Callable[[Axes], None]


def draw(rounds: Sequence[Round], options: Options) -> bytes:
    """The picture as PNG; bars and lines are medians, whiskers and bands run from the lowest to the highest."""
    panels = _panels(rounds, options)
    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.9 * min(len(panels), _COLUMNS), 3.9 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, min(len(panels), _COLUMNS), squeeze=False).flatten()
    for place, axis in enumerate(axes):
        if place < len(panels):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.25)
            axis.set_axisbelow(True)
            panels[place](axis)
        else:
            axis.set_visible(False)
    handles = [axes[0].bar(0, 0, color=COLOURS[subject]) for subject in subjects(options)]
    names = [_NAMES.get(subject, subject) for subject in subjects(options)]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    plural = "s" if options.rounds > 1 else ""
    figure.suptitle(
        f"Recurrent and baseline under load: task {options.task}, {options.rounds} round{plural}, {machine.short()}"
    )
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    return written.getvalue()


def _panels(rounds: Sequence[Round], options: Options) -> list[Panel]:
    """What there is to show: the knee first, then each load's latencies, what it costs, memory."""
    summary, loads = summarise(rounds), options.loads()
    measured = [one for each in rounds for one in each.measured]
    steady = [load for load in loads if load.shape != "step"]
    panels: list[Panel] = []
    for load in loads:
        own = [one for one in measured if one.load == load.name]
        if load.shape == "step":
            panels[:0] = [
                partial(_knee, summary=summary, load=load, options=options),
                partial(_steps, own=own, options=options),
            ]
        elif load.shape in ("ramp", "spike"):
            panels += [partial(_course, own=own, load=load), partial(_curves, own=own, load=load)]
        elif load.list_size == 1 or len(loads) == 1:
            panels.append(partial(_curves, own=own, load=load))
    if steady:
        panels.append(partial(_rates, summary=summary, loads=steady, options=options))
        panels.append(partial(_cpu, summary=summary, loads=steady, options=options))
    return [*panels, partial(_memory, summary=summary, options=options)]


def _knee(panel: Axes, summary: Summary, load: Load, options: Options) -> None:
    _title(panel, f"Throughput with p99 under {options.service_level_ms:g} ms", "texts/s")
    _bars(panel, {_short(load): _spreads(summary, load.name, "level_texts_per_second", options)})


def _steps(panel: Axes, own: Sequence[Measured], options: Options) -> None:
    _title(panel, "Latency as arrivals get faster", "p99, ms")
    panel.set_xlabel("requests/s")
    for one in own:
        known = [(step.rate, step.p99_ms) for step in one.steps if step.p99_ms is not None]
        rates, latencies = [rate for rate, _ in known], [p99 for _, p99 in known]
        panel.plot(rates, latencies, "o", color=COLOURS[one.subject], alpha=0.75, markersize=5)
    panel.axhline(options.service_level_ms, color="#444", linestyle="--", linewidth=1)
    said = f"service level, {options.service_level_ms:g} ms"
    box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
    edge = panel.get_yaxis_transform()
    panel.text(
        0.99, options.service_level_ms * 1.03, said, transform=edge, fontsize=8, ha="right", va="bottom", bbox=box
    )
    _log(panel)


def _curves(panel: Axes, own: Sequence[Measured], load: Load) -> None:
    """Latency over the percent of requests that it covers, each nine of them as wide."""
    _title(panel, f"Latency: {load.title}", "ms")
    panel.set_xlabel("% of requests answered within")
    places = [-log10(1 - percent / 100) for percent in CURVE]
    for subject in dict.fromkeys(one.subject for one in own):
        curves = [one.curve for one in own if one.subject == subject and one.curve]
        if curves:
            points = list(zip(*curves, strict=False))  # a round with fewer answers has fewer nines
            low, high = [min(point) for point in points], [max(point) for point in points]
            panel.fill_between(places[: len(points)], low, high, color=COLOURS[subject], alpha=0.18, linewidth=0)
            panel.plot(places[: len(points)], [median(point) for point in points], color=COLOURS[subject], linewidth=2)
    panel.set_xticks([-log10(1 - percent / 100) for percent in _MARKS], list(_MARKS.values()))
    panel.grid(axis="x", alpha=0.25)
    _log(panel)


def _course(panel: Axes, own: Sequence[Measured], load: Load) -> None:
    _title(panel, f"Second by second: {load.title}", "slowest, ms")
    panel.set_xlabel("seconds; grey: answered requests/s")
    rates = panel.twinx()
    for one in own:
        seconds = [moment["second"] for moment in one.course]
        rates.plot(seconds, [moment["answered"] for moment in one.course], color="#999", alpha=0.4, linewidth=1)
        panel.plot(seconds, [moment["slowest_ms"] for moment in one.course], color=COLOURS[one.subject], linewidth=1.6)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("requests/s", color="#777")
    rates.spines[["top", "left"]].set_visible(False)
    _log(panel)


def _rates(panel: Axes, summary: Summary, loads: Sequence[Load], options: Options) -> None:
    _title(panel, "Throughput", "texts/s")
    _bars(panel, {_short(load): _spreads(summary, load.name, "texts_per_second", options) for load in loads})


def _cpu(panel: Axes, summary: Summary, loads: Sequence[Load], options: Options) -> None:
    _title(panel, "CPU time of a million texts", "seconds")
    figure = "cpu_seconds_per_million_texts"
    _bars(panel, {_short(load): _spreads(summary, load.name, figure, options) for load in loads})


def _memory(panel: Axes, summary: Summary, options: Options) -> None:
    _title(panel, "Memory", "MB")
    names = {"idle_memory_bytes": "processes\nidle", "peak_memory_bytes": "processes\npeak"}
    names |= {"model_memory_bytes": "models", "gpu_memory_bytes": "GPU"}
    groups = {label: _spreads(summary, MEMORY, figure, options) for figure, label in names.items()}
    _bars(panel, {label: spreads for label, spreads in groups.items() if spreads}, 1e6)


def _spreads(summary: Summary, load: str, figure: str, options: Options) -> dict[Subject, Spread]:
    found = {subject: find(summary, load, subject, figure) for subject in subjects(options)}
    return {subject: spread for subject, spread in found.items() if spread}


def _short(load: Load) -> str:
    return load.title.replace(", ", "\n", 1)


def _title(panel: Axes, title: str, unit: str) -> None:
    panel.set_title(title, fontsize=11)
    panel.set_ylabel(unit)


def _log(panel: Axes) -> None:
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _bars(panel: Axes, groups: Mapping[str, Mapping[Subject, Spread]], unit: float = 1.0) -> None:
    """A group of bars for each label, a bar in it for each subject."""
    sides = [subject for subject in COLOURS if any(subject in spreads for spreads in groups.values())]
    width = 0.8 / max(len(sides), 1)
    for side, subject in enumerate(sides):
        known = [(place, spreads[subject]) for place, spreads in enumerate(groups.values()) if subject in spreads]  # type: ignore[index]  # its keys are subjects
        heights = [spread.median / unit for _, spread in known]
        whiskers = [
            [(spread.median - spread.low) / unit for _, spread in known],
            [(spread.high - spread.median) / unit for _, spread in known],
        ]
        places = [place + (side - (len(sides) - 1) / 2) * width for place, _ in known]
        caps = 3 if any(map(any, whiskers)) else 0
        bars = panel.bar(places, heights, width * 0.94, yerr=whiskers, capsize=caps, color=COLOURS[subject])
        panel.bar_label(bars, [number(height) for height in heights], fontsize=8, padding=2)
    panel.set_xticks(range(len(groups)), list(groups))
    panel.margins(y=0.15)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if not sides:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes)
