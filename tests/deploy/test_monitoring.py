"""Holds rules, alerts, dashboard and runbook to each other and to the application, so that none of them drifts."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from service.metrics import SECONDS
from tests.deploy.dashboard import DASHBOARD, PANELS, ROOT, VARIABLES, queries
from tests.deploy.promql import PROMETHEUS, Known, exposed, labels_of

MONITORING = ROOT / "monitoring"
RULES = sorted((MONITORING / "prometheus/rules").glob("*.yml"))
TESTS = sorted((MONITORING / "prometheus/tests").glob("*.yml"))
RUNBOOK = (ROOT / "docs/runbook.md").read_text()


def _groups() -> Iterator[dict[str, Any]]:
    for file in RULES:
        yield from yaml.safe_load(file.read_text())["groups"]


EVERY_RULE: list[dict[str, Any]] = [rule for group in _groups() for rule in group["rules"]]
RECORDED = [rule for rule in EVERY_RULE if "record" in rule]
ALERTS = [rule for rule in EVERY_RULE if "alert" in rule]
ALERT_TESTS: list[dict[str, Any]] = [
    test
    for file in TESTS
    for scene in yaml.safe_load(file.read_text())["tests"]
    for test in scene.get("alert_rule_test", [])
]

every_alert = pytest.mark.parametrize(
    "alert", ALERTS, ids=lambda rule: "-".join([rule["alert"], *rule["labels"].values()])
)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Every metric that a query may read: the application's, Prometheus' own, and what the rules record."""
    metrics = exposed(tmp_path_factory.mktemp("metrics")) | PROMETHEUS
    for rule in RECORDED:
        metrics[rule["record"]] = labels_of(rule["expr"], metrics)
    return metrics


def promtool(*arguments: str | Path) -> None:
    if not (program := shutil.which("promtool")):
        pytest.skip("promtool is not installed: Debian has it in the package prometheus")
    done = subprocess.run([program, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_rules() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.deploy  # days are played through, which takes seconds
def test_the_rules_pass_their_tests() -> None:
    promtool("test", "rules", *TESTS)


def test_prometheus_reads_the_rules_and_their_tests_do() -> None:
    config = yaml.safe_load((MONITORING / "prometheus/prometheus.yml").read_text())
    for directory, named in [
        (MONITORING / "prometheus", config["rule_files"]),
        *((file.parent, yaml.safe_load(file.read_text())["rule_files"]) for file in TESTS),
    ]:
        read = {path.resolve() for pattern in named for path in _matching(directory, pattern)}
        assert read == {path.resolve() for path in RULES}


def _matching(directory: Path, pattern: str) -> Iterator[Path]:
    folder, _, name = pattern.rpartition("/")
    return (directory / folder).glob(name)


def test_a_rule_has_the_name_that_the_conventions_give_it(known: Known) -> None:
    for rule in RECORDED:
        level, _, _ = rule["record"].partition(":")
        assert set(level.split("_")) == known[rule["record"]], rule["record"]


def test_what_is_recorded_is_read() -> None:
    read = "\n".join([*(rule["expr"] for rule in ALERTS), *(query.expression for query in queries("1m"))])
    assert [rule["record"] for rule in RECORDED if not re.search(rf"{rule['record']}\b", read)] == []


@every_alert
def test_alerts_read_what_there_is(alert: dict[str, Any], known: Known) -> None:
    labels = labels_of(alert["expr"], known)
    for name in re.findall(r"\$labels\.(\w+)", str(alert["annotations"])):
        assert name in labels, "an annotation sees the labels of the expression, not those of the rule"


@every_alert
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["alert"].startswith("Refrain")
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


@every_alert
def test_an_alert_is_seen_to_fire_and_to_stay_quiet(alert: dict[str, Any]) -> None:
    expected = [test["exp_alerts"] for test in ALERT_TESTS if test["alertname"] == alert["alert"]]
    fires = [one for alerts in expected for one in alerts if alert["labels"].items() <= one["exp_labels"].items()]
    assert fires, "no unit test has it fire"
    assert [] in expected, "no unit test has it stay quiet"


def test_the_runbook_has_a_section_for_each_alert_and_for_nothing_else() -> None:
    sections = dict(zip(*[iter(re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert sections.keys() == {alert["alert"] for alert in ALERTS}
    for name, text in sections.items():
        assert re.findall(r"^\*\*(.+?):\*\*", text, flags=re.MULTILINE) == ["Means", "Look at", "Do"], name


def test_what_the_runbook_points_at_is_there(settings_names: set[str]) -> None:
    anchors = {f"#{heading.lower()}" for heading in re.findall(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)}
    for target in re.findall(r"\]\((.+?)\)", RUNBOOK):
        assert target in anchors or (ROOT / "docs" / target).is_file(), target
    assert set(re.findall(r"REFRAIN_\w+", RUNBOOK)) <= settings_names
    panels = {panel["title"] for panel in PANELS}
    assert {name for name in re.findall(r'"([^"]+)"', RUNBOOK.replace("\n", " ")) if name not in panels} == set()


def test_the_objectives_are_the_runbooks_and_their_edge_is_a_buckets() -> None:
    assert "**99.9 % of classify requests get no 5xx**" in RUNBOOK
    assert "**99 % of answered requests take less than\n100 ms**" in RUNBOOK
    budgets = {"errors": 0.001, "slow_requests": 0.01}
    for alert in ALERTS:
        for metric, factor, budget in re.findall(
            r"refrain_(?:request_)?(\w+):\S+ > (?:([\d.]+) \* )?(0\.0\d+)$", alert["expr"], re.MULTILINE
        ):
            if metric in budgets:
                assert float(budget) == budgets[metric]
                assert float(factor or 1) == {"1h": 14.4, "6h": 6, "3d": 1}[alert["labels"]["long"]]
    edges = {edge for rule in RECORDED for edge in re.findall(r'le="(.+?)"', rule["expr"])}
    assert edges == {"0.1"} and 0.1 in SECONDS


def test_panels_read_what_there_is(known: Known) -> None:
    for query in queries("1m"):
        labels = labels_of(query.expression, known)
        assert set(re.findall(r"{{(\w+)}}", query.legend)) <= labels, f"{query.panel}: {query.legend}"


def test_a_line_in_a_panel_is_where_the_alert_begins() -> None:
    expressions = "\n".join(alert["expr"] for alert in ALERTS)
    begins = {name: float(edge) for name, edge in re.findall(r"(\S+:\S+) > ([\d.]+)$", expressions, re.MULTILINE)}
    drawn = {
        panel["targets"][0]["expr"].partition("{")[0]: panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1][
            "value"
        ]
        for panel in PANELS
        if "thresholds" in panel.get("fieldConfig", {}).get("defaults", {})
    }
    shared = begins.keys() & drawn.keys()
    assert len(shared) > 2
    assert {name: drawn[name] for name in shared} == {name: begins[name] for name in shared}


def test_variables_offer_what_there_is(known: Known) -> None:
    assert VARIABLES.keys() == {"datasource", "task", "architecture", "instance"}
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            assert variable["definition"] == variable["query"]["query"]
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert match is not None and match[2] == name
            assert name in labels_of(re.sub(r"\$\w+", ".*", match[1]), known)
            assert variable["allValue"] == ".*"  # also finds requests that no model was chosen for


def test_the_dashboard_marks_the_alerts() -> None:
    (marks,) = DASHBOARD["annotations"]["list"]
    (selector,) = [promql_parser.parse(marks["expr"])]
    named = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
    assert all(re.fullmatch(named["alertname"], alert["alert"]) for alert in ALERTS)


def test_panels_ask_the_chosen_data_source_and_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    for one, other in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        assert not _overlap(one, other), (one, other)


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )
