"""The report, from rounds made up here."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest import figure, machine, report
from loadtest.options import Options
from loadtest.rounds import Measured, Round, Subject
from loadtest.steps import Step
from loadtest.summary import as_json, from_json, summarise
from loadtest.tables import number

MODEL = {"architecture": "recurrent", "version": "abc", "precision": "int8", "provider": "cpu"}
OPTIONS = Options(rounds=3)
ABOUT = {"machine": "2 cores", "commit": "abc123"}


def a_step(rate: float, p99: float) -> Step:
    return Step(rate, 3.0, 300, 0, 10.0, p99, 2.0, 0.3)


def a_round(subject: Subject, number: int, rate: float, **changed) -> Round:
    costs = {"cpu_seconds_per_million_texts": 1e6 / rate, "cost_per_million_texts": 0.01, "generator_cores": 0.3}
    users = {"texts_per_second": rate, "p50_ms": 1000 / rate, "p99_ms": 5000 / rate} | costs
    parts = {"recurrent": {"p50_ms": 3.0}, "baseline": {"p50_ms": 6.0}} if subject == "both" else {}
    held, broke = a_step(rate / 2, 50), a_step(rate, 300)
    measured = [
        Measured("users", subject, number, users, by_architecture=parts, curve=[1.0, 2.0, 3.0]),
        Measured("lists", subject, number, {"requests_per_second": 9.0} | users, curve=[5.0]),
        Measured("step", subject, number, {"level_texts_per_second": rate / 2} | costs, steps=[held, broke]),
    ]
    memory = {"idle_memory_bytes": 5e7, "peak_memory_bytes": 6e7, "model_memory_bytes": 4e6}
    return replace(Round(subject, number, memory, measured, [MODEL | {"architecture": subject}]), **changed)


ROUNDS = [
    a_round("recurrent", 1, 600.0),
    a_round("baseline", 1, 250.0),
    a_round("both", 1, 300.0),
    a_round("recurrent", 2, 900.0),
    a_round("baseline", 2, 200.0),
    a_round("recurrent", 3, 500.0),
    a_round("baseline", 3, 300.0),
]


def with_first(one: Round, **changed) -> Round:
    """The round with something changed in its first load."""
    return replace(one, measured=[replace(one.measured[0], **changed), *one.measured[1:]])


def row(text: str, title: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {title} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_show_medians_spread_ratio_and_both_together() -> None:
    users, _, step = OPTIONS.loads()
    table = report.table(summarise(ROUNDS), "users", report.rows(users))
    assert row(table, "texts/s") == ["texts/s", "600 (500 to 900)", "250 (200 to 300)", "2.40", "300"]
    assert len({len(line) for line in table.splitlines()}) == 1
    shared = report.shared_table(summarise(ROUNDS), "users")
    assert row(shared, "p50, ms") == ["p50, ms", "3.00", "6.00", "0.50"]
    found = report.table(summarise(ROUNDS), "step", report.rows(step))
    assert row(found, "texts/s within the service level")[1:4] == ["300 (250 to 450)", "125 (100 to 150)", "2.40"]


def test_what_was_not_measured_is_not_shown() -> None:
    users = OPTIONS.loads()[0]
    alone = [with_first(ROUNDS[0], figures={"p99_ms": 5.0}), ROUNDS[1]]
    table = report.table(summarise(alone), "users", report.rows(users))
    assert row(table, "p99, ms") == ["p99, ms", "5.00", "20.0", "0.25"]
    assert row(table, "texts/s") == ["texts/s", "-", "250", "-"]
    assert "both" not in table
    assert "p90" not in table
    assert report.shared_table(summarise(alone), "users") == ""


def test_sound_rounds_need_no_note() -> None:
    assert report.notes(ROUNDS, OPTIONS) == []


def test_the_machine_is_said_to_be_the_load_generators_where_the_service_is_elsewhere() -> None:
    assert "alternating. machine 2 cores; commit abc123." in report.conditions(OPTIONS, ABOUT)
    elsewhere = report.conditions(replace(OPTIONS, host="http://127.0.0.1:1"), ABOUT)
    assert f"Load generator on {machine.short()}." in elsewhere
    assert "abc123" not in elsewhere


def test_settings_that_the_service_finds_in_the_environment_are_told(
    no_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAIN_API_KEYS", "secret")
    monkeypatch.setenv("REFRAIN_PORT", "1")
    assert "settings" not in machine.describe()
    monkeypatch.setenv("REFRAIN_THREADS", "4")
    assert machine.describe()["settings"] == "REFRAIN_THREADS=4"


def test_one_round_is_said_to_tell_nothing_of_how_figures_vary() -> None:
    assert "how far the figures vary" in report.notes(ROUNDS[:3], replace(OPTIONS, rounds=1))[0]


def test_failures_and_a_bad_end_are_noted_first() -> None:
    bad = replace(with_first(ROUNDS[0], failures={"HTTP 429 queue_full": 7}), stop_fault="it ended with status 3")
    assert bad.failed
    assert with_first(ROUNDS[0], failures={"HTTP 429 queue_full": 7}).failed
    assert not ROUNDS[0].failed
    said = report.notes([bad, *ROUNDS[1:]], replace(OPTIONS, host="http://127.0.0.1:1"))
    assert said[:2] == [
        "recurrent, round 1, users: 7 requests failed: HTTP 429 queue_full",
        "recurrent, round 1: it ended with status 3",
    ]
    assert "process memory belongs to all that it holds" in said[2]


def test_a_generator_at_its_limit_is_told_with_where() -> None:
    busy = Step(600.0, 3.0, 300, 0, 10.0, 300.0, 250.0, 0.95)
    limited = replace(ROUNDS[0].measured[2], steps=[a_step(300, 50), busy], generator_limited=True)
    told = report.notes([replace(ROUNDS[0], measured=[*ROUNDS[0].measured[:2], limited])], OPTIONS)
    assert "The load generator was the limit, not the service (recurrent, round 1, step at 600 requests/s)" in told[0]
    assert "95% of the one core" in told[0]
    assert "250 ms late" in told[0]
    unbroken = replace(limited, steps=[a_step(300, 50)])
    (said,) = report.notes([replace(ROUNDS[0], measured=[*ROUNDS[0].measured[:2], unbroken])], OPTIONS)
    assert "held up to the highest rate tried, 300 requests/s" in said


def test_other_work_on_the_machine_and_missing_metrics_are_told() -> None:
    figures = ROUNDS[0].measured[0].figures
    busy = [with_first(ROUNDS[0], figures=figures | {"other_cores": 0.75}), *ROUNDS[1:]]
    (said,) = report.notes(busy, OPTIONS)
    assert "(recurrent, round 1, users: 0.750)" in said
    (said,) = report.notes([with_first(ROUNDS[0], figures={"p50_ms": 1.0})], OPTIONS)
    assert "CPU time and cost are left out" in said


def test_files_hold_the_load_the_rounds_and_the_summary(tmp_path: Path) -> None:
    options = replace(OPTIONS, output_dir=tmp_path / "deep" / "results", users=8, texts=Path("/somewhere/reviews.txt"))
    picture = figure.draw(ROUNDS, options)
    written = {path.suffix: path for path in report.write(ROUNDS, options, ABOUT, picture)}
    assert set(written) == {".md", ".html", ".json", ".png"}
    content = json.loads(written[".json"].read_text())
    assert content["summary"]["users"]["recurrent"]["texts_per_second"] == {"median": 600, "low": 500, "high": 900}
    assert from_json(content["summary"]) == summarise(ROUNDS)
    assert as_json(from_json(content["summary"])) == content["summary"]
    assert len(content["rounds"]) == 7
    assert "--users 8" in content["command"]
    markdown = written[".md"].read_text()
    assert report.table(summarise(ROUNDS), "users", report.rows(options.loads()[0])) in markdown
    assert "- baseline: version abc, precision int8, provider cpu" in markdown
    assert "- **Take recurrent for**" in markdown
    assert "/somewhere" not in markdown + written[".json"].read_text()
    assert written[".png"].read_bytes() == picture
    assert len(picture) > 10_000


class Page(HTMLParser):
    """What a page asks for, its cells, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_the_page_needs_nothing_but_itself() -> None:
    markdown = report.as_markdown(ROUNDS, OPTIONS, ABOUT).replace("abc", "<script>alert(1)</script>")
    picture = b"\x89PNG picture"
    text = report.as_html(markdown, picture)
    page = Page(text)
    assert page.sources == [f"data:image/png;base64,{base64.b64encode(picture).decode()}"]
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.tags.count("table") == 5
    assert page.tags.count("h2") == 3


def test_a_load_without_one_answer_is_still_reported(tmp_path: Path) -> None:
    dead = [Measured(name, "baseline", 1, {"generator_cores": 0.2}) for name in ("users", "lists", "step")]
    dead[0] = replace(dead[0], failures={"connection refused": 9})
    rounds = [ROUNDS[0], Round("baseline", 1, {}, dead, [])]
    assert "connection refused" in report.as_markdown(rounds, OPTIONS, ABOUT)
    assert figure.draw(rounds, OPTIONS).startswith(b"\x89PNG")
    assert report.as_content(rounds, OPTIONS, ABOUT)


@pytest.mark.parametrize("shape", ["spike", "step", "steady"])
def test_every_shape_has_its_picture(shape) -> None:
    options = Options(shape=shape, architectures=("recurrent",))
    course = [{"second": 0, "answered": 10, "p50_ms": 1.0, "slowest_ms": 2.0}]
    measured = Measured(shape, "recurrent", 1, {"p50_ms": 1.0}, curve=[1.0, 2.0], course=course, steps=[a_step(9, 9)])
    rounds = [Round("recurrent", 1, {}, [measured], [])]
    assert figure.draw(rounds, options).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.4, "1,234"), (98.74, "98.7"), (5.432, "5.43"), (0.0214, "0.021"), (0, "0.000")]
)
def test_numbers_keep_three_figures(value: float, shown: str) -> None:
    assert number(value) == shown
