"""The `think` format (Qwen3, DeepSeek: no answer tags) with the tests of the `rtap` format, and what needs flags beside
it: an adapter, and tools whose calls are answers."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import Running, free_port, rtap_command, running
from tests.e2e.test_chat import (
    EAGER,
    _ask,
    _stream,
    test_a_deadline_returns_the_best_so_far,
    test_a_grammar_binds_every_answer_and_no_thought,
    test_a_stream_tells_the_same_as_the_whole_reply,
    test_an_answer_with_its_trajectory,
    test_cycles_are_told_as_they_end_and_before_any_content,
    test_logprobs_align_with_token_counts,
    test_max_tokens_is_one_budget_and_finish_reason_says_so,
    test_n_choices_are_independent_trajectories,
    test_policies,
    test_the_cache_makes_later_cycles_cheap,
    test_the_same_seed_gives_the_same_trajectory_and_another_seed_another,
    test_thinking_streams_token_by_token,
)
from tests.other_checkpoints import save_adapter, save_think

__all__ = [
    "test_a_deadline_returns_the_best_so_far",
    "test_a_grammar_binds_every_answer_and_no_thought",
    "test_a_stream_tells_the_same_as_the_whole_reply",
    "test_an_answer_with_its_trajectory",
    "test_cycles_are_told_as_they_end_and_before_any_content",
    "test_logprobs_align_with_token_counts",
    "test_max_tokens_is_one_budget_and_finish_reason_says_so",
    "test_n_choices_are_independent_trajectories",
    "test_policies",
    "test_the_cache_makes_later_cycles_cheap",
    "test_the_same_seed_gives_the_same_trajectory_and_another_seed_another",
    "test_thinking_streams_token_by_token",
]
ADAPTER = "adapted"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "strict": True,  # else vLLM binds arguments to be JSON of any kind
        "parameters": {"type": "object", "properties": {"x": {"enum": [7, 82]}}, "required": ["x"]},
    },
}
# What a model of the hermes dialect writes. The bundled one never learnt it, so a grammar makes it.
CALL = r'<tool_call>\n\{"name": "look_up", "arguments": \{"x": (7|82)\}\}\n</tool_call>'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, port = tmp_path_factory.mktemp("think"), free_port()
    flags = [
        str(save_think("policy", folder / "policy")), "--served-model-name", "rtap",
        "--confidence-model", str(save_think("confidence", folder / "confidence")),
        "--enforce-eager", "--kv-cache-memory-bytes", str(2**29),
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={save_adapter(folder / 'lora', seed=1)}",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    with running(rtap_command(port, *flags), port, "/ready", folder) as started:
        yield started


def test_rejected_answers_are_reasoning_and_the_best_is_content(server):
    reply = _ask(server, rtap=EAGER | {"return_cycles": True}, seed=7)
    rtap, message = reply.rtap, reply.choices[0].message
    assert (rtap["stop_reason"], len(rtap["cycles"])) == ("max_cycles", 3)
    best = max((c for c in rtap["cycles"] if c["answer"]), key=lambda c: (c["confidence"], c["index"]))
    assert message.content == best["answer"]
    for cycle in rtap["cycles"]:
        assert cycle["think"] in message.reasoning
        assert cycle["accepted"] or (cycle["answer"] or "") in message.reasoning
    assert "<think>" not in message.content


def test_an_adapter_is_a_model_whose_every_cycle_is_its_own(server):
    def written(model, question):
        reply = server.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0,
            max_tokens=300, extra_body={"rtap": EAGER | {"return_cycles": True}},
        )  # fmt: skip
        assert reply.model == model
        return [(c["think"], c["answer"]) for c in reply.rtap["cycles"]]

    assert {m.id for m in server.client.models.list().data} == {"rtap", ADAPTER}
    differs = []  # by question: whether each cycle does; the two may agree on an easy one
    for question in ("Make 72 from 2, 6 and 10", "make 61 from 4, 8, 29", "37*48+65", "(83-17)*29"):
        base, adapted = written("rtap", question), written(ADAPTER, question)
        assert adapted == written(ADAPTER, question)
        differs.append([a != b for a, b in zip(adapted, base, strict=False)])
    assert any(len(cycles) > 1 and all(cycles) for cycles in differs), differs


def _ids_of_white_space(server) -> list[int]:
    texts = [" ", "\n", "\r", "\t", "  ", "\n\n"]
    asked = ({"prompt": text, "add_special_tokens": False} for text in texts)
    return [i for body in asked for i in httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_tool_call_is_an_answer(server, choice, stream):
    """Written in every cycle, scored, and returned as a call and not as content."""
    # JSON allows white space without end, which is what a model that never saw JSON would write.
    bias = dict.fromkeys(_ids_of_white_space(server), -100)
    extra = {"rtap": EAGER, "logit_bias": bias}
    if choice == "auto":
        extra |= {"structured_outputs": {"regex": CALL}}
    asked = {
        "model": "rtap", "messages": [{"role": "user", "content": "make 82 from 3, 7, 25"}], "seed": 5,
        "max_tokens": 600, "tools": [TOOL], "tool_choice": choice, "extra_body": extra,
    }  # fmt: skip
    if stream:
        chunks = list(server.client.chat.completions.create(stream=True, **asked))
        rtap, deltas = chunks[-1].rtap, [c.choices[0].delta for c in chunks if c.choices]
        calls = [call.function for d in deltas for call in d.tool_calls or ()]
        name = "".join(call.name or "" for call in calls)
        arguments = "".join(call.arguments or "" for call in calls)
        content = "".join(d.content or "" for d in deltas)
        finish = next(c.choices[0].finish_reason for c in reversed(chunks) if c.choices)
    else:
        reply = server.client.chat.completions.create(**asked)
        rtap, message = reply.rtap, reply.choices[0].message
        (call,) = message.tool_calls
        name, arguments, content = call.function.name, call.function.arguments, message.content or ""
        finish = reply.choices[0].finish_reason
    assert (name, finish) == ("look_up", "tool_calls" if isinstance(choice, str) else "stop")
    assert json.loads(arguments)["x"] in (7, 82)
    assert not content.strip()
    assert len(rtap["cycles"]) == EAGER["max_cycles"]
    answered = [c for c in rtap["cycles"] if c["answer"] is not None]
    assert answered
    assert all(c["confidence"] is not None for c in answered)


def test_history_with_calls_and_results_goes_on(server):
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": 7}'}}
    reply = server.client.chat.completions.create(
        model="rtap", tools=[TOOL],
        messages=[
            {"role": "user", "content": "12*9"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "108"},
        ],
    )  # fmt: skip
    assert reply.rtap["cycles"]


def test_streams_have_no_tags(server):
    chunks = _stream(server, rtap=EAGER, seed=9)
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content
    assert "<" not in content
