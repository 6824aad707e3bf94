"""Which cells a run has, the arithmetic over its rounds, and the files, from cells made up here."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.bench import cells, figure, overload, report
from loadtest.bench.cells import Cell, Measured, Seen, plan
from loadtest.bench.options import BenchOptions, ModeName, parse
from loadtest.bench.overload import growth, judged
from loadtest.bench.probes import Probes
from loadtest.bench.processes import Memory
from loadtest.bench.run import Accuracy, Footprint, Results
from loadtest.bench.subject import Answered
from loadtest.bench.summary import Summary, against_raw, between_modes
from loadtest.errors import LoadTestError
from loadtest.recording import Recording
from loadtest.texts import Sample


def a_round(number: int, speed: float, mode: ModeName = "recurrent") -> list[Measured]:
    """One round on a machine that is so fast just then."""
    texts = {"raw": 1000.0, "lists": 900.0, "single": 600.0}
    faster = {"recurrent": 1.0, "early-exit": 1.5, "baseline": 0.5}[mode] * speed
    latency = {"p50_ms": 2.0 / speed, "p95_ms": 5.0 / speed, "p99_ms": 7.0 / speed}
    measured = [
        Measured(Cell("raw", mode), number, {"texts_per_second": texts["raw"] * faster, "cpu_ms_per_text": 2.0}, {}),
        Measured(Cell("bare", mode), number, {"p50_ms": 1.2 / speed}, {}),
        *(
            Measured(
                Cell(kind, mode, connections),
                number,
                latency
                | {"texts_per_second": texts[kind] * faster, "cpu_ms_per_text": 3.0, "generator_cores": 0.2}
                | {"requests_per_second": 9.0, "generator_cpu_ms_per_request": 0.1},
                {},
            )
            for kind, connections in (("lists", 8), ("single", 1), ("single", 32))
        ),
        Measured(Cell("mixed", mode, 64), number, {"padding_share": 0.04, "short_p99_ms": 14.0 / speed}, {}),
    ]
    return measured[1:] if mode == "early-exit" else measured


MODES: tuple[ModeName, ...] = ("recurrent", "early-exit", "baseline")
MEASURED = [
    one for number, speed in ((1, 1.0), (2, 0.5), (3, 2.0)) for mode in MODES for one in a_round(number, speed, mode)
]
RESULTS = Results(
    texts="872 short texts",
    models={"recurrent": "sentiment-recurrent@abc, int8"},
    measured=MEASURED,
    footprints={
        "recurrent": Footprint(3, Memory(200_000_000, 120_000_000), Memory(300_000_000, 150_000_000), 4e6),
        "baseline": Footprint(3, Memory(220_000_000, 140_000_000), Memory(300_000_000, 150_000_000), 10e6),
    },
    accuracies=[Accuracy("early-exit", "short", 0.6, 1.071, 0.8028), Accuracy("recurrent", "short", 1, 2.0, None)],
)


def row(table: str, title: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_ratios_are_of_the_same_round_so_that_a_machine_that_drifts_does_not_show() -> None:
    found = against_raw(Summary(MEASURED))
    for mode, share in (("recurrent", 0.9), ("early-exit", 1.35), ("baseline", 0.9)):
        spread = found["texts/s, of raw: lists"][mode]
        assert (spread.low, spread.median, spread.high) == pytest.approx((share, share, share))
    cpu = found["CPU time of a text, of raw: single, 32"]
    assert (cpu["early-exit"].median, cpu["baseline"].median) == (1.5, 1.5)
    assert found["p99 of short texts: beside long ones / alone"]["baseline"].median == pytest.approx(2.0)
    assert found["padding among short and long texts"]["recurrent"].median == 0.04


def test_a_difference_is_taken_round_by_round_too() -> None:
    above = against_raw(Summary(MEASURED))["p50 of single, 1, above the bare call, ms"]["recurrent"]
    assert (above.low, above.median, above.high) == pytest.approx((0.4, 0.8, 1.6))


def test_one_mode_over_another() -> None:
    found = between_modes(Summary(MEASURED))
    assert found["lists"]["early-exit / recurrent"].median == pytest.approx(1.5)
    assert found["single, 1"]["recurrent / baseline"].median == pytest.approx(2.0)
    assert set(found["raw"]) == {"recurrent / baseline"}


def test_what_was_not_measured_is_not_compared() -> None:
    alone = [one for one in MEASURED if one.cell.kind == "lists" and one.cell.mode == "recurrent"]
    assert against_raw(Summary(alone)) == {}
    assert between_modes(Summary(alone)) == {}


def test_tables_say_what_was_measured(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a film\n")
    options = BenchOptions(output_dir=tmp_path, rounds=3, texts=texts, connections=(1,))
    written = [*report.write(RESULTS, options, {"machine": "2 cores"}), figure.write(RESULTS, options)]
    assert [path.name for path in written] == ["bench.json", "bench.md", "bench.png"]
    markdown = written[1].read_text()
    part = markdown[markdown.index("## baseline") : markdown.index("## Against")]
    assert row(part, "raw, batches")[0] == "500 (250 to 1,000)"
    assert row(part, "lists, 8 connections")[:2] == ["450 (225 to 900)", "0.900"]
    assert row(markdown, "ratio")[-1] == "0.400"
    assert row(markdown, "early-exit") == ["short", "0.6", "1.071", "0.8028"]
    assert "--rounds 3 --connections 1 --texts ..." in markdown
    content = json.loads(written[0].read_text())
    assert content["against_raw"]["texts/s, of raw: lists"]["recurrent"]["median"] == pytest.approx(0.9)
    assert len(content["cells"]) == len(MEASURED)
    assert content["machine"] == {"machine": "2 cores"}
    assert str(tmp_path) not in markdown + written[0].read_text()
    assert written[2].stat().st_size > 10_000


def test_a_part_of_a_run_is_reported_too(tmp_path: Path) -> None:
    few = replace(
        RESULTS, measured=[Measured(Cell("single", "baseline", 4), 1, {"generator_cores": 0.95}, {"HTTP 500": 3})]
    )
    options = BenchOptions(output_dir=tmp_path)
    report.write(few, options, {"machine": "2 cores"})
    figure.write(few, options)
    assert report.notes(few)[0] == "baseline, single, 4 connections, round 1: 3 requests failed: HTTP 500"
    assert "The load generator was the limit" in report.notes(few)[1]
    assert (RESULTS.sound, few.sound) == (True, False)


def closed(answered: int, **failures: int) -> Seen:
    """Ten seconds of users who wait."""
    return Seen(10.0, 0, 0, [Recording([5.0] * answered, failures)], [], [1.0], [(0.0, Memory())], Probes())


def overloaded(probes: Probes | None = None, **failures: int) -> overload.Overload:
    recording = Recording(
        milliseconds=[5.0] * 80, failures={name.replace("_", " "): count for name, count in failures.items()}
    )
    memory = [(float(second), Memory(0, 100 + (second if second > 50 else 0))) for second in range(101)]
    seen = Seen(10.0, 165, 5, [recording], [8] * 10, [1.0], memory, probes or Probes())
    return judged("recurrent", closed(80), closed(120), 16.0, seen)


def test_overload_is_judged_by_what_is_answered_and_by_how_the_rest_ended() -> None:
    one = overloaded(HTTP_429_queue_full=79, HTTP_504_deadline=1)
    assert (one.goodput, one.of_capacity, one.turned_away) == (8.0, 0.8, 79)
    assert one.unexpected == {"HTTP 504 deadline": 1}
    assert not replace(RESULTS, overload=one).sound
    assert one.lost == 0
    assert replace(RESULTS, overload=overloaded(HTTP_429_queue_full=80)).sound
    lost = overloaded(HTTP_429_queue_full=79)
    assert (lost.lost, replace(RESULTS, overload=lost).sound) == (1, False)
    unready = overloaded(Probes(failures=Counter({"/readyz: HTTP 503": 2})), HTTP_429_queue_full=80)
    assert (unready.lost, unready.unexpected, replace(RESULTS, overload=unready).sound) == (0, {}, False)
    assert "overload: 2 probes: /readyz: HTTP 503" in report.notes(replace(RESULTS, overload=unready))
    table = report.overload_table(one)
    assert row(table, "turned away with 429") == ["47.9%"]
    assert row(table, "goodput / capacity") == ["0.800"]
    assert "overload: 1 requests: HTTP 504 deadline" in report.notes(replace(RESULTS, overload=one))


def test_what_fails_while_the_capacity_is_measured_is_told_and_without_any_answer_there_is_no_overload(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    busy = Recording([5.0] * 80, generator_cpu_seconds=9.5, generator_wall_seconds=10.0)
    seen = replace(closed(80), sent=80, recordings=[busy])
    found = replace(RESULTS, overload=judged("recurrent", closed(80), closed(80, broken=3), 16.0, seen))
    assert not found.sound
    capacity, generator = report.notes(found)
    assert capacity == "capacity before and after overload: 3 failed: broken"
    assert "The load generator was the limit, not the service (overload)" in generator

    monkeypatch.setattr(cells, "traffic", lambda *_: {})
    monkeypatch.setattr(cells, "drive", lambda *_, **__: closed(0, broken=9))
    subject: Any = SimpleNamespace(short=None)
    with pytest.raises(LoadTestError, match=r"no request was answered rightly.*'broken': 9"):
        overload.measure("recurrent", subject, BenchOptions(), tmp_path)


def test_memory_growth_leaves_the_warm_up_out() -> None:
    assert overloaded().memory_growth == pytest.approx(1.95)
    rising_then_flat = [(float(second), 50.0 if second < 18 else 100.0) for second in range(101)]
    assert growth(rising_then_flat) == 1.0
    assert growth([(0.0, 5.0)]) == 1.0


def test_the_plan_has_each_cell_once_and_the_raw_runtime_at_fixed_depth_alone() -> None:
    cells = plan(BenchOptions(processes=2, connections=(1, 32), mixed_connections=64))
    assert len(cells) == len(set(cells)) == 2 + 3 * (1 + 1 + 2 + 1)
    assert {cell.mode for cell in cells if cell.kind == "raw"} == {"recurrent", "baseline"}
    assert {cell.connections for cell in cells if cell.kind == "lists"} == {8}
    only = plan(BenchOptions(modes=("early-exit",), cells=("raw", "mixed"), mixed_connections=10))
    assert [(cell.name, cell.mode) for cell in only] == [
        ("raw", "recurrent"),
        ("single-5", "early-exit"),
        ("mixed", "early-exit"),
    ]


def test_known_answers_follow_the_threshold() -> None:
    samples = [Sample("a", 1), Sample("b", "no"), Sample("c", 0), Sample("d")]
    sure, unsure, late, other = (
        [[0.1, 0.9], [0.2, 0.8]],
        [[0.6, 0.4], [0.7, 0.3]],
        [[0.4, 0.6], [0.9, 0.1]],
        [[1.0, 0.0]] * 2,
    )
    answered = Answered(samples, [3, 4, 5, 6], [sure, unsure, late, other], ["no", "yes"])
    assert answered.taken(1) == [2, 2, 2, 2]
    assert answered.taken(0.9) == [1, 2, 2, 1]
    assert answered.known(0.9) == [("yes", 0.9), ("no", 0.7), ("no", 0.9), ("no", 1.0)]
    assert answered.accuracy(1) == 1.0
    assert answered.accuracy(0.6) == pytest.approx(2 / 3)
    assert replace(answered, samples=[Sample("a")] * 4).accuracy(1) is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "--rounds must be above 0"),
        (["--connections", "4", "0"], "--connections must be above 0"),
        (["--exit-threshold", "1.5"], "--exit-threshold must be above 0, and at most 1"),
        (["--mixed-connections", "1"], "--mixed-connections must be at least 2"),
        (["--texts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--data-dir", "nowhere"], "there is no file nowhere/sst2/validation.jsonl.gz"),
        (["--modes", "deep"], "deep"),
        (["--output-dir", f"{__file__}/out"], "test_bench_report.py/out cannot be written"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert complaint in said.err + said.out


def test_quick_is_one_short_round() -> None:
    quick = parse(["--quick", "--connections", "1", "8"])
    assert (quick.rounds, quick.seconds, quick.connections) == (1, 1.0, (1, 8))
    told_otherwise = parse(["--quick", "--rounds", "3"])
    assert (told_otherwise.rounds, told_otherwise.seconds) == (3, 1.0)
    assert quick.output_dir != parse([]).output_dir
    for told in ("elsewhere", "docs/results"):
        assert parse(["--quick", "--output-dir", told]).output_dir == Path(told)
    assert parse([]) == BenchOptions()
