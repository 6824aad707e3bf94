"""Holds docs/sizing.md and the proxy's example to the files, settings and metrics that they speak of."""

import re
from pathlib import Path

from service.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/sizing.md"
TEXT = PAGE.read_text()
PROXY = (ROOT / "docs/haproxy.cfg").read_text()


def test_what_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 5
    assert all((PAGE.parent / link).exists() for link in links), links


def test_settings_and_metrics_are_the_applications(settings_names: set[str]) -> None:
    assert set(re.findall(r"REFRAIN_\w+", TEXT + PROXY)) <= settings_names
    metrics = (ROOT / "service/metrics.py").read_text()
    for name in set(re.findall(r"\brefrain_\w+", TEXT)):
        assert f'"{name.removesuffix("_total")}"' in metrics


def test_rows_are_those_of_the_report() -> None:
    report = (ROOT / "docs/results/loadtest.md").read_text()
    for row in (
        "texts/s within the service level",
        "CPU seconds per million texts",
        "busy cores, load generator",
        "process memory peak, MB",
        "model memory, MB",
    ):
        assert row in " ".join(TEXT.split())
        assert row in report


def test_the_head_room_is_where_the_autoscaler_acts() -> None:
    scaler = (ROOT / "k8s/components/autoscaling-cpu/horizontalpodautoscaler.yaml").read_text()
    (used,) = re.findall(r"averageUtilization: (\d+)", scaler)
    assert f"{int(used) / 100} leaves room" in TEXT


def test_the_proxy_waits_longer_than_the_service(defaults: Settings) -> None:
    (seconds,) = re.findall(r"timeout server (\d+)s", PROXY)
    assert int(seconds) > defaults.deadline_ms / 1000
