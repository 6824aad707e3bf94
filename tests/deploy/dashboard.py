"""Reads Grafana's dashboard: its panels, and their queries as Grafana would send them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FILE = ROOT / "monitoring/grafana/dashboards/refrain.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
VARIABLES: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


class Query(NamedTuple):
    panel: str
    expression: str
    legend: str


def queries(step: str) -> Iterator[Query]:
    """Every panel's queries with all variables at "All"; `step` is what rates are taken over."""
    values = {name: variable["allValue"] for name, variable in VARIABLES.items() if variable["type"] == "query"}
    values |= {"__rate_interval": step}
    for panel in PANELS:
        for target in panel.get("targets", []):
            expression = re.sub(r"\$(\w+)", lambda match: values[match[1]], target["expr"])
            yield Query(panel["title"], expression, target["legendFormat"])
