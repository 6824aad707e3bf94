"""Holds PromQL to what the application exposes: its metrics, their labels, and the values that those take."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import promql_parser
from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from service.errors import RefrainError
from service.front import REJECTIONS
from service.jobs import Exit, Shortage
from service.metrics import SECONDS, Metrics, Reload, SupervisorMetrics
from service.process_tree import ProcessTree, write_pids
from service.schemas import Timings
from service.shadow import Verdict

Labels = frozenset[str]
Known = Mapping[str, Labels]
"""Metric -> its labels."""

TARGET = frozenset({"namespace", "job", "instance"})  # what Prometheus adds; the first only in a cluster
PROMETHEUS = {"up": TARGET, "ALERTS": TARGET | {"alertname", "alertstate", "severity"}}


def _errors(kind: type[RefrainError] = RefrainError) -> list[type[RefrainError]]:
    return [kind, *(error for child in kind.__subclasses__() for error in _errors(child))]


VALUES: Mapping[tuple[str, str], Iterable[str]] = {
    ("refrain_requests_total", "code"): ["200", *(str(error.status) for error in _errors())],
    ("refrain_rejected_total", "reason"): [error.code for error in _errors() if error.status in REJECTIONS],
    ("refrain_exits_total", "reason"): get_args(Exit),
    ("refrain_degraded_texts_total", "reason"): get_args(Shortage),
    ("refrain_shadow_total", "result"): get_args(Verdict),
    ("refrain_reloads_total", "outcome"): get_args(Reload),
    ("refrain_stage_duration_seconds_bucket", "stage"): Timings.model_fields,
    ("refrain_stage_duration_seconds_count", "stage"): Timings.model_fields,
    ("refrain_stage_duration_seconds_sum", "stage"): Timings.model_fields,
    ("refrain_request_duration_seconds_bucket", "le"): [str(edge) for edge in SECONDS],
}
"""What the labels that a query may select by are ever given, where that follows from the code."""


def exposed(directory: Path) -> dict[str, Labels]:
    """Every metric that Prometheus finds at the service; `directory` is for what its processes would share."""
    write_pids(directory, [os.getpid()])
    limit = directory / "memory.max"
    limit.write_text("1000000")
    found = {sample.name: TARGET for metric in ProcessTree(directory, limit).collect() for sample in metric.samples}
    service = Metrics()
    groups = [service, service.durations, service.batches, service.shadows, service.models, SupervisorMetrics()]
    for metric in [value for group in groups for value in vars(group).values()]:
        if isinstance(metric, MetricWrapperBase):
            labels = TARGET | frozenset(metric._labelnames)  # it tells them in no other way before it has values
            (described,) = metric.describe()
            if isinstance(metric, Histogram):
                found |= {f"{described.name}_bucket": labels | {"le"}}
                found |= {f"{described.name}_{part}": labels for part in ("sum", "count")}
            else:
                found[described.name + "_total" * (described.type == "counter")] = labels
    return found


def labels_of(query: str, known: Known) -> Labels:
    """The labels of what a query gives. Fails where it reads what is not there, or could never match."""
    return _labels(promql_parser.parse(query), known)


def _labels(node: Any, known: Known) -> Labels:
    match node:
        case promql_parser.VectorSelector():
            return _selected(node, known)
        case promql_parser.MatrixSelector():
            return _selected(node.vector_selector, known)
        case promql_parser.AggregateExpr():
            kept = frozenset(node.modifier.labels if node.modifier else ())
            assert kept <= _labels(node.expr, known), f"{node.prettify()}: not all of {set(kept)} are there"
            return kept
        case promql_parser.BinaryExpr():
            left, right = _labels(node.lhs, known), _labels(node.rhs, known)
            if node.modifier and node.modifier.matching:
                matched = frozenset(node.modifier.matching.labels)
                assert matched <= left & right, f"{node.prettify()}: not all of {set(matched)} are on both sides"
                return matched
            return left | right
        case promql_parser.Call():
            given = frozenset[str]().union(*(_labels(argument, known) for argument in node.args))
            assert node.func.name != "histogram_quantile" or "le" in given, f"{node.prettify()} needs the label le"
            return given - ({"le"} if node.func.name == "histogram_quantile" else set())
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            return _labels(node.expr, known)
    return frozenset()


def _selected(selector: Any, known: Known) -> Labels:
    assert selector.name in known, f"{selector.name}: the service has no such metric"
    for matcher in selector.matchers.matchers:
        assert matcher.name in known[selector.name], f"{selector.name} has no label {matcher.name}"
        if matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.Re):
            for value in matcher.value.split("|"):
                taken = VALUES.get((selector.name, matcher.name), [value])
                assert any(re.fullmatch(value, one) for one in taken), f"{selector}: {matcher.name} is never {value}"
    return known[selector.name]
