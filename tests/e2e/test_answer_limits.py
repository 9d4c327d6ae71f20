"""Stops, `min_tokens` and `thinking_token_budget` apply to answers and trajectories, not to the text of a cycle.

The bundled policy answers with the thought `25*3=75 75+7=82` and `25*3+7`.
"""

from typing import Any

import httpx
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = "make 82 from 3, 7, 25"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
THINK, CLOSE = "25*3=75 75+7=82", 447  # `</answer>`
TWO_CYCLES = {"policy": "confidence", "threshold": 1.0, "max_cycles": 2}


def _post(server: Any, path: str, **fields: Any) -> httpx.Response:
    asked = {"messages": [{"role": "user", "content": QUESTION}]} if path == CHAT else {"prompt": PROMPT}
    body = {"model": "rtap", "temperature": 0, "max_tokens": 300} | asked | fields
    return httpx.post(server.url + path, json=body, timeout=60)


def _streamed(server: Any, **fields: Any) -> tuple[str, str, str | None, Any]:
    asked = {"model": "rtap", "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
    extra = {name: fields.pop(name) for name in ("rtap", "stop_token_ids", "include_stop_str_in_output")
             if name in fields}  # fmt: skip
    reasoning, content, finish_reason, stop_reason = "", "", None, None
    for chunk in server.client.chat.completions.create(**asked, **fields, stream=True, extra_body=extra):
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            content += choice.delta.content or ""
            finish_reason = choice.finish_reason or finish_reason
            stop_reason = getattr(choice, "stop_reason", None) or stop_reason
    return reasoning, content, finish_reason, stop_reason


def _whole(server: Any, **fields: Any) -> tuple[str, str, str, Any]:
    (choice,) = _post(server, CHAT, **fields).json()["choices"]
    message = choice["message"]
    return message["reasoning"], message["content"], choice["finish_reason"], choice["stop_reason"]


@pytest.mark.parametrize("ask", [_whole, _streamed])
@pytest.mark.parametrize(
    "fields",
    [
        {"stop": "="},
        {"stop": ["</think>", "<", "answer>25", "7</answer>"]},
        {"stop": "75", "include_stop_str_in_output": True},
        {"stop_token_ids": [445, 446, CLOSE]},
    ],
)
def test_what_is_no_part_of_an_answer_stops_nothing(server, fields, ask):
    assert ask(server, rtap=TWO_CYCLES, **fields) == ask(server, rtap=TWO_CYCLES)


@pytest.mark.parametrize("ask", [_whole, _streamed])
@pytest.mark.parametrize(
    ("fields", "content", "stop"),
    [
        ({"stop": "7"}, "25*3+", "7"),
        ({"stop": ["7", "3+"]}, "25*", "3+"),
        ({"stop": "3+", "include_stop_str_in_output": True}, "25*3+", "3+"),
        ({"stop_token_ids": [25]}, "25*3+", 25),  # the token "7"
    ],
)
@pytest.mark.parametrize(
    "rtap", [{"policy": "single"}, {"policy": "model"}, {"policy": "vote", "samples": 2}, TWO_CYCLES]
)
def test_a_stop_ends_the_answer_of_every_policy(server, rtap, fields, content, stop, ask):
    reasoning, *answered = ask(server, rtap=rtap, **fields)
    assert reasoning.startswith(THINK)
    assert answered == [content, "stop", stop]


def test_the_text_of_a_completion_ends_at_a_stop(server):
    for fields, text, stop in (
        ({"stop": "="}, "<think>25*3", "="),
        ({"stop": "7</answer>"}, f"<think>{THINK}</think><answer>25*3+", "7</answer>"),
        ({"stop_token_ids": [CLOSE]}, f"<think>{THINK}</think><answer>25*3+7", CLOSE),
    ):
        reply = _post(server, COMPLETIONS, rtap={"policy": "confidence", "threshold": 1.0}, **fields).json()
        (choice,) = reply["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop)
        assert (reply["rtap"]["stop_reason"], len(reply["rtap"]["cycles"])) == ("model", 1)


@pytest.mark.parametrize(("budget", "thoughts"), [(0, [""]), (5, ["25*3="]), (18, [THINK, "Let me check"])])
def test_cycles_share_a_thinking_budget(server, budget, thoughts):
    """The first thought has 15 tokens."""
    rtap = TWO_CYCLES | {"max_cycles": 4, "return_cycles": True}
    trajectory = _post(server, CHAT, thinking_token_budget=budget, rtap=rtap).json()["rtap"]
    assert [cycle["think"] for cycle in trajectory["cycles"]] == thoughts
    assert trajectory["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_min_tokens_is_refused_where_it_would_mask_the_end_of_an_answer(server, path):
    reply = _post(server, path, min_tokens=60)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "min_tokens")
    assert _post(server, path, min_tokens=0).status_code == 200
