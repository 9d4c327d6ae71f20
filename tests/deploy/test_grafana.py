"""The dashboard and its provisioning without a Grafana: every query parses, panels have what a reader needs, and files
meet where deploy/compose mounts them. Against a live server: tests/e2e/test_observability.py."""

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
UNITS = {"short", "reqps", "percentunit", "s", "bytes"}  # ids that Grafana knows; others it prints behind the figure


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


def test_every_panel_says_what_it_shows_and_reads_the_chosen_server() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count('job=~"$job",instance=~"$instance"') >= len(names(filled(target["expr"])))
            assert target["legendFormat"]


def test_no_panel_lies_on_another() -> None:
    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in (("x", "w"), ("y", "h")))

    places = {panel["title"]: panel["gridPos"] for panel in DASHBOARD["panels"]}
    assert not [(a, b) for a, b in combinations(places, 2) if overlap(places[a], places[b])]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places.values())
    assert all(place["w"] >= 1 and place["h"] >= 1 for place in places.values())


def test_rows_are_open_and_as_wide_as_the_page() -> None:
    """A closed row holds its panels itself; those below an open one are beside it in the list."""
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert len(rows) > 3
    assert [row["title"] for row in rows if row["collapsed"] or row["panels"] or row["gridPos"]["w"] != 24] == []
    tops = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"]]
    assert tops == sorted(tops)


def test_every_variable_that_is_used_is_one() -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert used - known == {"__rate_interval", "__all"}  # Grafana's own
    assert known - used == set()


def test_panels_are_drawn_as_they_are_meant() -> None:
    for panel in panels():
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), title
        if steps := defaults.get("thresholds", {}).get("steps"):
            assert steps[0]["value"] is None, title  # the colour of what is below all
            assert [s["value"] for s in steps[1:]] == sorted(s["value"] for s in steps[1:]), title
        if panel["type"] == "heatmap":  # else buckets are taken for so many lines
            assert {target["format"] for target in panel["targets"]} == {"heatmap"}, title
    (versions,) = (panel for panel in panels() if panel["title"] == "Versions")
    assert versions["options"]["textMode"] == "name"  # its value is the number of servers, its name what runs


def test_what_a_legend_names_is_in_the_query() -> None:
    """Where labels are summed up, by name; what a live server then answers: tests/e2e/test_observability.py."""
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


def test_what_was_asked_for_is_on_it() -> None:
    shown = set[str]().union(*(names(query) for _, query in panel_queries()))
    assert {
        "rtap_oops_tokens_total", "rtap_reasoning_tokens_total", "rtap_cycles_bucket", "rtap_cycle_confidence_sum",
        "rtap_cycle_confidence_bucket", "rtap_calibration_brier", "rtap_calibration_ece", "rtap_confidence_drift",
        "rtap_requests_total", "rtap_cycles_avoided_total", "rtap_time_to_first_answer_seconds_bucket",
        "rtap_request_seconds_bucket", "rtap_cycle_seconds_bucket", "vllm:time_to_first_token_seconds_bucket",
        "rtap_cached_tokens_total", "rtap_rejected_total", "rtap_in_flight", "rtap_engine_up", "rtap_degraded_total",
        "vllm:num_requests_running", "vllm:num_requests_waiting_by_reason", "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:num_preemptions_total",
    } <= shown  # fmt: skip


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
