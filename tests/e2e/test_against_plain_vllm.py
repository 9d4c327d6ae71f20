"""Policy `single` against plain `vllm serve` with the same model and flags."""

import json

import httpx
import pytest

from rtap_core.format import RTAP
from tests.e2e.conftest import side_by_side
from tests.e2e.questions import questions

QUESTIONS = questions(12)


def _stop_ids(plain) -> list[int]:
    tokens = httpx.post(f"{plain.url}/tokenize", json={"prompt": "</answer>", "add_special_tokens": False}).json()
    assert len(tokens["tokens"]) == 1
    return tokens["tokens"]


def _body(question: str, **extra):
    return {"model": "rtap", "messages": [{"role": "user", "content": question}], "temperature": 0} | extra


def _post(started, body) -> dict:
    return httpx.post(f"{started.url}/v1/chat/completions", json=body, timeout=60).json()


def _stream_text(url: str, body) -> tuple[str, str, str | None, dict]:
    """(reasoning, content, finish_reason, usage) of a streamed reply."""
    reasoning, content, finish, usage = "", "", None, {}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | options, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    reasoning += choice["delta"].get("reasoning") or ""
                    content += choice["delta"].get("content") or ""
                    finish = choice["finish_reason"] or finish
    return reasoning, content, finish, usage


@pytest.fixture(scope="module")
def stop(plain):
    return {"stop_token_ids": _stop_ids(plain), "include_stop_str_in_output": True}


def test_same_text_finish_reason_and_usage(server, plain, stop):
    for question in QUESTIONS:
        ours, reference = side_by_side(
            lambda q=question: _post(server, _body(q, rtap={"policy": "single"})),
            lambda q=question: _post(plain, _body(q, **stop)),
        )
        message, choice = ours["choices"][0]["message"], reference["choices"][0]
        assert RTAP.render_cycle(message["reasoning"], message["content"]) == choice["message"]["content"]
        assert ours["choices"][0]["finish_reason"] == choice["finish_reason"]
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert ours["usage"][key] == reference["usage"][key]


def test_same_when_streamed(server, plain, stop):
    for question in QUESTIONS:
        ours, reference = side_by_side(
            lambda q=question: _stream_text(server.url, _body(q, rtap={"policy": "single"})),
            lambda q=question: _stream_text(plain.url, _body(q, **stop)),
        )
        reasoning, content, finish, usage = ours
        _, text, reference_finish, reference_usage = reference
        assert RTAP.render_cycle(reasoning, content) == text
        assert finish == reference_finish
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert usage[key] == reference_usage[key]


def test_same_when_cut_by_max_tokens(server, plain, stop):
    for max_tokens in (1, 5, 9, 200):
        ours = httpx.post(
            f"{server.url}/v1/completions",
            json={
                "model": "rtap",
                "prompt": "12*9",
                "max_tokens": max_tokens,
                "temperature": 0,
                "rtap": {"policy": "single"},
            },
        ).json()
        reference = httpx.post(
            f"{plain.url}/v1/completions",
            json={"model": "rtap", "prompt": "12*9", "max_tokens": max_tokens, "temperature": 0} | stop,
        ).json()
        for key in ("text", "finish_reason"):
            assert ours["choices"][0][key] == reference["choices"][0][key]
        assert ours["usage"]["completion_tokens"] == reference["usage"]["completion_tokens"]
