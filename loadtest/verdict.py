"""Which architecture for which load, in plain words, from the figures alone."""

from dataclasses import dataclass
from typing import Literal

from loadtest.options import ARCHITECTURES, Architecture, Options
from loadtest.summary import MEMORY, Summary, find
from loadtest.tables import Spread, number

CLEAR = 1.05
"""Medians nearer than this are not told apart, whatever their spread."""


@dataclass(frozen=True)
class Question:
    """One figure of one load that speaks for one of the two, and the words for it."""

    load: str
    figure: str
    better: Literal["higher", "lower"]
    words: str
    unit: str
    scale: float = 1.0


def questions(options: Options) -> list[Question]:
    """What decides, most important first."""
    asked = []
    for load in options.loads():
        if load.shape == "step":
            what = f"{load.title.split(',')[0]} with p99 under {options.service_level_ms:g} ms"
            asked.append(Question(load.name, "level_texts_per_second", "higher", what, "texts/s"))
            continue
        if load.arrivals == "users":
            asked.append(Question(load.name, "texts_per_second", "higher", f"throughput, {load.title}", "texts/s"))
        asked += [
            Question(load.name, "p99_ms", "lower", f"p99, {load.title}", "ms"),
            Question(
                load.name, "cpu_seconds_per_million_texts", "lower", f"CPU time, {load.title}", "s a million texts"
            ),
        ]
    return [
        *sorted(asked, key=lambda one: one.load != "step"),
        Question(MEMORY, "peak_memory_bytes", "lower", "process memory", "MB", 1e6),
        Question(MEMORY, "model_memory_bytes", "lower", "model memory", "MB", 1e6),
    ]


def better(recurrent: Spread, baseline: Spread, wanted: Literal["higher", "lower"]) -> Architecture | None:
    """The clearly better one: its worst round beats the other's best, and the medians differ by enough; else None."""
    low, high = sorted((recurrent, baseline), key=lambda spread: spread.median)
    if low.high >= high.low or high.median < CLEAR * low.median:
        return None
    winner = high if wanted == "higher" else low
    return ARCHITECTURES[0] if winner is recurrent else ARCHITECTURES[1]


Verdict = dict[str, list[str]]
"""What is said, and the points that it rests on."""


def verdict(summary: Summary, options: Options) -> Verdict:
    """Whom to take for what, what is open, and what both together take; empty when there is nothing to compare."""
    found: dict[Architecture | None, list[str]] = {}
    for question in questions(options):
        recurrent, baseline = (find(summary, question.load, name, question.figure) for name in ARCHITECTURES)
        if recurrent and baseline:
            winner = better(recurrent, baseline, question.better)
            found.setdefault(winner, []).append(_said(question, recurrent, baseline))
    heads: list[tuple[Architecture | None, str]] = [(name, f"Take {name} for") for name in ARCHITECTURES]
    said = {head: found[name] for name, head in [*heads, (None, "No clear difference in")] if name in found}
    if len(found) == 1 and None not in found and len(said) == 1:
        (winner, points), *_ = found.items()
        said = {f"Take {winner} for every load measured": points}
    return said | _missed(summary, options) | _together(summary, options)


def _said(question: Question, recurrent: Spread, baseline: Spread) -> str:
    one, other = (number(spread.median / question.scale) for spread in (recurrent, baseline))
    return f"{question.words}: recurrent {one} {question.unit}, baseline {other}"


def _missed(summary: Summary, options: Options) -> Verdict:
    """Those that kept the service level at no rate, in a search that was made."""
    steps = [load.name for load in options.loads() if load.shape == "step"]
    found = [(name, find(summary, load, name, "level_texts_per_second")) for load in steps for name in ARCHITECTURES]
    missed = [name for name, rate in found if rate and not rate.high]
    level = f"p99 under {options.service_level_ms:g} ms"
    return {f"{name} kept {level} at no rate that was tried": [] for name in missed}


def _together(summary: Summary, options: Options) -> Verdict:
    """What it takes to have both in one process."""
    alone = [find(summary, MEMORY, name, "peak_memory_bytes") for name in ARCHITECTURES]
    both = find(summary, MEMORY, "both", "peak_memory_bytes")
    if options.host or not (alone[0] and alone[1] and both):
        return {}
    sizes = [number(spread.median / 1e6) for spread in (both, alone[0], alone[1])]
    points = [f"process memory: {sizes[0]} MB; recurrent alone {sizes[1]}, baseline alone {sizes[2]}"]
    if rate := find(summary, "step", "both", "level_texts_per_second"):
        points.append(f"asked half and half they keep the service level up to {number(rate.median)} texts/s")
    return {"Both in one process": points}
