"""What a run found out, as JSON and as Markdown: tables, and notes on what to beware of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from loadtest import machine
from loadtest.bench.cells import Cell
from loadtest.bench.options import BenchOptions
from loadtest.bench.overload import Overload
from loadtest.bench.run import Results
from loadtest.bench.summary import Comparison, Summary, against_raw, between_modes
from loadtest.steps import GENERATOR_CORES
from loadtest.tables import grid, number, shown

_OF_ONE_MACHINE = ("service_python", "output_dir", "models_dir")
_HEAD = (
    "", "texts/s", "of raw", "p50, ms", "p95, ms", "p99, ms", "CPU ms a text", "load generator, a request",
    "slowest probe, ms",
)  # fmt: skip


def write(results: Results, options: BenchOptions, about: Mapping[str, str]) -> list[Path]:
    """Writes bench.json and bench.md into the output directory; their paths. `about` the machine."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    contents = {
        "bench.json": as_json(results, options, about),
        "bench.md": as_markdown(results, options, about),
    }
    for name, content in contents.items():
        (options.output_dir / name).write_text(content, encoding="utf-8")
    return [options.output_dir / name for name in contents]


def as_json(results: Results, options: BenchOptions, about: Mapping[str, str]) -> str:
    """Everything: conditions, each cell of each round, and the comparisons."""
    summary = Summary(results.measured)
    content = {
        "command": command(options),
        "machine": about,
        "models": results.models,
        "texts": results.texts,
        "processes_of_the_raw_runtime": options.raw_processes,
        "against_raw": _comparison_json(against_raw(summary)),
        "between_modes": _comparison_json(between_modes(summary)),
        "accuracy": [asdict(one) for one in results.accuracies],
        "memory": {name: asdict(one) for name, one in results.footprints.items()},
        "overload": _overload_json(results.overload),
        "notes": notes(results),
        "cells": [
            asdict(one.cell) | {"round": one.round, "figures": one.figures, "failures": one.failures}
            for one in results.measured
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def as_markdown(results: Results, options: BenchOptions, about: Mapping[str, str]) -> str:
    summary = Summary(results.measured)
    models = "; ".join(f"{name}: {model}" for name, model in results.models.items())
    parts = [
        "# Benchmark: the service and the raw runtime",
        f"Rounds: {options.rounds}, {options.seconds:g} s for each cell, in another order each. {results.texts}. "
        f"{models}. {machine.in_words(about)}.",
        f"Raw: ONNX Runtime alone, {options.raw_processes} processes with one thread each, batches of "
        f"{options.list_size} sorted by length, fixed depth, tokenizing left out. Bare: one text in one process. Load "
        "generator beside the service on the same cores; each connection sends its next request on the last answer, "
        "and every answer is checked against the raw runtime's. Probes: /healthz and /readyz in turn every 0.1 s, "
        "/metrics every 2 s, each on a new connection; an idle server beside is asked in the same moments, since what "
        "it takes is the machine's own time.",
        *(
            f"## {mode}\n\n{table(summary, [cell for cell in summary.cells if cell.mode == mode])}"
            for mode in summary.modes
        ),
        "## Against the raw runtime of the same round",
        comparison_table(against_raw(summary)),
        "## Texts/s of one mode over another's",
        comparison_table(between_modes(summary)),
        "## Accuracy and iterations",
        accuracy_table(results),
        "## Memory, MB",
        memory_table(results),
        *(["## Overload", overload_table(results.overload)] if results.overload else []),
        "\n".join(f"- {note}" for note in notes(results)),
        "Medians over the rounds, in brackets the lowest and the highest. MB are 10^6 bytes; RSS counts pages that "
        "processes share once for each of them; PSS divides them among all, those of the other service and of the load "
        "generator included. Peak: in all of a service's cells, of the first mode's overload included.",
        "![throughput, latency, CPU time](bench.png)",
        f"Made by `{command(options)}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def command(options: BenchOptions) -> str:
    """The command that repeats this run, without the paths of one machine."""
    words = ["python -m loadtest.bench"]
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name not in _OF_ONE_MACHINE:
            several = value if isinstance(value, tuple) else (value,)
            told = " ".join("..." if isinstance(one, Path) else str(one) for one in several)
            words.append(f"--{field.name.replace('_', '-')}" + (f" {told}" if value is not True else ""))
    return " ".join(words)


def table(summary: Summary, cells: Sequence[Cell]) -> str:
    """Cells of one mode, one a line."""
    lines = [list(_HEAD)]
    for cell in sorted(cells, key=_place):
        figures = [summary.spread(cell.name, cell.mode, name) for name in ("p50_ms", "p95_ms", "p99_ms")]
        names = ("cpu_ms_per_text", "generator_cpu_ms_per_request", "slowest_probe_ms")
        costs = [summary.spread(cell.name, cell.mode, name) for name in names]
        rate = summary.spread(cell.name, cell.mode, "texts_per_second")
        share = summary.of_raw(cell.name, cell.mode) if cell.kind in ("lists", "single") else None
        lines.append([title(cell), *map(shown, [rate, share, *figures, *costs])])
    return grid(lines)


def _place(cell: Cell) -> tuple[int, int]:
    return ("raw", "bare", "single", "lists", "mixed").index(cell.kind), cell.connections


def title(cell: Cell) -> str:
    """A cell in words."""
    return {
        "raw": "raw, batches",
        "bare": "bare call",
        "lists": f"lists, {cell.connections} connections",
        "single": f"single, {cell.connections} connection{'s' * (cell.connections > 1)}",
        "mixed": f"short and long, {cell.connections} connections",
    }[cell.kind]


def comparison_table(comparison: Comparison) -> str:
    """A line for each thing compared; empty where nothing is."""
    columns = list(dict.fromkeys(column for row in comparison.values() for column in row))
    lines = [[title, *(shown(row.get(column)) for column in columns)] for title, row in comparison.items()]
    return grid([["", *columns], *lines]) if lines else ""


def accuracy_table(results: Results) -> str:
    lines = [["", "texts", "exit threshold", "mean iterations", "accuracy"]]
    for one in results.accuracies:
        threshold = "none" if one.exit_threshold == 1 else f"{one.exit_threshold:g}"
        accuracy = "-" if one.accuracy is None else f"{one.accuracy:.4f}"
        lines.append([one.mode, one.texts, threshold, f"{one.mean_iterations:.3f}", accuracy])
    return grid(lines)


def memory_table(results: Results) -> str:
    lines = [["", "processes", "idle, PSS", "idle, RSS", "peak, PSS", "peak, RSS", "model"]]
    for name, one in results.footprints.items():
        sizes = [one.idle.pss, one.idle.rss, one.peak.pss, one.peak.rss, one.model]
        figures = ["-" if size is None else number(size / 1e6) for size in sizes]
        lines.append([name, str(one.processes), *figures])
    models = [one.model for one in results.footprints.values()]
    if len(models) == 2 and models[0] and models[1]:
        lines.append(["ratio", "", "", "", "", "", number(models[0] / models[1])])
    return grid(lines)


def overload_table(one: Overload) -> str:
    answered = one.figures
    rows = {
        "mode": one.mode,
        "arrivals/s, for so many seconds": f"{number(one.arrivals_per_second)}, {one.seconds:.0f}",
        "capacity before and after, requests/s": f"{number(one.capacity_before)}, {number(one.capacity_after)}",
        "goodput, requests/s": number(one.goodput),
        "goodput / capacity": number(one.of_capacity),
        "turned away with 429": f"{one.turned_away / one.sent:.1%}" if one.sent else "-",
        "answered once the time was over": str(one.late),
        "ended in any other way, lost": f"{sum(one.unexpected.values())}, {one.lost}",
        "p50 and p99 of answers, from when they were due, ms": _both(answered, "p50_ms", "p99_ms"),
        "memory, late / early, PSS": f"{one.memory_growth:.3f}",
        "slowest probe of the service, of an idle server, ms": _both(answered, "slowest_probe_ms", "slowest_idle_ms"),
    }
    return grid([["", ""], *([name, value] for name, value in rows.items())])


def _both(figures: Mapping[str, float], *names: str) -> str:
    return " and ".join(number(figures[name]) for name in names if name in figures) or "-"


def notes(results: Results) -> list[str]:
    """What a reader has to know before believing the tables: failures first."""
    said = list(results.faults)
    for one in results.measured:
        where = f"{one.cell.mode}, {title(one.cell)}, round {one.round}"
        said += [f"{where}: {count} requests failed: {reason}" for reason, count in one.failures.items()]
    if results.overload:
        said += [f"overload: {count} requests: {reason}" for reason, count in results.overload.unexpected.items()]
        said += [f"overload: {count} probes: {reason}" for reason, count in results.overload.probe_failures.items()]
        beside = results.overload.failures_beside
        said += [f"capacity before and after overload: {count} failed: {reason}" for reason, count in beside.items()]
    if busy := "; ".join(_generator_limited(results)):
        said.append(
            f"The load generator was the limit, not the service ({busy}): it used over {GENERATOR_CORES:.0%} of the "
            "one core it can use."
        )
    return said


def _generator_limited(results: Results) -> list[str]:
    cells = [(f"{one.cell.mode}, {title(one.cell)}, round {one.round}", one.figures) for one in results.measured]
    overload = [("overload", results.overload.figures)] if results.overload else []
    return [name for name, figures in cells + overload if figures.get("generator_cores", 0.0) >= GENERATOR_CORES]


def _comparison_json(comparison: Comparison) -> dict[str, dict[str, dict[str, float]]]:
    return {title: {column: asdict(spread) for column, spread in row.items()} for title, row in comparison.items()}


def _overload_json(one: Overload | None) -> dict[str, object] | None:
    if not one:
        return None
    derived = {
        "goodput": one.goodput,
        "of_capacity": one.of_capacity,
        "memory_growth": one.memory_growth,
        "lost": one.lost,
    }
    return asdict(one) | derived
