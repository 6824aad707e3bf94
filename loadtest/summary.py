"""Every figure over the rounds, found by load, by what was in the service, and by name."""

from collections.abc import Sequence
from dataclasses import asdict

from loadtest.rounds import Round
from loadtest.tables import Spread

MEMORY = "memory"
"""In place of a load: what is measured of the service as a whole."""

Summary = dict[str, dict[str, dict[str, Spread]]]
"""Load -> subject, or "both: architecture" for its own part -> figure -> spread; what was not measured is left out."""


def summarise(rounds: Sequence[Round]) -> Summary:
    values: dict[tuple[str, str, str], list[float]] = {}
    for one in rounds:
        parts = [(MEMORY, str(one.subject), one.memory)]
        for measured in one.measured:
            parts.append((measured.load, one.subject, measured.figures))
            parts += [(measured.load, part_of_both(name), own) for name, own in measured.by_architecture.items()]
        for load, subject, figures in parts:
            for figure, value in figures.items():
                values.setdefault((load, subject, figure), []).append(value)
    summary: Summary = {}
    for (load, subject, figure), found in values.items():
        summary.setdefault(load, {}).setdefault(subject, {})[figure] = Spread.of(found)
    return summary


def part_of_both(architecture: str) -> str:
    return f"both: {architecture}"


def find(summary: Summary, load: str, subject: str, figure: str) -> Spread | None:
    return summary.get(load, {}).get(subject, {}).get(figure)


def as_json(summary: Summary) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return {
        load: {
            subject: {figure: asdict(spread) for figure, spread in figures.items()}
            for subject, figures in subjects.items()
        }
        for load, subjects in summary.items()
    }


def from_json(content: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Summary:
    """What `as_json` wrote."""
    return {
        load: {
            subject: {figure: Spread(**spread) for figure, spread in figures.items()}
            for subject, figures in subjects.items()
        }
        for load, subjects in content.items()
    }
