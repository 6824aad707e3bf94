"""The report: verdict, tables, notes on what to beware of; as Markdown, as HTML with its figure inside, as JSON."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from loadtest import machine
from loadtest.figures import CURVE
from loadtest.options import ARCHITECTURES, Load, Options
from loadtest.rounds import Measured, Round
from loadtest.steps import GENERATOR_CORES, PRECISION, TRIES, limiting
from loadtest.summary import MEMORY, Summary, as_json, find, part_of_both, summarise
from loadtest.tables import Spread, grid, number, shown
from loadtest.verdict import Verdict, verdict

TITLE = "Load test: recurrent and baseline"
FIGURE = "loadtest.png"
OTHER_CORES = 0.1
"""Busy with other work on this machine from which on the figures are not the service's own."""
_PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Row:
    """One line of a table: which figure, under which name, divided by what."""

    figure: str
    title: str
    unit: float = 1.0


RATES = (Row("requests_per_second", "requests/s"), Row("texts_per_second", "texts/s"))
LATENCIES = tuple(Row(f"p{percent}_ms", f"p{percent}, ms") for percent in ("50", "90", "95", "99", "99.9"))
STEP_ROWS = (
    Row("level_texts_per_second", "texts/s within the service level"),
    Row("level_p50_ms", "p50 there, ms"),
)
OTHERS = Row("other_cores", "busy cores, everything else")
COSTS = (
    Row("cpu_seconds_per_million_texts", "CPU seconds per million texts"),
    Row("cost_per_million_texts", "cost of a million texts"),
    Row("mean_iterations", "iterations of a text"),
    Row("service_cores", "busy cores, service"),
    Row("generator_cores", "busy cores, load generator"),
    OTHERS,
)
LATE = Row("late_p99_ms", "sent late by (p99), ms")
MEMORY_ROWS = (
    Row("idle_memory_bytes", "process memory idle, MB", 1e6),
    Row("peak_memory_bytes", "process memory peak, MB", 1e6),
    Row("model_memory_bytes", "model memory, MB", 1e6),
    Row("gpu_memory_bytes", "GPU memory added, MB", 1e6),
)


def rows(load: Load) -> list[Row]:
    """The figures that a load has, in their order."""
    late = [] if load.arrivals == "users" else [LATE]
    if load.shape == "step":
        return [*STEP_ROWS, *late, OTHERS]
    return [*RATES[load.list_size == 1 :], *LATENCIES, *COSTS, *late]


def overview(summary: Summary, loads: Sequence[Load], service_level_ms: float) -> str:
    """What decides, of all loads, in one table: the one that README shows."""
    wanted: list[tuple[str, Row]] = []
    for load in sorted(loads, key=lambda load: load.shape != "step"):
        if load.shape == "step":
            what = f"{load.title.split(',')[0]} with p99 under {service_level_ms:g} ms, texts/s"
            wanted.append((load.name, Row("level_texts_per_second", what)))
            continue
        figures = [RATES[1], *(row for row in LATENCIES if row.title.startswith(("p50", "p99,"))), *COSTS[:2]]
        wanted += [(load.name, Row(row.figure, f"{load.title}: {row.title}")) for row in figures]
    return _table(summary, wanted + [(MEMORY, row) for row in MEMORY_ROWS])


def table(summary: Summary, load: str, wanted: Sequence[Row]) -> str:
    """Each architecture alone, their ratio and, where it was measured, both in one process; empty without a figure."""
    return _table(summary, [(load, row) for row in wanted])


def _table(summary: Summary, wanted: Sequence[tuple[str, Row]]) -> str:
    has_both = any("both" in summary.get(load, {}) for load, _ in wanted)
    lines = [["", *ARCHITECTURES, "ratio", *["both, half and half"] * has_both]]
    for load, row in wanted:
        spreads = [find(summary, load, subject, row.figure) for subject in (*ARCHITECTURES, "both")]
        if any(spreads):
            cells = [shown(spread, row.unit) for spread in spreads]
            lines.append([row.title, *cells[:2], ratio(spreads[0], spreads[1]), *cells[2:][: int(has_both)]])
    return grid(lines) if len(lines) > 1 else ""


def shared_table(summary: Summary, load: str) -> str:
    """Latency of each architecture's requests where both are asked in one process; empty where they were not."""
    subjects = [part_of_both(name) for name in ARCHITECTURES]
    lines = [["in one process", *ARCHITECTURES, "ratio"]]
    for row in LATENCIES:
        spreads = [find(summary, load, subject, row.figure) for subject in subjects]
        if any(spreads):
            lines.append([row.title, *(shown(spread) for spread in spreads), ratio(spreads[0], spreads[1])])
    return grid(lines) if len(lines) > 1 else ""


def ratio(recurrent: Spread | None, baseline: Spread | None) -> str:
    """Recurrent over baseline, of the medians; a dash where one is not known, or nothing can be divided by."""
    known = recurrent and baseline and baseline.median
    return f"{recurrent.median / baseline.median:.2f}" if known and recurrent and baseline else "-"


def notes(rounds: Sequence[Round], options: Options) -> list[str]:
    """What a reader of the tables has to know before believing them: failures first."""
    said = []
    for one in rounds:
        for measured in one.measured:
            said += [f"{_where(measured)}: {n} requests failed: {reason}" for reason, n in measured.failures.items()]
        said += [f"{one.subject}, round {one.number}: {one.stop_fault}"] if one.stop_fault else []
    said += [_limit(measured, options) for one in rounds for measured in one.measured if measured.generator_limited]
    if busy := [one for each in rounds for one in each.measured if one.figures.get("other_cores", 0.0) > OTHER_CORES]:
        where = "; ".join(f"{_where(one)}: {number(one.figures['other_cores'])}" for one in busy)
        said.append(
            "The machine had other work: cores that were busy with neither the service nor the load generator "
            f"({where}). On a quiet machine the figures of these would be better."
        )
    if options.rounds == 1:
        said.append("One round: how far the figures vary from one to the next is not known.")
    if any("cpu_seconds_per_million_texts" not in measured.figures for one in rounds for measured in one.measured):
        said.append(
            "CPU time and cost are left out where /metrics could not be read, or did not count this load test's "
            "requests and no others: there are other callers, or several replicas of which one answers."
        )
    if options.host:
        said.append("One running service was asked for everything: its process memory belongs to all that it holds.")
    return said


def _where(measured: Measured) -> str:
    return f"{measured.subject}, round {measured.round}, {measured.load}"


def _limit(measured: Measured, options: Options) -> str:
    where = _where(measured)
    step = limiting(measured.steps, options.service_level_ms) if measured.steps else None
    if step and step.holds(options.service_level_ms):
        return f"{where}: the service level held up to the highest rate tried, {number(step.rate)} requests/s"
    late = (step.late_p99_ms if step else measured.figures.get("late_p99_ms")) or 0.0
    cores = step.generator_cores if step else measured.figures["generator_cores"]
    at = f" at {number(step.rate)} requests/s" if step else ""
    return (
        f"The load generator was the limit, not the service ({where}{at}): it used {cores:.0%} of the one core it can "
        f"use (limit {GENERATOR_CORES:.0%}) and sent requests {number(late)} ms late (p99). The service can do "
        "at least what is shown, perhaps more: drive it from another machine."
    )


def conditions(options: Options, about: Mapping[str, str]) -> str:
    """The load and the machine in a few sentences."""
    lengths = "film-review sentences, a tenth reviews of 100 to 300 words"
    composed = f"texts as long as {lengths if options.lengths == 'mixed' else 'film-review sentences'}"
    sent = f"texts of {options.texts.name}" if options.texts else composed
    own = "One running service" if options.host else "Services on the load generator's machine, warm"
    left = "each model's own" if options.exit_threshold is None else f"{options.exit_threshold:g}"
    rounds = "1 round" if options.rounds == 1 else f"{options.rounds} rounds, alternating"
    here = f"Load generator on {machine.short()}" if options.host else machine.in_words(about)
    return f"Task {options.task}; {sent}; exit threshold: {left}. {own}; {rounds}. {here}."


def legend(options: Options) -> str:
    return (
        "Medians over the rounds, in brackets the lowest and the highest; the ratio is recurrent over baseline. "
        "Percentiles are taken from every answered request, where there are enough for them; those of arrivals run "
        "from when a request was due. Within the service level: the highest rate of arrivals with p99 under "
        f"{options.service_level_ms:g} ms and every request answered, in one of {TRIES} tries and to within "
        f"{PRECISION - 1:.0%}; 0 where no rate tried had that. Cost: CPU time at "
        f"{options.cost_per_core_hour:g} US dollars for a core and hour, an assumption; idle cores are not counted. "
        "Process memory is RSS, which counts pages that the service's processes share once for each of them; model "
        "memory the bytes of the graphs' files, in all of them. MB are millions of bytes."
    )


def as_markdown(rounds: Sequence[Round], options: Options, about: Mapping[str, str]) -> str:
    summary = summarise(rounds)
    beware = _bullets(notes(rounds, options))
    parts = [f"# {TITLE}", as_lines(verdict(summary, options)), beware and f"Before believing it:\n\n{beware}"]
    parts.append(conditions(options, about))
    parts += [_bullets(_models(rounds)), overview(summary, options.loads(), options.service_level_ms)]
    parts.append(f"![{TITLE}]({FIGURE})")
    for load in options.loads():
        title = load.title[0].upper() + load.title[1:]
        parts += [f"## {title}", table(summary, load.name, rows(load)), shared_table(summary, load.name)]
    parts += [legend(options), f"Made by `{options.command()}`"]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_html(markdown: str, figure: bytes) -> str:
    """The same report as one page that needs nothing else: its figure is inside."""
    inside = f"data:image/png;base64,{base64.b64encode(figure).decode()}"
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.validateLink = lambda url: not url.startswith("javascript:")  # type: ignore[method-assign]  # its own refuses long data
    body = parser.render(markdown.replace(f"]({FIGURE})", f"]({inside})"))
    page = _PAGE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(TITLE)).replace("{{body}}", body)


def as_content(rounds: Sequence[Round], options: Options, about: Mapping[str, str]) -> str:
    """Everything as JSON: the load, the machine, the verdict, the figures over the rounds, and each round."""
    summary = summarise(rounds)
    content = {
        "command": options.command(),
        "machine": about,
        "service_level_ms": options.service_level_ms,
        "loads": [asdict(load) for load in options.loads()],
        "verdict": verdict(summary, options),
        "notes": notes(rounds, options),
        "curve_percents": CURVE,
        "summary": as_json(summary),
        "rounds": [asdict(one) for one in rounds],
    }
    return json.dumps(content, indent=1) + "\n"


def write(rounds: Sequence[Round], options: Options, about: Mapping[str, str], figure: bytes) -> list[Path]:
    """Writes loadtest.json, .md, .html and .png into the output directory; their paths. `about` the machine."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(rounds, options, about)
    contents = {
        "loadtest.md": markdown.encode(),
        "loadtest.html": as_html(markdown, figure).encode(),
        "loadtest.json": as_content(rounds, options, about).encode(),
        FIGURE: figure,
    }
    for name, content in contents.items():
        (options.output_dir / name).write_bytes(content)
    return [options.output_dir / name for name in contents]


def as_lines(said: Verdict) -> str:
    """The verdict as a list: what is said of whom, and what it rests on below."""
    return "\n".join(
        line for head, points in said.items() for line in (f"- **{head}**", *(f"  - {point}" for point in points))
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _models(rounds: Sequence[Round]) -> list[str]:
    """Version, precision and provider, as the service named them."""
    found = {}
    for labels in (labels for one in rounds for labels in one.models):
        named = ", ".join(f"{name} {labels[name]}" for name in ("version", "precision", "provider") if name in labels)
        found[labels["architecture"]] = f"{labels['architecture']}: {named}"
    return list(found.values())
