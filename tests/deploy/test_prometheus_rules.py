"""Every alert under `promtool test rules`: series on which it fires, and similar series on which it does not."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rtap_server.telemetry.metrics import Metrics
from tests.deploy.promql import ROOT, RULES, names, rules

GLOSSARY = ROOT / "docs" / "observability.md"
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in rules() if "alert" in rule}
SERVER = 'job="rtap",instance="a"'
CHAT = f'http_requests_total{{{SERVER},handler="/v1/chat/completions",method="POST",status="%s"}}'
REQUESTS = f'rtap_requests_total{{{SERVER},policy="confidence",stop_reason="%s"}}'
Series = dict[str, str]
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus (.ci/run has it)"
)


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation, their interval, and the time of the check."""

    fires: Series
    quiet: Series
    at: str = "1h"
    interval: str = "1m"


def _first_answers(at_most_50: str, at_most_100: str) -> Series:
    name = f'rtap_time_to_first_answer_seconds_bucket{{{SERVER},le="%s"}}'
    return {name % "50": at_most_50, name % "100": at_most_100, name % "+Inf": at_most_100}


def _doubt(oops: str) -> Series:
    return {
        f'rtap_oops_tokens_total{{{SERVER},cycle="2",accepted="true"}}': oops,
        f'rtap_reasoning_tokens_total{{{SERVER},cycle="2",accepted="true"}}': "0+1000x400",
    }


def _calibration(ece: str, verdicts: str) -> Series:
    return {f"rtap_calibration_ece{{{SERVER}}}": ece, f"rtap_calibration_verdicts{{{SERVER}}}": verdicts}


def _progress(in_flight: str, stamp: str) -> Series:
    engine = f'rtap_engine_last_progress_timestamp_seconds{{{SERVER},engine="%s"}}'
    return {f"rtap_in_flight{{{SERVER}}}": in_flight, engine % "policy": stamp, engine % "confidence": "0x70"}


CASES = {
    "RtapServerDown": Case({f"up{{{SERVER}}}": "1x50 0x20"}, {f"up{{{SERVER}}}": "1x58 0 1x20"}),
    "RtapEngineDown": Case(
        {f'rtap_engine_up{{{SERVER},engine="policy"}}': "1x50 0x20"},
        {f'rtap_engine_up{{{SERVER},engine="policy"}}': "1x59 0 1x20"},
    ),
    "RtapEngineRestarting": Case(
        {f'rtap_engine_restarts_total{{{SERVER},engine="policy"}}': "0x10 1x10 2x10 4x40"},
        {f'rtap_engine_restarts_total{{{SERVER},engine="policy"}}': "0x30 2x40"},
    ),
    "RtapNoProgress": Case(
        _progress("0x30 2x40", "0+60x40 2400x30"),
        _progress("0x40 0x40", "0+60x40 2400x30"),  # as old, but nothing to do
    ),
    "RtapErrorBudgetBurnFast": Case(
        {CHAT % "2xx": "0+98x70", CHAT % "5xx": "0+2x70"},
        {CHAT % "2xx": "0+98x70", CHAT % "5xx": "0+2x50 100x20"},  # over, but for the long window
    ),
    "RtapErrorBudgetBurnSlow": Case(
        {CHAT % "2xx": "0+990x100", CHAT % "5xx": "0+10x100"},
        {CHAT % "2xx": "0+999x100", CHAT % "5xx": "0+1x100"},  # what the budget is for
        at="7h",
        interval="5m",
    ),
    "RtapFirstAnswerSlow": Case(_first_answers("0+97x70", "0+100x70"), _first_answers("0+100x70", "0+100x70")),
    "RtapOopsRateJump": Case(_doubt("0+2x300 602+10x40"), _doubt("0+2x300 602+3x40"), at="26h40m", interval="5m"),
    "RtapConfidenceDrift": Case(
        {f"rtap_confidence_drift{{{SERVER}}}": "0.4x70"}, {f"rtap_confidence_drift{{{SERVER}}}": "0.2x70"}
    ),
    "RtapMiscalibrated": Case(_calibration("0.3x70", "500x70"), _calibration("0.3x70", "20x70")),
    "RtapStoppingNotWorking": Case(
        {REQUESTS % "max_cycles": "0+6x70", REQUESTS % "threshold": "0+4x70"},
        {REQUESTS % "max_cycles": "0+4x70", REQUESTS % "threshold": "0+6x70"},
    ),
    "RtapShedding": Case(
        {
            CHAT % "5xx": "0+5x70",
            CHAT % "2xx": "0+95x70",
            f'rtap_rejected_total{{{SERVER},reason="overloaded"}}': "0+5x70",
        },
        {
            CHAT % "4xx": "0+5x70",
            CHAT % "2xx": "0+95x70",
            f'rtap_rejected_total{{{SERVER},reason="invalid"}}': "0+5x70",
        },
    ),
    "RtapClientsLeaving": Case(
        {REQUESTS % "abandoned": "0+2x70", REQUESTS % "threshold": "0+8x70"},
        {REQUESTS % "abandoned": "0+1x70", REQUESTS % "threshold": "0+19x70"},
    ),
    "RtapDegraded": Case(
        {f'rtap_degraded_total{{{SERVER},reason="timeout"}}': "0+1x70", REQUESTS % "model": "0+10x70"},
        {f'rtap_degraded_total{{{SERVER},reason="timeout"}}': "0+1x70", REQUESTS % "model": "0+30x70"},
    ),
    "RtapKvCachePressure": Case(
        {f"vllm:kv_cache_usage_perc{{{SERVER}}}": "0.95x70"},
        {f"vllm:kv_cache_usage_perc{{{SERVER}}}": "0.95x55 0.5 0.95x20"},
    ),
    "RtapPreemptions": Case(
        {f"vllm:num_preemptions_total{{{SERVER}}}": "0+3x70"}, {f"vllm:num_preemptions_total{{{SERVER}}}": "0x10 5x70"}
    ),
}


def _promtool(folder: Path, alert: str, *cases: tuple[Series, bool]) -> str:
    """promtool's output where the alert does not fire as expected, else an empty string."""
    case = CASES[alert]
    query = f'count by (alertname) (ALERTS{{alertname="{alert}",alertstate="firing"}})'
    firing = [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
    test = {
        "rule_files": [str(path) for path in sorted(RULES.glob("*.yml"))],
        "evaluation_interval": case.interval,
        "tests": [
            {
                "interval": case.interval,
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": query, "eval_time": case.at, "exp_samples": firing if fires else []}],
            }
            for series, fires in cases
        ],
    }
    file = folder / "case.yml"
    file.write_text(json.dumps(test), "utf-8")  # JSON is YAML
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", list(ALERTS))
def test_an_alert_fires_only_when_it_should(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    assert not _promtool(tmp_path, alert, (case.fires, True), (case.quiet, False))


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    command = ["promtool", "check", "rules", "--lint-fatal", *sorted(RULES.glob("*.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("alert", list(ALERTS))
def test_an_alert_has_a_severity_and_a_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert "{{ $" in rule["annotations"]["summary"]
    assert rule["annotations"]["runbook"] == f"docs/observability.md#{alert.lower()}"
    assert f"\n### {alert}\n" in GLOSSARY.read_text("utf-8")


def test_every_series_is_documented() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    ours = {f"{family.name}_total" if family.type == "counter" else family.name for family in registry.collect()}
    documented = re.findall(r"^\| `(rtap_\w+)", GLOSSARY.read_text("utf-8"), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert ours <= set(documented)
    read = {name for rule in rules() for name in names(rule["expr"]) if name.startswith("rtap_")}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in read} <= set(documented)
