"""Tables of figures in Markdown."""

from collections.abc import Sequence
from statistics import mean, stdev


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and standard deviation; of one value, itself; `-` where there is none."""
    if not values:
        return "-"
    middle = round(mean(values), 9) + 0.0  # no "-0.00"
    return format(middle, form) + (f" ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else "")


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)
