"""Telemetry of a live server: spans at an OTLP receiver, the log, and series in a real Prometheus."""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.deploy.promql import RULES, legends, names, panel_queries, rules, variable_queries
from tests.e2e.conftest import Running, free_port, running
from tests.error_shapes import error_of

SECRET = "key-team"
CANARY = "zebra-9f3e7c1b"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {
    "model": "rtap",
    "messages": [{"role": "user", "content": f"make 82 from 3, 7, 25 {CANARY}"}],
    "rtap": {"threshold": 1.0, "max_cycles": 2},
}


def _chat(server: Running, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    sent = {"authorization": f"Bearer {SECRET}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body or CHAT, headers=sent, timeout=60)


def _lines(server: Running) -> list[dict[str, Any]]:
    """Log lines of requests."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["name"] == "rtap.requests"]


def _line(server: Running, request_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while True:
        found = [line for line in _lines(server) if line["request_id"] == request_id]
        if found or time.monotonic() > deadline:
            (line,) = found
            return line
        time.sleep(0.05)


def test_cycles_are_child_spans_of_the_request_and_parents_of_the_engines(operated, receiver):
    question = [{"role": "user", "content": "make 82 from 3, 7, 25"}]
    reply = _chat(operated, CHAT | {"messages": question, "seed": 7}, traceparent=PARENT)
    rtap, trace = reply.json()["rtap"], PARENT.split("-")[1]
    assert len(rtap["cycles"]) == 2
    spans = receiver[0].of_trace(trace)
    assert Counter(s["name"] for s in spans) == {"invoke_workflow rtap": 1, "chat rtap": 2, "llm_request": 2}
    assert {s["service"] for s in spans} == {"rtap"}
    (whole,) = (s for s in spans if s["name"] == "invoke_workflow rtap")
    cycles = sorted((s for s in spans if s["name"] == "chat rtap"), key=lambda s: s["start"])
    assert whole["parent"] == PARENT.split("-")[2]
    assert reply.headers["traceparent"] == f"00-{trace}-{whole['id']}-01"
    assert whole["values"] == {
        "gen_ai.operation.name": "invoke_workflow", "gen_ai.agent.name": "rtap", "gen_ai.request.model": "rtap",
        "gen_ai.request.choice.count": 1, "gen_ai.usage.input_tokens": reply.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": reply.json()["usage"]["completion_tokens"],
        "gen_ai.usage.reasoning.output_tokens":
            reply.json()["usage"]["completion_tokens_details"]["reasoning_tokens"],
        "rtap.policy": "confidence", "rtap.stop_reason": rtap["stop_reason"], "rtap.num_cycles": 2,
        "rtap.confidence": rtap["confidence"],
        "rtap.selected_cycle": [c["accepted"] for c in rtap["cycles"]].index(True),
        "rtap.first_answer_seconds": pytest.approx(rtap["first_answer_seconds"], abs=1e-5),
        "rtap.oops_tokens": sum(c["oops_tokens"] for c in rtap["cycles"]),
        "rtap.discarded_tokens": rtap["discarded_tokens"], "http.response.status_code": 200,
    }  # fmt: skip
    for span, cycle in zip(cycles, rtap["cycles"], strict=True):
        assert span["parent"] == whole["id"]
        assert span["values"]["rtap.cycle.index"] == cycle["index"]
        assert span["values"]["rtap.cycle.confidence"] == cycle["confidence"]
        assert span["values"]["gen_ai.usage.output_tokens"] == cycle["tokens"]
        assert (span["end"] - span["start"]) / 1e9 == pytest.approx(cycle["seconds"], abs=1e-3)
        assert whole["start"] <= span["start"] <= span["end"] <= whole["end"]
    work = [s["parent"] for s in spans if s["name"] == "llm_request"]
    assert sorted(work) == sorted(s["id"] for s in cycles)


def test_every_choice_has_cycle_spans_and_spans_end_when_the_client_leaves(operated, receiver):
    trace = _chat(operated, CHAT | {"n": 2}).headers["traceparent"].split("-")[1]
    cycles = [s for s in receiver[0].of_trace(trace) if s["name"] == "chat rtap"]
    assert sorted((s["values"]["rtap.choice"], s["values"]["rtap.cycle.index"]) for s in cycles) == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    body = CHAT | {"stream": True, "ignore_eos": True, "rtap": {"threshold": 1.0, "max_cycles": 16}}
    headers = {"authorization": f"Bearer {SECRET}", "x-request-id": "leaver"}
    with httpx.stream("POST", f"{operated.url}/v1/chat/completions", json=body, headers=headers) as reply:
        trace = reply.headers["traceparent"].split("-")[1]
        next(reply.iter_lines())
    spans = receiver[0].of_trace(trace)
    (whole,) = (s for s in spans if s["name"] == "invoke_workflow rtap")
    assert whole["values"]["rtap.stop_reason"] == "abandoned"
    assert any(s["values"].get("rtap.cycle.discarded") for s in spans)
    line = _line(operated, "leaver")
    assert (line["stop_reason"], line["status"], line["trace_id"]) == ("abandoned", 200, trace)


def test_a_request_is_one_log_line_with_its_request_id(operated):
    reply = _chat(operated, x_request_id="abc-1")
    body, line = reply.json(), _line(operated, "abc-1")
    assert reply.headers.get_list("x-request-id") == ["abc-1"]
    assert "abc-1" not in body["id"]  # ids of replies are unique, whatever clients send
    assert {name: line[name] for name in ("method", "route", "status", "key", "model", "levelname", "message")} == {
        "method": "POST", "route": "/v1/chat/completions", "status": 200, "key": "team", "model": "rtap",
        "levelname": "INFO", "message": "POST /v1/chat/completions 200",
    }  # fmt: skip
    assert (line["policy"], line["stop_reason"], line["cycles"]) == ("confidence", "max_cycles", 2)
    assert line["tokens"] == body["usage"]["completion_tokens"]
    assert line["confidence"] == body["rtap"]["confidence"]
    assert line["seconds"] >= line["first_answer_seconds"] > 0


def test_refused_requests_are_logged_without_the_clients_text(operated):
    httpx.get(f"{operated.url}/v1/{CANARY}?api_key={SECRET}", headers={"authorization": f"Bearer {SECRET}"})
    unknown = _chat(operated, CHAT | {"model": "no-such"}, x_request_id="x y\tz")
    assert unknown.status_code == 404
    (request_id,) = unknown.headers.get_list("x-request-id")
    assert len(request_id) == 32  # the client's is not a plain word
    line = _line(operated, request_id)
    assert (line["status"], line["route"], "model" in line) == (404, "/v1/chat/completions", False)
    refused = httpx.post(f"{operated.url}/v1/chat/completions", json=CHAT, headers={"x-request-id": "nobody"})
    assert refused.status_code == 401
    line = _line(operated, "nobody")
    assert (line["status"], line["route"], "key" in line) == (401, "/v1/chat/completions", False)


# Native grammar libraries quote parts of these in warnings.
SCHEMAS = (
    {"$ref": CANARY},
    {"$ref": f"#/{CANARY}"},
    {"type": CANARY},
    {"type": "string", "pattern": f"({CANARY}"},
    {"type": "string", "format": CANARY},
    {"type": "object", "patternProperties": {f"^{CANARY}[": {}}},
)


def test_logs_metrics_and_spans_have_no_text_of_requests_and_no_keys(operated, receiver):
    """By every path, good and bad."""
    chat = CHAT | {"max_tokens": 60}
    asked = [
        ("/v1/chat/completions", chat), ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/messages", chat), ("/v1/messages", chat | {"stream": True}),
        ("/v1/completions", {"model": "rtap", "prompt": CANARY, "max_tokens": 40}),
        ("/v1/responses", {"model": "rtap", "input": CANARY, "max_output_tokens": 40}),
        ("/v1/messages/count_tokens", chat), ("/tokenize", {"model": "rtap", "prompt": CANARY}),
        ("/v1/rtap/score", {"question": CANARY, "think": CANARY, "answer": CANARY}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"regex": f"({CANARY}"}}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"grammar": f"root ::= {CANARY}"}}),
        ("/v1/chat/completions", chat | {"temperature": CANARY}),
        ("/v1/chat/completions", chat | {"stop": {"a": CANARY}}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": [{"type": CANARY}]}]}),
        ("/v1/completions", {"model": "rtap", "prompt": f"{CANARY} " * 3000}),
        ("/v1/responses", {"model": "rtap", "input": [{"role": "user", "content": [{"type": CANARY}]}]}),
        ("/v1/messages", chat | {"max_tokens": CANARY}), ("/detokenize", {"model": "rtap", "tokens": [CANARY]}),
        ("/v1/rtap/feedback", {"request_id": CANARY, "correct": True}), ("/v1/rtap/score", {"question": CANARY}),
    ]  # fmt: skip
    statuses = Counter[bool]()
    for path, body in asked:
        url, headers = f"{operated.url}{path}?key={SECRET}&said={CANARY}", {"x-api-key": SECRET}
        reply = httpx.post(url, json=body, headers=headers, timeout=60)
        statuses[reply.status_code == 200] += 1
        if reply.status_code != 200:
            assert error_of(path, reply.json())
            assert reply.headers["x-request-id"]
    assert statuses == {True: 9, False: 11}
    for schema in SCHEMAS:
        grammar = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert _chat(operated, chat | {"response_format": grammar}).status_code in (200, 400)
    answer = _chat(operated).json()["choices"][0]["message"]["content"]
    metrics = httpx.get(f"{operated.url}/metrics", headers={"x-api-key": "key-scrape"}).text
    log, sent = operated.log.read_text(), b"".join(receiver[0].bodies)
    for word in (CANARY, SECRET, "key-scrape", answer):
        assert word not in log
        assert word.encode() not in sent
    for word in (CANARY, SECRET, "key-scrape"):
        assert word not in metrics


def test_every_log_line_is_json(operated):
    """From readiness on: while starting, libraries print past all loggers."""
    assert httpx.get(f"{operated.url}/live").status_code == 200
    lines = operated.log.read_text().splitlines()
    ready = next(number for number, line in enumerate(lines) if "ready at" in line)
    records = [json.loads(line) for line in (*(line for line in lines[:ready] if line.startswith("{")), *lines[ready:])]
    assert all({"asctime", "levelname", "name", "process", "message"} <= record.keys() for record in records)
    assert {"rtap", "rtap.requests", "uvicorn.error"} <= {record["name"] for record in records}
    assert any(record["name"].startswith("vllm") for record in records)
    assert not [line for line in _lines(operated) if line["route"] in ("/live", "/ready")]


CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}/*.yml"]
scrape_configs:
  - job_name: rtap
    static_configs: [{{targets: ["{target}"]}}]
"""


@dataclass
class Prometheus:
    """A Prometheus that scrapes a server every second."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=20).json()
        assert reply["status"] == "success", (parameters, reply)
        return reply["data"]

    def values(self, query: str) -> list[float]:
        """What a query finds, but for NaN, which says that there is nothing to tell."""
        found = self.ask("query", query=query)["result"]
        return [value for series in found if not math.isnan(value := float(series["value"][1]))]

    def unlabelled(self, query: str, labels: set[str]) -> list[set[str]]:
        """The labels missing from each series of a query's result, complete series left out."""
        found = self.ask("query", query=query)["result"]
        return [lacking for series in found if (lacking := labels - series["metric"].keys())]


@pytest.fixture
def prometheus(server, tmp_path) -> Iterator[Prometheus]:
    (tmp_path / "rules").mkdir()
    for path in RULES.glob("*.yml"):
        (tmp_path / "rules" / path.name).write_text(path.read_text("utf-8").replace("interval: 30s", "interval: 1s"))
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(rules=tmp_path / "rules", target=server.url.removeprefix("http://")))
    port = free_port()
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with running(command, port, "/-/ready", tmp_path) as started:
        found = Prometheus(started.url)
        _until(lambda: found.values('up{job="rtap"}') == [1.0])
        yield found


def _until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _traffic(server: Running, votes: int) -> None:
    """Requests that give every series a value: cycles, verdicts, a vote's many first cycles, a refusal."""
    question = [{"role": "user", "content": "make 82 from 3, 7, 25"}]
    asked = [{"threshold": 1.0, "max_cycles": 4}, {"threshold": 0.0}, {"policy": "model"}]
    asked += [{"policy": "vote", "samples": 32, "threshold": 1.0}] * votes
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for rtap in asked:
            reply = client.post("/v1/chat/completions", json={"model": "rtap", "messages": question, "rtap": rtap})
            assert reply.status_code == 200, reply.text
            verdict = {"request_id": reply.json()["id"], "correct": bool(rtap.get("threshold"))}
            assert client.post("/v1/rtap/feedback", json=verdict).status_code == 200
        wrong = {"model": "rtap", "messages": question, "rtap": {"policy": "sure"}}
        assert client.post("/v1/chat/completions", json=wrong).status_code == 400


def test_dashboard_and_rules_read_series_that_a_server_has(server):
    _traffic(server, votes=1)
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    read = {name for _, query in panel_queries() for name in names(query)}
    read |= {name for rule in rules() for name in names(rule["expr"])}
    assert read - recorded - set(server.metrics()) <= {"up"}  # Prometheus' own


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt-get install it (.ci/run has it)")
def test_every_query_of_dashboard_and_rules_has_a_value(server, prometheus):
    for _ in range(2):  # a series has a rate only once it has been seen before
        _traffic(server, votes=4)
        finished = server.metrics()["rtap_requests_total"]
        _until(lambda known=finished: sum(prometheus.values("rtap_requests_total")) == known)
    _until(lambda: bool(prometheus.values("job:rtap_time_to_first_answer_seconds:p99_rate10m")))
    exposed = set(prometheus.ask("label/__name__/values"))
    expected = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    missing = {name for _, query in (*panel_queries(), *expected) for name in names(query)} - exposed
    assert not missing
    empty = [title for title, query in panel_queries() if not prometheus.values(query)]
    assert not empty
    assert {query: lacking for query, labels in legends() if (lacking := prometheus.unlabelled(query, labels))} == {}
    target = server.url.removeprefix("http://")
    for name, (series, label) in variable_queries().items():
        offered = prometheus.ask(f"label/{label}/values", **{"match[]": series})
        assert offered == [{"job": "rtap", "instance": target}[name]]
    unrecorded = [rule["record"] for rule in rules() if "record" in rule and not prometheus.values(rule["record"])]
    assert not unrecorded
    loaded = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert sorted(rule["name"] for rule in loaded) == sorted(name for name, _ in expected)
    assert {rule["name"]: rule["lastError"] for rule in loaded if rule["health"] != "ok"} == {}
    assert not [rule["name"] for rule in loaded if rule.get("state") == "firing"]


def test_names_that_clients_invent_create_no_series(server):
    """Of models, paths, methods and ids."""

    def ask(number: int) -> None:
        body = {"model": f"model-{number}", "messages": [{"role": "user", "content": "x"}], "rtap": {"max_cycles": 1}}
        headers = {"x-request-id": f"id-{number}"}
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
            httpx.post(server.url + path, json=body | {"prompt": "x", "input": "x", "max_tokens": 1}, headers=headers)
        httpx.get(f"{server.url}/path-{number}")
        for path in ("/v1/models", f"/path-{number}"):
            httpx.request(f"METHOD{number}", server.url + path)

    ask(0)
    before = set(server.metrics())
    for number in range(1, 10):
        ask(number)
    assert set(server.metrics()) == before
