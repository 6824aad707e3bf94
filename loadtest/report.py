"""From rounds to what is read: medians with their spread, notes on what to beware of, a table, JSON and Markdown."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from loadtest.options import ARCHITECTURES, Options
from loadtest.rounds import Round

GENERATOR_LIMIT = 0.9
"""Busy cores of the load generator's one thread from which on it, not the service, sets the pace."""


@dataclass(frozen=True)
class Row:
    """One line of the table: which figure, under which name, divided by what."""

    figure: str
    title: str
    unit: float = 1.0


ROWS = (
    Row("requests_per_second", "requests/s"),
    Row("texts_per_second", "texts/s"),
    Row("p50_ms", "p50, ms"),
    Row("p95_ms", "p95, ms"),
    Row("p99_ms", "p99, ms"),
    Row("idle_memory_bytes", "process memory idle, MB", 1e6),
    Row("peak_memory_bytes", "process memory peak, MB", 1e6),
    Row("model_memory_bytes", "model memory, MB", 1e6),
    Row("cpu_seconds_per_1000_texts", "CPU seconds per 1,000 texts"),
    Row("service_cores", "busy cores, service"),
    Row("generator_cores", "busy cores, load generator"),
)


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


Summary = dict[str, dict[str, Spread]]
"""Figure -> architecture -> spread; an architecture without the figure is left out."""


def summarise(rounds: Sequence[Round]) -> Summary:
    summary: Summary = {}
    for row in ROWS:
        for architecture in ARCHITECTURES:
            own = (one.figures for one in rounds if one.architecture == architecture)
            values = [figures[row.figure] for figures in own if row.figure in figures]
            if values:
                summary.setdefault(row.figure, {})[architecture] = Spread.of(values)
    return summary


def ratio(spreads: dict[str, Spread]) -> float | None:
    """Recurrent over baseline, of the medians; None where one of them is not known, or nothing can be divided by."""
    recurrent, baseline = (spreads.get(architecture) for architecture in ARCHITECTURES)
    return recurrent.median / baseline.median if recurrent and baseline and baseline.median else None


def table(rounds: Sequence[Round]) -> str:
    """The comparison as a Markdown table."""
    lines = [["", *ARCHITECTURES, "ratio"]]
    summary = summarise(rounds)
    for row in ROWS:
        if spreads := summary.get(row.figure):
            share = ratio(spreads)
            cells = [shown(spreads.get(architecture), row.unit) for architecture in ARCHITECTURES]
            lines.append([row.title, *cells, "-" if share is None else f"{share:.2f}"])
    lines.append(["failed requests", *(str(_failed(rounds, name)) for name in ARCHITECTURES), ""])
    return grid(lines)


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these lines, the first one its head, whose columns also line up in a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)


def notes(rounds: Sequence[Round], options: Options) -> list[str]:
    """What a reader of the table has to know before believing it: failures first."""
    said = []
    for one in rounds:
        where = f"{one.architecture}, round {one.number}"
        said += [f"{where}: {count} requests failed: {reason}" for reason, count in one.failures.items()]
        said += [f"{where}: {one.stop_fault}"] if one.stop_fault else []
    slow = [one for one in rounds if one.figures["generator_cores"] >= GENERATOR_LIMIT]
    if slow:
        named = "; ".join(f"{one.architecture}, round {one.number}" for one in slow)
        said.append(
            f"The load generator was the limit, not the service ({named}): it used over {GENERATOR_LIMIT:.0%} of the "
            "one core it can use. Throughput and latency there say little; use longer lists or fewer users."
        )
    if options.host:
        said.append("One running service was asked for both architectures: its process memory belongs to both.")
    return said


def as_json(rounds: Sequence[Round], options: Options) -> str:
    """Everything: the load, the machine, each round, and the summary of them."""
    summary = {
        figure: {name: asdict(spread) for name, spread in spreads.items()} | {"ratio": ratio(spreads)}
        for figure, spreads in summarise(rounds).items()
    }
    content = {
        "command": options.command(),
        "machine": machine(),
        "rounds": [asdict(one) for one in rounds],
        "summary": summary,
        "notes": notes(rounds, options),
    }
    return json.dumps(content, indent=1) + "\n"


def as_markdown(rounds: Sequence[Round], options: Options) -> str:
    parts = [
        "# Load test: recurrent and baseline",
        conditions(options),
        "\n".join(f"- {name}: {_model(rounds, name)}" for name in ARCHITECTURES if _model(rounds, name)),
        table(rounds),
        "\n".join(f"- {note}" for note in notes(rounds, options)),
        "Medians over the rounds, in brackets the lowest and the highest; the ratio is recurrent over baseline. "
        "Percentiles are taken from every answered request. MB are 10^6 bytes.",
        "![throughput, latency and memory](loadtest.png)",
        f"Made by `{options.command()}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(options: Options) -> str:
    """The load and the machine in one sentence each."""
    lengths = "film-review sentences, a tenth reviews of 100 to 300 words" if options.mixed else "film-review sentences"
    sent = f"texts of {options.texts.name}" if options.texts else f"texts as long as {lengths}"
    own = "One running service" if options.host else "One service with one architecture at a time, beside the generator"
    return (
        f"{options.rounds} rounds of {options.duration} s for each, alternating; {options.load()}; {sent}. "
        f"{own}. {machine()}."
    )


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def write(rounds: Sequence[Round], options: Options) -> list[Path]:
    """Writes loadtest.json and loadtest.md into the output directory; their paths."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    contents = {"loadtest.json": as_json(rounds, options), "loadtest.md": as_markdown(rounds, options)}
    for name, content in contents.items():
        (options.output_dir / name).write_text(content, encoding="utf-8")
    return [options.output_dir / name for name in contents]


def _failed(rounds: Sequence[Round], architecture: str) -> int:
    return sum(sum(one.failures.values()) for one in rounds if one.architecture == architecture)


def _model(rounds: Sequence[Round], architecture: str) -> str:
    """Version, precision and provider, as the service named them."""
    labels = next((one.model for one in rounds if one.architecture == architecture), {})
    return ", ".join(f"{name} {labels[name]}" for name in ("version", "precision", "provider") if name in labels)


def shown(spread: Spread | None, unit: float = 1.0) -> str:
    """The median and, where they differ, the lowest and the highest, in this unit; a dash where there is nothing."""
    if spread is None:
        return "-"
    middle, low, high = (number(value / unit) for value in (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def number(value: float) -> str:
    """Three figures or more, none of them noise: 1,234, 98.7, 5.43, 0.021."""
    size = abs(value)
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{places}f}"
