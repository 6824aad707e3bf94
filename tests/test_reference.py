"""docs/reference.md names every setting, path, error, metric and field of the log as the code has it, and no other."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

from prometheus_client.metrics import MetricWrapperBase

from service import inference_protocol
from service.app import router
from service.errors import RefrainError, Unavailable
from service.front import OPEN_PATHS
from service.jobs import Drop, Exit, Shortage
from service.logs import Call
from service.metrics import Metrics, Reload, SupervisorMetrics
from service.schemas import Timings
from service.settings import described_settings
from service.shadow import Verdict

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "reference.md").read_text(encoding="utf-8")
VALUES = {
    "refrain_stage_duration_seconds": tuple(name for name in Timings.model_fields if name != "total"),
    "refrain_batch_tokens_total": ("real", "padding"),
    "refrain_exits_total": get_args(Exit),
    "refrain_degraded_texts_total": get_args(Shortage),
    "refrain_dropped_texts_total": get_args(Drop),
    "refrain_shadow_total": get_args(Verdict),
    "refrain_reloads_total": get_args(Reload),
}


def section(title: str) -> str:
    return re.split(r"^## ", TEXT[TEXT.index(f"## {title}\n") + 3 :], flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def errors(kind: type[RefrainError] = RefrainError) -> list[type[RefrainError]]:
    below = [error for child in kind.__subclasses__() for error in errors(child)]
    return below if kind is Unavailable else [kind, *below]  # that one is for its children alone


def test_settings_are_those_that_are_read() -> None:
    assert rows("Settings") == [
        [f"`{one.name}`", one.default, one.allowed, one.meaning] for one in described_settings()
    ]


def test_paths_are_those_that_are_served_and_open_those_without_a_key() -> None:
    served = {route.path for route in [*router.routes, *inference_protocol.router.routes] if hasattr(route, "path")}
    described = {path: key for cell, _, key in rows("Paths") for path in names(cell)}
    assert described.keys() == served | {"/docs", "/openapi.json"}  # the framework's own
    assert {path for path, key in described.items() if key == "open"} == OPEN_PATHS


def test_errors_are_those_that_there_are() -> None:
    listed = {(status, *names(code), when.endswith("; ends")) for status, code, when in rows("Errors")}
    assert listed == {(str(kind.status), kind.code, kind.closes) for kind in errors()}


def test_metrics_are_those_that_are_exposed() -> None:
    found = {"refrain_memory_limit_bytes": (set[str](), "Memory that all processes may take together.")}
    for metric in [*Metrics().registry._collector_to_names, *vars(SupervisorMetrics()).values()]:
        if isinstance(metric, MetricWrapperBase):
            (described,) = metric.describe()
            name = described.name + "_total" * (described.type == "counter")
            found[name] = set(metric._labelnames), described.documentation
    listed = {names(name)[0]: (set(names(labels)), meaning) for name, labels, meaning in rows("Metrics")}
    assert listed == found
    for metric, labels, _ in rows("Metrics"):
        if expected := VALUES.get(names(metric)[0]):
            assert f"({', '.join(expected)})" in labels


def test_fields_of_the_log_are_those_of_a_call() -> None:
    listed = names(section("Log").split("timings_ms")[0] + "timings_ms`")
    assert set(listed) == {field.name for field in dataclasses.fields(Call)} - {"started"}


def test_what_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    assert all((DOCS / link.split("#")[0]).exists() for link in links)
