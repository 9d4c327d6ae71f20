"""PromQL of the dashboard and the rules, and the names of the series in it."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "rtap.json").read_text("utf-8"))
RULES = ROOT / "deploy" / "prometheus" / "rules"
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}
# Everything but series names: matchers, strings, ranges, label lists, functions, operators, numbers.
_NOT_NAMES = (
    r"\{[^{}]*\}", r'"[^"]*"', r"\[[^\]]*\]", r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
    r"\b[a-z_]+\s*(?=\()", r"\b(?:by|without|on|ignoring|group_left|group_right|and|or|unless|offset|bool)\b",
    r"\b\d[\w.]*",
)  # fmt: skip


def names(query: str) -> set[str]:
    """Series that a query reads."""
    for pattern in _NOT_NAMES:
        query = re.sub(pattern, " ", query)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", query))


def panels() -> list[dict[str, Any]]:
    """All panels except rows."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def panel_queries() -> list[tuple[str, str]]:
    """(title of the panel, query) with the dashboard's variables filled in."""
    return [(panel["title"], filled(target["expr"])) for panel in panels() for target in panel["targets"]]


def legends() -> list[tuple[str, set[str]]]:
    """(query, labels that its legend names), of every query whose legend names some."""
    found = ((t["expr"], set(re.findall(r"\{\{(\w+)\}\}", t["legendFormat"]))) for p in panels() for t in p["targets"])
    return [(filled(query), labels) for query, labels in found if labels]


def variable_queries() -> dict[str, tuple[str, str]]:
    """(series, label) whose values a variable of the dashboard offers, by its name."""
    asked = {v["name"]: filled(v["query"]["query"]) for v in DASHBOARD["templating"]["list"] if v["type"] == "query"}
    return {name: _label_values(query) for name, query in asked.items()}


def _label_values(query: str) -> tuple[str, str]:
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert found is not None, query
    return found[1], found[2]


def filled(query: str) -> str:
    """A query as Grafana would send it."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts."""
    files = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(RULES.glob("*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]
