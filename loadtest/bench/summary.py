"""From measured cells to what is read: medians over the rounds, and ratios of cells of the same round."""

from collections.abc import Callable, Sequence
from operator import sub, truediv

from loadtest.bench.cells import Cell, Measured
from loadtest.bench.options import FIXED, ModeName
from loadtest.tables import Spread

_PAIRS: tuple[tuple[ModeName, ModeName], ...] = (
    ("early-exit", "recurrent"),
    ("recurrent", "baseline"),
    ("early-exit", "baseline"),
)


Comparison = dict[str, dict[str, Spread]]
"""What is compared -> in which mode, or of which two -> ratio or difference; what was not measured is left out."""


class Summary:
    """All rounds of a run."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        self._figures = {(one.cell.name, one.cell.mode, one.round): one.figures for one in measured}
        self.cells: list[Cell] = list(dict.fromkeys(one.cell for one in measured))
        self.modes: list[ModeName] = list(dict.fromkeys(cell.mode for cell in self.cells))
        self.rounds = sorted({one.round for one in measured})

    def spread(self, name: str, mode: ModeName, figure: str) -> Spread | None:
        """A figure over the rounds; None where no round has it."""
        found = [self._figures.get((name, mode, number), {}).get(figure) for number in self.rounds]
        values = [value for value in found if value is not None]
        return Spread.of(values) if values else None

    def against(
        self,
        one: tuple[str, ModeName, str],
        other: tuple[str, ModeName, str],
        how: Callable[[float, float], float] = truediv,
    ) -> Spread | None:
        """(cell, mode, figure) set against another of the same round, then over the rounds; None without a pair."""
        values = []
        for number in self.rounds:
            pair = [self._figures.get((name, mode, number), {}).get(figure) for name, mode, figure in (one, other)]
            if pair[0] is not None and pair[1]:
                values.append(how(pair[0], pair[1]))
        return Spread.of(values) if values else None

    def of_raw(self, name: str, mode: ModeName) -> Spread | None:
        """Texts a second as a share of the raw runtime's at fixed depth."""
        figure = "texts_per_second"
        return self.against((name, mode, figure), ("raw", FIXED[mode], figure))

    def loads(self) -> dict[str, str]:
        """The cells that are measured in every mode, in words: by their connections, then lists."""
        counts = sorted({cell.connections for cell in self.cells if cell.kind == "single"})
        lists = {"lists": "lists"} if any(cell.kind == "lists" for cell in self.cells) else {}
        return {f"single-{count}": f"single, {count}" for count in counts} | lists


def against_raw(summary: Summary) -> Comparison:
    """How near each mode's service comes to the raw runtime, and how it does with mixed lengths."""
    mixed = next((cell.connections for cell in summary.cells if cell.kind == "mixed"), 0)
    alone = f"single-{mixed // 2}"
    found: dict[str, dict[str, Spread | None]] = {}
    for mode in summary.modes:
        for name, words in summary.loads().items():
            found.setdefault(f"texts/s, of raw: {words}", {})[mode] = summary.of_raw(name, mode)
        for name, words in summary.loads().items():
            pair = (name, mode, "cpu_ms_per_text"), ("raw", FIXED[mode], "cpu_ms_per_text")
            found.setdefault(f"CPU time of a text, of raw: {words}", {})[mode] = summary.against(*pair)
        pair = ("single-1", mode, "p50_ms"), ("bare", mode, "p50_ms")
        found.setdefault("p50 of single, 1, above the bare call, ms", {})[mode] = summary.against(*pair, sub)
        pair = ("mixed", mode, "short_p99_ms"), (alone, mode, "p99_ms")
        found.setdefault("p99 of short texts: beside long ones / alone", {})[mode] = summary.against(*pair)
        padding = summary.spread("mixed", mode, "padding_share")
        found.setdefault("padding among short and long texts", {})[mode] = padding
    return _measured(found)


def between_modes(summary: Summary) -> Comparison:
    """Texts a second of one mode over another's."""
    found: dict[str, dict[str, Spread | None]] = {}
    for name, words in {"raw": "raw", **summary.loads()}.items():
        for one, other in _PAIRS:
            pair = (name, one, "texts_per_second"), (name, other, "texts_per_second")
            found.setdefault(words, {})[f"{one} / {other}"] = summary.against(*pair)
    return _measured(found)


def _measured(found: dict[str, dict[str, Spread | None]]) -> Comparison:
    rows = {row: {name: spread for name, spread in one.items() if spread} for row, one in found.items()}
    return {row: one for row, one in rows.items() if one}
