"""What both reports show alike: medians with their spread, numbers without noise, tables, the machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


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


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these lines, the first one its head, whose columns also line up in a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)
