"""A short round of `make fuzz` on the shared server: requests that /openapi.json allows, and some it does not."""

import time
from collections import Counter

import httpx
import pytest

from rtap_server.http.route_kinds import RECURSIVE_PATHS
from tests.stress import fuzz


@pytest.mark.slow
def test_no_fuzzed_request_gets_a_5xx_and_the_server_still_works(server):
    before = fuzz.engines_of(server.url)
    report = fuzz.fuzz(server.url, seconds=0, examples=5, seed=0, log_line=print)
    assert not report.findings
    assert fuzz.still_works(server.url, before) is None

    seen = Counter((operation, mode, status[0]) for operation, mode, status in report.replies)
    document = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    offered = {f"{method.upper()} {path}" for path, methods in document.items() for method in methods}
    tried = {operation for operation, _, _ in seen}
    assert tried == {one for one in offered if one.partition(" ")[2] not in fuzz.EXCLUDED}
    for path in RECURSIVE_PATHS:
        assert seen[f"POST {path}", fuzz.SERVED, "2"], f"{path}: no fuzzed request came through to the model"
        assert seen[f"POST {path}", "negative", "4"]
        assert seen[f"POST {path}", fuzz.CONSTRAINED, "4"]


WORDS = [f"word{i}" for i in range(49_000)]
HOSTILE = {
    "an enum of 49,000 values": {"json": {"enum": WORDS}},
    "30,000 alternatives": {"regex": "|".join(WORDS[:30_000])},
    "49,000 choices": {"choice": WORDS},
    "a reference to itself": {"json": {"$ref": "#"}},
    "a rule that is itself": {"grammar": "root ::= root"},
    "a wrong pattern": {"json": {"type": "object", "patternProperties": {"^C[": {}}}},
    "a million repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000000}"},
    "a forged log record": {"json": {"$ref": '#/\n{"levelname": "ERROR", "message": "forged"}'}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_and_delays_no_other(server, name):
    chat = {"model": "rtap", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 30}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={**chat, "structured_outputs": HOSTILE[name]})
    assert reply.status_code == 400, reply.text
    began = time.monotonic()
    good = httpx.post(f"{server.url}/v1/chat/completions", json={**chat, "structured_outputs": {"regex": "[0-9]+"}})
    assert good.status_code == 200, good.text
    assert time.monotonic() - began < 2
    assert not [line for line in server.log.read_text("utf-8").splitlines() if line.startswith('{"levelname')]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("value", ["x", 1, ["x"]])
def test_transfer_parameters_of_a_wrong_type_are_refused(server, name, value):
    for path, question in (
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("responses", {"input": "x"}),
    ):
        body = {"model": "rtap", **question, "vllm_xargs": {name: value}}
        assert httpx.post(f"{server.url}/v1/{path}", json=body).status_code == 400
