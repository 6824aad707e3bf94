"""The comparison as one picture: throughput, latency and memory, recurrent beside baseline, with the spread."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.options import ARCHITECTURES, Options
from loadtest.report import Summary, number, summarise
from loadtest.rounds import Round

_COLOURS = {"recurrent": "#0072b2", "baseline": "#e69f00"}  # told apart by colour-blind readers too
_BAR = 0.38

# Title, axis, unit, and figure -> label.
_PANELS = (
    ("Throughput", "texts/s", 1.0, {"texts_per_second": ""}),
    ("Latency", "ms", 1.0, {"p50_ms": "p50", "p95_ms": "p95", "p99_ms": "p99"}),
    (
        "Memory",
        "MB",
        1e6,
        {"idle_memory_bytes": "process, idle", "peak_memory_bytes": "process, peak", "model_memory_bytes": "model"},
    ),
)


def write(rounds: Sequence[Round], options: Options) -> Path:
    """Writes loadtest.png into the output directory; bars are medians, whiskers run from the lowest to the highest."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    summary = summarise(rounds)
    axes = figure.subplots(1, len(_PANELS), width_ratios=[1, 2, 2])
    for panel, (title, unit_name, unit, labels) in zip(axes, _PANELS, strict=True):
        panel.set_title(title)
        panel.set_ylabel(unit_name)
        _bars(panel, summary, labels, unit)
    figure.suptitle(f"{options.load()}; {options.rounds} rounds of {options.duration} s")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(ARCHITECTURES), frameon=False)
    path = options.output_dir / "loadtest.png"
    figure.savefig(path, dpi=120)
    return path


def _bars(panel: Axes, summary: Summary, labels: dict[str, str], unit: float) -> None:
    known = {figure: label for figure, label in labels.items() if figure in summary}
    for side, architecture in enumerate(ARCHITECTURES):
        spreads = [(place, summary[figure].get(architecture)) for place, figure in enumerate(known)]
        shown = [(place, spread) for place, spread in spreads if spread]
        heights = [spread.median / unit for _, spread in shown]
        whiskers = [
            [(spread.median - spread.low) / unit for _, spread in shown],
            [(spread.high - spread.median) / unit for _, spread in shown],
        ]
        places = [place + (side - 0.5) * _BAR for place, _ in shown]
        bars = panel.bar(
            places, heights, _BAR, yerr=whiskers, capsize=3, color=_COLOURS[architecture], label=architecture
        )
        panel.bar_label(bars, [number(height) for height in heights], fontsize=8, padding=2)
    panel.set_xticks(range(len(known)), list(known.values()))
    panel.margins(y=0.15)
    panel.spines[["top", "right"]].set_visible(False)
    if not known:
        panel.text(0.5, 0.5, "no such metrics", ha="center", va="center", transform=panel.transAxes)
