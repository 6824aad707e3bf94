"""The run as one picture: throughput under the raw ceiling, latency over the bare call, CPU time of a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from loadtest.bench.options import FIXED, BenchOptions, ModeName
from loadtest.bench.run import Results
from loadtest.bench.summary import Summary
from loadtest.tables import Spread, number

COLOURS: dict[ModeName, str] = {"recurrent": "#0072b2", "early-exit": "#009e73", "baseline": "#e69f00"}
"""Told apart by colour-blind readers too; recurrent and baseline as in the load test's figure."""


def write(results: Results, options: BenchOptions) -> Path:
    """Writes bench.png into the output directory; marks are medians, whiskers run from the lowest to the highest."""
    summary = Summary(results.measured)
    figure = Figure(figsize=(14, 5), layout="constrained")
    throughput, latency, cpu = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    loads = summary.loads()
    _throughput(throughput, summary, loads)
    _latency(latency, summary)
    _cpu(cpu, summary, loads)
    for panel in (throughput, latency, cpu):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    figure.suptitle(f"rounds: {options.rounds}, {options.seconds:g} s a cell; load generator on the same cores")
    handles, names = throughput.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    path = options.output_dir / "bench.png"
    figure.savefig(path, dpi=120)
    return path


def _bars(panel: Axes, summary: Summary, loads: Mapping[str, str], figure: str) -> None:
    width = 0.8 / max(len(summary.modes), 1)
    for side, mode in enumerate(summary.modes):
        spreads = [(place, summary.spread(name, mode, figure)) for place, name in enumerate(loads)]
        known = [(place, spread) for place, spread in spreads if spread]
        panel.bar(
            [place + (side - (len(summary.modes) - 1) / 2) * width for place, _ in known],
            [spread.median for _, spread in known],
            width,
            yerr=_whiskers([spread for _, spread in known]),
            error_kw={"elinewidth": 0.8},
            color=COLOURS[mode],
            label=mode,
        )
    panel.set_xticks(range(len(loads)), [words.removeprefix("single, ") for words in loads.values()])


def _whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]


def _throughput(panel: Axes, summary: Summary, loads: Mapping[str, str]) -> None:
    panel.set_title("Throughput")
    panel.set_ylabel("texts/s")
    panel.set_xlabel("connections with single texts; lists")
    _bars(panel, summary, loads, "texts_per_second")
    _raw_lines(panel, summary, "texts_per_second")


def _raw_lines(panel: Axes, summary: Summary, figure: str) -> None:
    for mode in dict.fromkeys(FIXED[mode] for mode in summary.modes):
        if raw := summary.spread("raw", mode, figure):
            label = f"raw runtime, {mode}: {number(raw.median)}"
            panel.axhspan(raw.low, raw.high, color=COLOURS[mode], alpha=0.12, linewidth=0)
            panel.axhline(raw.median, color=COLOURS[mode], linestyle="--", linewidth=1.3)
            box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
            panel.text(-0.45, raw.median, label, color=COLOURS[mode], fontsize=8, va="bottom", bbox=box)


def _latency(panel: Axes, summary: Summary) -> None:
    panel.set_title("Latency of single texts: p50 to p99")
    panel.set_ylabel("ms")
    panel.set_xlabel("connections")
    panel.set_yscale("log")
    counts = sorted({cell.connections for cell in summary.cells if cell.kind == "single"})
    for side, mode in enumerate(summary.modes):
        shift = (side - (len(summary.modes) - 1) / 2) * 0.2
        for place, count in enumerate(counts):
            low, high = (summary.spread(f"single-{count}", mode, name) for name in ("p50_ms", "p99_ms"))
            if low and high:
                panel.plot([place + shift] * 2, [low.median, high.median], color=COLOURS[mode], linewidth=3, alpha=0.5)
                panel.plot(place + shift, low.median, "o", color=COLOURS[mode])
                panel.plot(place + shift, high.median, "_", color=COLOURS[mode], markersize=9, markeredgewidth=2)
        if bare := summary.spread("bare", mode, "p50_ms"):
            panel.axhline(bare.median, color=COLOURS[mode], linestyle=":", linewidth=1.2)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xticks(range(len(counts)), [str(count) for count in counts])
    panel.text(0.98, 0.02, "dotted: the bare call", transform=panel.transAxes, ha="right", fontsize=8)


def _cpu(panel: Axes, summary: Summary, loads: Mapping[str, str]) -> None:
    panel.set_title("CPU time of the service for a text")
    panel.set_ylabel("ms")
    panel.set_xlabel("connections with single texts; lists")
    _bars(panel, summary, loads, "cpu_ms_per_text")
    _raw_lines(panel, summary, "cpu_ms_per_text")
