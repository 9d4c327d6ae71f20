"""The dashboard and its provisioning: queries parse, panels are complete, files are where deploy/compose mounts them.

Against a live server: tests/e2e/test_observability.py.
"""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from tests.deploy.promql import DASHBOARD, ROOT, filled, legends, names, panel_queries, panels, variable_queries

GRAFANA = ROOT / "deploy" / "grafana"
UNITS = {"short", "reqps", "percentunit", "s", "bytes"}  # Grafana prints an unknown id as text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('sum by (f) (rate(a_total{x="b",y=~"c|d"}[5m])) / on (f) group_left () f:b:rate5m', {"a_total", "f:b:rate5m"}),
        ("histogram_quantile(0.99, sum by (le) (rate(vllm:x_bucket[1m])))", {"vllm:x_bucket"}),
        ('time() - max by (e) (a_seconds{z="1"}) > 120 and on (e) b > 0 or 1e3 * c offset 1h', {"a_seconds", "b", "c"}),
    ],
)  # fmt: skip
def test_names_of_series_are_found_in_queries(query: str, expected: set[str]) -> None:
    assert names(query) == expected


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus (.ci/run has it)")
def test_every_query_parses(tmp_path: Path) -> None:
    queries = [query for _, query in panel_queries()] + [filled(a["expr"]) for a in DASHBOARD["annotations"]["list"]]
    found = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": found}]}), "utf-8")
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "queries.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_panel_is_described_and_reads_the_chosen_server() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count('job=~"$job",instance=~"$instance"') >= len(names(filled(target["expr"])))
            assert target["legendFormat"]


def test_panels_do_not_overlap() -> None:
    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in (("x", "w"), ("y", "h")))

    places = {panel["title"]: panel["gridPos"] for panel in DASHBOARD["panels"]}
    assert not [(a, b) for a, b in combinations(places, 2) if overlap(places[a], places[b])]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places.values())
    assert all(place["w"] >= 1 and place["h"] >= 1 for place in places.values())


def test_rows_are_open_and_as_wide_as_the_page() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert len(rows) > 3
    assert [row["title"] for row in rows if row["collapsed"] or row["panels"] or row["gridPos"]["w"] != 24] == []
    tops = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"]]
    assert tops == sorted(tops)


def test_every_used_variable_is_defined() -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert used - known == {"__rate_interval", "__all"}  # Grafana's own
    assert known - used == set()


def test_panels_have_valid_display_options() -> None:
    for panel in panels():
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), title
        if steps := defaults.get("thresholds", {}).get("steps"):
            assert steps[0]["value"] is None, title  # the colour below all steps
            assert [s["value"] for s in steps[1:]] == sorted(s["value"] for s in steps[1:]), title
        if panel["type"] == "heatmap":  # otherwise each bucket is drawn as a line
            assert {target["format"] for target in panel["targets"]} == {"heatmap"}, title
    (versions,) = (panel for panel in panels() if panel["title"] == "Versions")
    assert versions["options"]["textMode"] == "name"  # its name is the version, its value the number of servers


def test_labels_in_a_legend_are_kept_by_its_query() -> None:
    assert len(legends()) > 10
    for query, labels in legends():
        if groups := re.findall(r"\bby \(([^)]*)\)", query):
            kept = set.intersection(*({name.strip() for name in group.split(",")} for group in groups))
            assert labels <= kept, query


def test_variables_offer_the_values_of_a_label_of_every_server() -> None:
    assert variable_queries() == {
        "job": ("rtap_build_info", "job"),
        "instance": ('rtap_build_info{job=~".*"}', "instance"),
    }


def test_provisioning_finds_the_dashboard_and_prometheus() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text("utf-8"))["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/rtap.yml").read_text("utf-8"))["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
    (variable, *others) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["query"]) == ("datasource", "prometheus")
    assert [other["name"] for other in others] == ["job", "instance"]
