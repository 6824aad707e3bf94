"""The report, from rounds made up here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest import figure, report
from loadtest.options import Options
from loadtest.rounds import Round


def a_round(architecture: str, number: int, rate: float, **figures: float) -> Round:
    own = {"requests_per_second": rate, "texts_per_second": rate, "p50_ms": 1000 / rate, "generator_cores": 0.3}
    return Round(architecture, number, own | figures, {}, {"version": "abc", "precision": "int8", "provider": "cpu"})


ROUNDS = [
    a_round("recurrent", 1, 600.0, model_memory_bytes=4e6),
    a_round("baseline", 1, 250.0, model_memory_bytes=10e6),
    a_round("recurrent", 2, 900.0, model_memory_bytes=4e6),
    a_round("baseline", 2, 200.0, model_memory_bytes=10e6),
    a_round("recurrent", 3, 500.0, model_memory_bytes=4e6),
    a_round("baseline", 3, 300.0, model_memory_bytes=10e6),
]


def row(table: str, title: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_medians_spread_and_ratio() -> None:
    table = report.table(ROUNDS)
    assert row(table, "requests/s") == ["requests/s", "600 (500 to 900)", "250 (200 to 300)", "2.40"]
    assert row(table, "model memory, MB") == ["model memory, MB", "4.00", "10.0", "0.40"]
    assert row(table, "failed requests") == ["failed requests", "0", "0", ""]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_what_was_not_measured_is_not_shown() -> None:
    assert "p99" not in report.table(ROUNDS)
    table = report.table([replace(ROUNDS[0], figures={"p99_ms": 5.0, "generator_cores": 0.1}), ROUNDS[1]])
    assert row(table, "p99, ms") == ["p99, ms", "5.00", "-", "-"]
    assert row(table, "requests/s") == ["requests/s", "-", "250", "-"]


def test_sound_rounds_need_no_note() -> None:
    assert report.notes(ROUNDS, Options()) == []


def test_failures_and_a_bad_end_are_noted_first() -> None:
    bad = replace(ROUNDS[0], failures={"HTTP 429 queue_full": 7}, stop_fault="the service ended with status 3")
    assert bad.failed
    assert replace(bad, failures={}).failed
    assert replace(bad, stop_fault=None).failed
    assert not ROUNDS[0].failed
    said = report.notes([bad, *ROUNDS[1:]], Options(host="http://127.0.0.1:1"))
    assert said[:2] == [
        "recurrent, round 1: 7 requests failed: HTTP 429 queue_full",
        "recurrent, round 1: the service ended with status 3",
    ]
    assert "process memory belongs to both" in said[2]
    assert row(report.table([bad, *ROUNDS[1:]]), "failed requests")[1:3] == ["7", "0"]


@pytest.mark.parametrize(("cores", "limited"), [(0.89, False), (0.93, True)])
def test_a_generator_at_its_limit_is_told_with_its_rounds(cores: float, limited: bool) -> None:
    said = report.notes([*ROUNDS, a_round("recurrent", 4, 700.0, generator_cores=cores)], Options())
    assert [note.startswith("The load generator was the limit") for note in said] == [True] * limited
    assert all("(recurrent, round 4)" in note for note in said)


def test_files_hold_the_load_the_rounds_and_the_summary(tmp_path: Path) -> None:
    options = Options(output_dir=tmp_path / "deep" / "results", users=8, texts=Path("/somewhere/reviews.txt"))
    written = [*report.write(ROUNDS, options), figure.write(ROUNDS, options)]
    assert [path.name for path in written] == ["loadtest.json", "loadtest.md", "loadtest.png"]
    content = json.loads(written[0].read_text())
    assert content["summary"]["requests_per_second"] == {
        "recurrent": {"median": 600, "low": 500, "high": 900},
        "baseline": {"median": 250, "low": 200, "high": 300},
        "ratio": 2.4,
    }
    assert len(content["rounds"]) == 6
    assert "--users 8" in content["command"]
    markdown = written[1].read_text()
    assert report.table(ROUNDS) in markdown
    assert "- baseline: version abc, precision int8, provider cpu" in markdown
    assert "/somewhere" not in markdown + written[0].read_text()
    assert written[2].stat().st_size > 10_000


def test_a_round_without_one_answer_is_still_reported(tmp_path: Path) -> None:
    dead = Round("baseline", 1, {"generator_cores": 0.2}, {"connection refused": 9}, {})
    options = Options(output_dir=tmp_path)
    report.write([ROUNDS[0], dead], options)
    figure.write([ROUNDS[0], dead], options)
    assert "connection refused" in (tmp_path / "loadtest.md").read_text()


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.4, "1,234"), (98.74, "98.7"), (5.432, "5.43"), (0.0214, "0.021"), (0, "0.000")]
)
def test_numbers_keep_three_figures(value: float, shown: str) -> None:
    assert report.number(value) == shown
