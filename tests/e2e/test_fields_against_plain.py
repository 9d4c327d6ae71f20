"""Every request field has plain `vllm serve`'s meaning: policy `single` against the same model.

Plain vLLM gets the end of a cycle, `</answer>`, as a stop token and returns the tags as text; `rtap serve` splits that
text into reasoning and content. Tags are therefore removed on both sides, and a stop at `</answer>` is ignored.
"""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import side_by_side

CLOSE = 447  # `</answer>`; checked by the fixture below
QUESTION = "make 82 from 3, 7, 25"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
)  # fmt: skip
PREFILL = [{"role": "user", "content": "12*9"}, {"role": "assistant", "content": "<think>12*9="}]
IN_ANSWER = [PREFILL[0], {"role": "assistant", "content": "<think>12*9=108</think><answer>1"}]


@pytest.fixture(scope="module", autouse=True)
def _close_is_one_token(plain):
    asked = {"prompt": "</answer>", "add_special_tokens": False}
    assert httpx.post(f"{plain.url}/tokenize", json=asked).json()["tokens"] == [CLOSE]


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "rtap", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0} | fields


def _completion(**fields: Any) -> dict[str, Any]:
    return {"model": "rtap", "prompt": PROMPT, "temperature": 0, "max_tokens": 120} | fields


def _both(server, plain, path: str, body: dict[str, Any]) -> tuple[httpx.Response, httpx.Response]:
    """(our reply, plain vLLM's), asked at the same time."""
    stops, plainly = body.get("stop_token_ids", []), body
    if path == MESSAGES:  # has no field for token ids
        plainly = body | {"stop_sequences": [*body.get("stop_sequences", []), "</answer>"]}
    elif isinstance(stops, list):
        plainly = body | {"stop_token_ids": [*stops, CLOSE]}
    return side_by_side(
        lambda: httpx.post(server.url + path, json=body | {"rtap": {"policy": "single"}}, timeout=60),
        lambda: httpx.post(plain.url + path, json=plainly, timeout=60),
    )


def _bare(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "")
    return text


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    return (message.get("reasoning") or "") + (message.get("content") or "")


def _seen(reply: httpx.Response) -> dict[str, Any]:
    """A whole or a streamed reply in one shape."""
    assert reply.status_code == 200, reply.text
    streamed = reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.text.splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")] if streamed else [reply.json()]
    choices: dict[int, dict[str, Any]] = {}
    seen: dict[str, Any] = {"usage": None, "prompt_token_ids": None, "prompt_logprobs": None}
    for part in parts:
        assert "error" not in part, part
        for key in seen:
            seen[key] = part.get(key) or seen[key]
        for choice in part["choices"]:
            empty = {"text": "", "finish_reason": None, "stop_reason": None, "logprobs": [], "token_ids": []}
            total = choices.setdefault(choice["index"], empty)
            total["text"] += _text(choice)
            total["logprobs"] += _logprobs(choice.get("logprobs"))
            total["token_ids"] += choice.get("token_ids") or []
            seen["prompt_token_ids"] = choice.get("prompt_token_ids") or seen["prompt_token_ids"]
            seen["prompt_logprobs"] = choice.get("prompt_logprobs") or seen["prompt_logprobs"]
            for key in ("finish_reason", "stop_reason"):
                total[key] = total[key] if choice.get(key) is None else choice[key]
    for choice in choices.values():
        choice["text"] = _bare(choice["text"])
        choice["stop_reason"] = None if choice["stop_reason"] == CLOSE else choice["stop_reason"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    seen["usage"] = {key: seen["usage"][key] for key in counts}
    return seen | {"choices": choices}


def _seen_response(reply: httpx.Response) -> dict[str, Any]:
    """A whole or a streamed response of /v1/responses in one shape."""
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        kinds = ("response.reasoning_text.delta", "response.output_text.delta")
        text, whole = "".join(e["delta"] for e in events if e["type"] in kinds), events[-1]["response"]
    else:
        whole = reply.json()
        text = "".join(part["text"] for item in whole["output"] for part in item["content"])
    usage = {key: whole["usage"][key] for key in ("input_tokens", "output_tokens", "total_tokens")}
    return {"text": _bare(text), "status": whole["status"], "incomplete": whole["incomplete_details"], "usage": usage}


def _seen_message(reply: httpx.Response) -> dict[str, Any]:
    """A whole or a streamed message of /v1/messages in one shape."""
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        text = "".join(d.get("text", "") + d.get("thinking", "") for d in deltas)
        ended = next(e for e in events if e["type"] == "message_delta")
        stop, usage = ended["delta"], ended["usage"]
    else:
        stop = reply.json()
        usage = stop["usage"]
        text = "".join(block.get("text", "") + block.get("thinking", "") for block in stop["content"])
    ended_by, sequence = stop["stop_reason"], stop.get("stop_sequence")
    if sequence == "</answer>":
        ended_by, sequence = "end_turn", None
    return {"text": _bare(text), "ended": ended_by, "sequence": sequence, "tokens": usage["output_tokens"]}


def _logprobs(shown: Any) -> list[Any]:
    """One entry per token, of either endpoint's shape."""
    if not shown:
        return []
    if "content" in shown:
        return [
            {"token": t["token"], "logprob": t["logprob"], "top": {x["token"]: x["logprob"] for x in t["top_logprobs"]}}
            for t in shown["content"]
        ]
    top = shown["top_logprobs"] or [None] * len(shown["tokens"])
    return [list(row) for row in zip(shown["tokens"], shown["token_logprobs"], top, shown["text_offset"], strict=True)]


def _assert_close(ours: Any, reference: Any, where: str = "") -> None:
    """Equal, numbers up to bf16 noise between two processes."""
    if isinstance(reference, dict):
        assert isinstance(ours, dict), where
        assert set(ours) == set(reference), where
        for key, value in reference.items():
            _assert_close(ours[key], value, f"{where}.{key}")
    elif isinstance(reference, list):
        assert isinstance(ours, list), where
        assert len(ours) == len(reference), where
        for i, value in enumerate(reference):
            _assert_close(ours[i], value, f"{where}[{i}]")
    elif isinstance(reference, float):
        assert ours == pytest.approx(reference, abs=0.05), where
    else:
        assert ours == reference, where


FIELDS = {
    "n and seed": {"n": 2, "seed": 3, "temperature": 1},
    "temperature": {"temperature": 0.6, "seed": 1},
    "top_p": {"temperature": 1, "top_p": 0.7, "seed": 2},
    "top_k": {"temperature": 1, "top_k": 3, "seed": 4},
    "min_p": {"temperature": 1, "min_p": 0.2, "seed": 5},
    "stop string in the answer": {"stop": ["nothing of this", "25*3+"]},
    "include_stop_str_in_output": {"stop": "3+", "include_stop_str_in_output": True},
    "max_completion_tokens": {"max_completion_tokens": 9},
    "max_tokens in the answer": {"max_tokens": 30},
    "logit_bias": {"logit_bias": {"2": 100}},
    "logit_bias and ignore_eos": {"logit_bias": {"2": 100}, "ignore_eos": True, "max_tokens": 6},
    "skip_special_tokens": {
        "logit_bias": {"2": 100}, "ignore_eos": True, "max_tokens": 6, "skip_special_tokens": False,
    },
    "allowed_token_ids": {"allowed_token_ids": [10, 11, 12], "max_tokens": 8},
    "bad_words": {"bad_words": ["="], "max_tokens": 60},
    "presence_penalty": {"presence_penalty": 1.5, "max_tokens": 60},
    "frequency_penalty": {"frequency_penalty": 1.0, "max_tokens": 60},
    "repetition_penalty": {"repetition_penalty": 1.3, "max_tokens": 60},
    "return_token_ids": {"return_token_ids": True},
    "cache_salt": {"cache_salt": "salt"},
    "user": {"user": "someone"},
    "priority": {"priority": 0},
}  # fmt: skip
CHAT_FIELDS = FIELDS | {
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "logprobs without top": {"logprobs": True},
    "logprobs as token ids": {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True},
    "logprobs of n": {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "temperature": 1},
    "continue_final_message": {
        "messages": PREFILL, "continue_final_message": True, "add_generation_prompt": False,
    },
    "continue_final_message in an answer": {
        "messages": IN_ANSWER, "continue_final_message": True, "add_generation_prompt": False,
    },
    "add_generation_prompt": {"add_generation_prompt": False, "max_tokens": 40},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 12, "return_token_ids": True},
}  # fmt: skip
# Stops in a thought, where a reply of chat goes on.
TEXT_STOPS = {
    "stop string": {"stop": "="},
    "stop strings": {"stop": ["nothing of this", "7="]},
    "stop string in the answer": {"stop": "answer>25"},
    "stop at a tag": {"stop": "</think>"},
    "include_stop_str_in_output": {"stop": "=", "include_stop_str_in_output": True},
    "stop_token_ids at a tag": {"stop_token_ids": [446]},
    "stop_token_ids": {"stop_token_ids": [445], "include_stop_str_in_output": True},
}
COMPLETION_FIELDS = FIELDS | TEXT_STOPS | {
    "logprobs": {"logprobs": 3},
    "logprobs 0": {"logprobs": 0},
    "echo": {"echo": True},
    "echo and logprobs": {"echo": True, "logprobs": 2},
    "echo alone": {"echo": True, "max_tokens": 1},
    "a prompt of ids": {"prompt": [1, 20, 21, 22, 2, 1]},
    "several prompts": {"prompt": [PROMPT, PROMPT.replace("82", "46")], "n": 2, "seed": 1, "temperature": 1},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 12, "return_token_ids": True},
}  # fmt: skip
WHOLE_ONLY = {"prompt_logprobs": {"prompt_logprobs": 2}}


def _cases(
    fields: dict[str, dict[str, Any]], whole_only: dict[str, dict[str, Any]] = WHOLE_ONLY, *, slow: str = ""
) -> list[Any]:
    """(fields, stream) with a readable id. slow: "whole" or "streamed", the mode that runs under `make test-all`."""
    cases = [(name, extra, mode) for name, extra in fields.items() for mode in ("whole", "streamed")]
    cases += [(name, extra, "whole") for name, extra in whole_only.items()]
    return [
        pytest.param(extra, mode == "streamed", id=f"{name}, {mode}", marks=pytest.mark.slow if mode == slow else ())
        for name, extra, mode in cases
    ]


def _streamed(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


@pytest.mark.parametrize(("fields", "stream"), _cases(CHAT_FIELDS))
def test_chat(server, plain, fields, stream):
    ours, reference = (_seen(reply) for reply in _both(server, plain, CHAT, _chat(**fields, **_streamed(stream))))
    for index, choice in ours["choices"].items():
        whole = reference["choices"][index]
        whole["logprobs"] = _part_like(choice["logprobs"], whole["logprobs"])
    _assert_close(ours, reference)


def _part_like(ours: list[Any], reference: list[Any]) -> list[Any]:
    """The entries of the content: plain vLLM has those of the thought and the tags too."""
    tokens, length = [entry["token"] for entry in ours], len(ours)
    parts = (reference[at : at + length] for at in range(len(reference) - length, -1, -1))
    return next(part for part in parts if [entry["token"] for entry in part] == tokens)


@pytest.mark.parametrize(("fields", "stream"), _cases(COMPLETION_FIELDS, slow="streamed"))
def test_completions(server, plain, fields, stream):
    ours, reference = _both(server, plain, COMPLETIONS, _completion(**fields, **_streamed(stream)))
    _assert_close(_seen(ours), _seen(reference))


# Fields that /v1/responses has too.
COMMON = ("temperature", "top_p", "top_k", "min_p", "logit_bias", "logit_bias and ignore_eos", "skip_special_tokens",
          "presence_penalty", "frequency_penalty", "repetition_penalty", "cache_salt", "user", "priority",
          "stop string in the answer", "include_stop_str_in_output")  # fmt: skip
RESPONSE_FIELDS = {name: {k: v for k, v in FIELDS[name].items() if k != "max_tokens"} for name in COMMON} | {
    "max_output_tokens": {"max_output_tokens": 9},
    "instructions": {"instructions": "Be brief."},
    "messages as input": {"input": [{"role": "user", "content": QUESTION}]},
    "store": {"store": False},
    "metadata": {"metadata": {"a": "b"}},
    "truncation": {"truncation": "disabled"},
}
MESSAGE_FIELDS = {
    "nothing else": {},
    "max_tokens": {"max_tokens": 9},
    "stop_sequences": {"stop_sequences": ["nothing of this", "25*3+"]},
    "system": {"system": "Be brief."},
    "top_k 1": {"temperature": 1, "top_k": 1},
    "metadata": {"metadata": {"user_id": "someone"}},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]},
    "cache_salt": {"cache_salt": "salt"},
}


@pytest.mark.parametrize(("fields", "stream"), _cases(RESPONSE_FIELDS, whole_only={}, slow="whole"))
def test_responses(server, plain, fields, stream):
    body = {"model": "rtap", "input": QUESTION, "temperature": 0, "max_output_tokens": 120, "stream": stream}
    ours, reference = _both(server, plain, RESPONSES, body | fields)
    _assert_close(_seen_response(ours), _seen_response(reference))


@pytest.mark.parametrize(("fields", "stream"), _cases(MESSAGE_FIELDS, whole_only={}, slow="whole"))
def test_messages(server, plain, fields, stream):
    asked = [{"role": "user", "content": QUESTION}]
    body = {"model": "rtap", "messages": asked, "temperature": 0, "max_tokens": 120, "stream": stream}
    ours, reference = _both(server, plain, MESSAGES, body | fields)
    _assert_close(_seen_message(ours), _seen_message(reference))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (RESPONSES, {"max_output_tokens": 0}),
        (RESPONSES, {"temperature": -1}),
        (RESPONSES, {"top_p": 2}),
        (RESPONSES, {"input": None}),
        (RESPONSES, {"model": "nope"}),
        (RESPONSES, {"previous_response_id": "resp_of_nobody"}),
        (MESSAGES, {"max_tokens": 0}),
        (MESSAGES, {"max_tokens": "many"}),
        (MESSAGES, {"messages": []}),
        (MESSAGES, {"messages": [{"role": "robot", "content": "1"}]}),
        (MESSAGES, {"top_p": 2}),
        (MESSAGES, {"model": "nope"}),
    ],
)
def test_responses_and_messages_refuse_equally(server, plain, path, wrong):
    asked = {"input": QUESTION} if path == RESPONSES else {"messages": [{"role": "user", "content": QUESTION}]}
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    ours, reference = _both(server, plain, path, {"model": "rtap", limit: 40} | asked | wrong)
    assert ours.status_code == reference.status_code, (ours.text, reference.text)
    assert ours.status_code >= 400


@pytest.mark.parametrize(
    ("path", "name", "finish_reason", "stop_reason"),
    [
        (CHAT, "stop string in the answer", "stop", "25*3+"),
        (CHAT, "max_completion_tokens", "length", None),
        (CHAT, "logit_bias and ignore_eos", "length", None),
        (COMPLETIONS, "stop string", "stop", "="),
        (COMPLETIONS, "stop strings", "stop", "7="),
        (COMPLETIONS, "stop at a tag", "stop", "</think>"),
        (COMPLETIONS, "stop_token_ids at a tag", "stop", 446),
        (COMPLETIONS, "stop_token_ids", "stop", 445),
    ],
)
def test_stops_and_limits_take_effect(server, plain, path, name, finish_reason, stop_reason):
    body = _chat(**CHAT_FIELDS[name]) if path == CHAT else _completion(**COMPLETION_FIELDS[name])
    for reply in _both(server, plain, path, body):
        choice = _seen(reply)["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == (finish_reason, stop_reason)


def test_a_prefilled_turn_continues_in_its_thought_or_answer(server):
    """In an answer, the content is the rest of it and there is no reasoning."""
    going_on = {"continue_final_message": True, "add_generation_prompt": False, "rtap": {"policy": "single"}}

    def message(messages):
        reply = httpx.post(server.url + CHAT, json=_chat(messages=messages, **going_on), timeout=60)
        return reply.json()["choices"][0]["message"]

    thinking, answering = message(PREFILL), message(IN_ANSWER)
    assert thinking["reasoning"]
    assert thinking["content"] == "108"
    assert (answering["reasoning"], answering["content"]) == (None, "08")


@pytest.mark.parametrize("stream", [False, True])
def test_include_reasoning_false_returns_the_same_answer(server, plain, stream):
    """Plain vLLM has no reasoning parser here: its raw text ends with our content."""
    body = _chat(include_reasoning=False, **_streamed(stream))
    ours, reference = (_seen(reply) for reply in _both(server, plain, CHAT, body))
    answer = ours["choices"][0]["text"]
    assert answer
    assert reference["choices"][0]["text"].endswith(answer)
    assert ours["choices"][0]["text"] != reference["choices"][0]["text"]
    assert ours["usage"] == reference["usage"]


WRONG = {
    "max_tokens": {"max_tokens": -1},
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens above the context": {"max_tokens": 5000},
    "max_tokens no number": {"max_tokens": "many"},
    "n 0": {"n": 0},
    "n greedy": {"n": 2},
    "temperature": {"temperature": -1},
    "top_p": {"top_p": 2},
    "top_k": {"top_k": -2},
    "min_p": {"min_p": 2},
    "min_tokens": {"min_tokens": -1},
    "min_tokens above max_tokens": {"min_tokens": 9, "max_tokens": 5},
    "presence_penalty": {"presence_penalty": 3},
    "frequency_penalty": {"frequency_penalty": -3},
    "repetition_penalty": {"repetition_penalty": 0},
    "seed": {"seed": "one"},
    "stop": {"stop": 5},
    "stop empty": {"stop": ""},
    "stop list": {"stop": ["a", 5]},
    "stop_token_ids": {"stop_token_ids": "x"},
    "stop_token_ids unknown": {"stop_token_ids": [99999]},
    "logit_bias key": {"logit_bias": {"x": 1}},
    "logit_bias id": {"logit_bias": {"99999": 1}},
    "allowed_token_ids": {"allowed_token_ids": []},
    "bad_words": {"bad_words": [""]},
    "prompt_logprobs": {"prompt_logprobs": -2},
    "prompt_logprobs too many": {"prompt_logprobs": 500},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": -5},
    "cache_salt": {"cache_salt": ""},
    "priority": {"priority": 1},
    "response_format": {"response_format": {"type": "poem"}},
    "response_format no schema": {"response_format": {"type": "json_schema"}},
    "unknown field": {"surprise": 1},
    "model": {"model": "nope"},
}
WRONG_CHAT = WRONG | {
    "max_completion_tokens": {"max_completion_tokens": -1},
    "top_logprobs too many": {"logprobs": True, "top_logprobs": 500},
    "top_logprobs alone": {"top_logprobs": 2},
    "logprobs a number": {"logprobs": 3},
    "messages empty": {"messages": []},
    "role": {"messages": [{"role": "", "content": 1}]},
    "tool_choice": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto",
    },
    "continue and generate": {"messages": PREFILL, "continue_final_message": True},
}  # fmt: skip
WRONG_COMPLETIONS = WRONG | {
    "logprobs too many": {"logprobs": 500},
    "logprobs negative": {"logprobs": -2},
    "suffix": {"suffix": "end"},
    "prompt": {"prompt": None},
    "prompt empty": {"prompt": []},
    "prompt of unknown ids": {"prompt": [99999]},
}


def _wrong(fields: dict[str, dict[str, Any]]) -> list[Any]:
    return [pytest.param(extra, id=name) for name, extra in fields.items()]


@pytest.mark.parametrize("fields", _wrong(WRONG_CHAT))
def test_chat_refuses_equally(server, plain, fields):
    ours, reference = _both(server, plain, CHAT, _chat(**{"max_tokens": 40} | fields))
    assert ours.status_code == reference.status_code, (ours.text, reference.text)


@pytest.mark.parametrize("fields", _wrong(WRONG_COMPLETIONS))
def test_completions_refuse_equally(server, plain, fields):
    ours, reference = _both(server, plain, COMPLETIONS, _completion(**{"max_tokens": 40} | fields))
    assert ours.status_code == reference.status_code, (ours.text, reference.text)


def test_stream_options_without_a_stream_are_refused_equally(server, plain):
    for path, body in ((CHAT, _chat()), (COMPLETIONS, _completion())):
        ours, reference = _both(server, plain, path, body | {"stream_options": {"include_usage": True}})
        assert ours.status_code == reference.status_code == 400
