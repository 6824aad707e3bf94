"""Figures of one load, from traces and scrapes made up here."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.samples import Sample

from loadtest import gpu
from loadtest.driver import Driven, others_cpu_seconds
from loadtest.figures import course, curve, figures_of, is_refusal, memory_figures
from loadtest.job import Answer, Trace
from loadtest.options import Load, Options
from loadtest.steps import Step
from loadtest.target import Metrics

OPTIONS = Options(cost_per_core_hour=0.5)
LISTS = Load("lists", "lists of 4", "users", "steady", 2, 4, 10)
BOTH = ("recurrent", "baseline")


def scrape(cpu: float, answered: float, **more: float) -> Metrics:
    return Metrics(
        [
            Sample("process_cpu_seconds_total", {}, cpu),
            Sample("refrain_requests_total", {"code": "200"}, answered),
            *(Sample(name, {"architecture": "recurrent", "task": "sentiment"}, value) for name, value in more.items()),
        ]
    )


def trace(count: int) -> Trace:
    """Latencies of 1 to `count` ms, recurrent and baseline in turn, in ten seconds."""
    answers = [Answer(0, BOTH[index % 2], index * 10 / count, index + 1.0, 0.5) for index in range(count)]
    return Trace(answers=answers, sent=count, seconds=10.0, generator_cpu_seconds=2.0)


DRIVEN = Driven(
    trace(1000),
    scrape(5.0, 100, refrain_iterations_sum=10, refrain_iterations_count=10),
    [],
    scrape(13.0, 1100, refrain_iterations_sum=6010, refrain_iterations_count=4010),
    None,
    12.0,
    20.0,
)


def test_rates_latencies_and_cost_are_of_the_texts_that_were_answered() -> None:
    figures, by_architecture = figures_of(DRIVEN, LISTS, OPTIONS, BOTH)
    assert figures["requests_per_second"] == 100
    assert figures["texts_per_second"] == 400
    assert (figures["p50_ms"], figures["p99_ms"], figures["p99.9_ms"]) == (500, 990, 999)
    assert figures["cpu_seconds_per_million_texts"] == pytest.approx(8 / 4000 * 1e6)
    assert figures["cost_per_million_texts"] == pytest.approx(2000 / 3600 * 0.5)
    assert figures["service_cores"] == pytest.approx(0.8)
    assert figures["generator_cores"] == pytest.approx(0.2)
    assert figures["other_cores"] == pytest.approx(1.0)
    assert figures["mean_iterations"] == pytest.approx(1.5)
    assert by_architecture["baseline"]["p50_ms"] == 500
    assert by_architecture["recurrent"]["p50_ms"] == 499


@pytest.mark.parametrize(
    "changed",
    [
        {"after": None},
        {"after": scrape(13.0, 1400)},  # others called as well
        {"after": scrape(13.0, 600)},  # half was answered by another replica
        {"after": scrape(2.0, 1100)},  # another replica than before
    ],
)
def test_cpu_time_that_is_not_of_these_requests_alone_is_left_out(changed) -> None:
    figures, _ = figures_of(replace(DRIVEN, **changed), LISTS, OPTIONS, BOTH)
    assert not {"cpu_seconds_per_million_texts", "cost_per_million_texts", "service_cores"} & set(figures)
    assert "p99_ms" in figures


def test_percentiles_need_answers_enough() -> None:
    few, _ = figures_of(replace(DRIVEN, trace=trace(99)), LISTS, OPTIONS, BOTH)
    assert "p95_ms" in few
    assert "p99_ms" not in few
    assert len(curve(trace(99).answers)) == 98
    assert len(curve(trace(1000).answers)) == 108
    assert curve([]) == []


def test_a_search_gives_the_knee_and_no_latencies_of_all_its_steps_together() -> None:
    load = Load("step", "", "poisson", "step", 100, 4, 3)
    steps = [Step(100, 3, 300, 0, 10.0, 40.0, 1.0, 0.1), Step(130, 3, 390, 0, 30.0, 240.0, 1.0, 0.1)]
    figures, by_architecture = figures_of(replace(DRIVEN, trace=replace(trace(690), steps=steps)), load, OPTIONS, BOTH)
    assert (figures["level_requests_per_second"], figures["level_texts_per_second"]) == (100, 400)
    assert figures["level_p50_ms"] == 10
    assert figures["late_p99_ms"] == 1.0
    hiccup = replace(DRIVEN, trace=replace(trace(300), steps=[replace(steps[0], p50_ms=90.0, p99_ms=900.0), steps[0]]))
    assert figures_of(hiccup, load, OPTIONS, BOTH)[0]["level_p50_ms"] == 10  # of the try that held
    never = replace(DRIVEN, trace=replace(trace(390), steps=steps[1:]))
    assert figures_of(never, load, OPTIONS, BOTH)[0]["level_texts_per_second"] == 0
    assert "p50_ms" not in figures
    assert by_architecture == {}


def test_the_course_is_told_second_by_second() -> None:
    told = course([Answer(0, "recurrent", 0.2, 5.0, 0), Answer(0, "recurrent", 0.9, 7.0, 0), *trace(10).answers[5:6]])
    assert told == [
        {"second": 0, "answered": 2, "p50_ms": 5.0, "slowest_ms": 7.0},
        {"second": 5, "answered": 1, "p50_ms": 6.0, "slowest_ms": 6.0},
    ]


def test_memory_is_of_the_processes_and_of_the_models_that_were_asked() -> None:
    idle = Metrics(
        [
            Sample("process_resident_memory_bytes", {}, 5e7),
            Sample("refrain_model_memory_bytes", {"architecture": "recurrent", "task": "sentiment"}, 4e6),
            Sample("refrain_model_memory_bytes", {"architecture": "recurrent", "task": "domain"}, 1e6),
            Sample("refrain_model_memory_bytes", {"architecture": "baseline", "task": "sentiment"}, 9e6),
        ]
    )
    peak = Metrics([Sample("process_resident_memory_bytes", {}, 6e7)])
    found = memory_figures(idle, [None, peak, idle], ["recurrent"], "sentiment")
    assert found == {"idle_memory_bytes": 5e7, "peak_memory_bytes": 6e7, "model_memory_bytes": 4e6}
    assert memory_figures(None, [None], BOTH, "sentiment") == {}


@pytest.mark.parametrize("failure", ["HTTP 429 queue_full", "HTTP 503 too_many_connections", "HTTP 504 deadline"])
def test_too_much_load_is_refused(failure: str) -> None:
    assert is_refusal(failure)


@pytest.mark.parametrize(
    "failure", ["HTTP 500 inference_failed", "HTTP 503 engine_down", "HTTP 503", "results of ['baseline'], 1 in all"]
)
def test_what_fails_under_any_load_is_no_refusal(failure: str) -> None:
    assert not is_refusal(failure)


def test_cpu_time_of_the_machine_is_read_where_there_is_linux(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  900000 100000 200000 77 88 100 200 0 0 0\ncpu0 1 2 3\n")
    assert (others_cpu_seconds(tmp_path / "stat") or 0) > 1000
    assert others_cpu_seconds(tmp_path / "missing") is None


class Nvml(SimpleNamespace):
    """NVML with so many devices, each with a gigabyte in use; -1: no driver."""

    class NVMLError(Exception):
        pass

    devices = 2

    def nvmlInit(self) -> None:
        if self.devices < 0:
            raise self.NVMLError

    def nvmlDeviceGetCount(self) -> int:
        return self.devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=10**9)

    def nvmlShutdown(self) -> None:
        pass


@pytest.mark.parametrize(("devices", "found"), [(2, 2e9), (0, None), (-1, None)])
def test_memory_on_gpus_is_told_where_there_are_some(devices: int, found: float | None) -> None:
    assert gpu.memory_bytes(Nvml(devices=devices)) == found
