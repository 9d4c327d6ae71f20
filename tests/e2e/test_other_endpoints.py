"""Completions, responses, Anthropic messages and our own routes."""

import json

import httpx
import openai
import pytest

PROMPT = "<|im_start|>user\nmake 82 from 3, 7, 25<|im_end|>\n<|im_start|>assistant\n"
EAGER = {"threshold": 1.0, "max_cycles": 2}


def test_completions_return_the_raw_trajectory(server):
    reply = server.client.completions.create(
        model="rtap", prompt=PROMPT, max_tokens=300, seed=1, extra_body={"rtap": EAGER | {"return_cycles": True}}
    )
    text = reply.choices[0].text
    assert text.count("</answer>") == sum(c["answer"] is not None for c in reply.rtap["cycles"])
    assert text.count("<think>") == 2
    assert reply.usage.completion_tokens == sum(c["tokens"] for c in reply.rtap["cycles"])


def test_completions_stream_the_same(server):
    options = {"model": "rtap", "prompt": PROMPT, "max_tokens": 300, "seed": 1, "extra_body": {"rtap": EAGER}}
    whole = server.client.completions.create(**options)
    chunks = list(server.client.completions.create(**options, stream=True))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].rtap["stop_reason"] == whole.rtap["stop_reason"]


def test_several_prompts_of_completions_have_separate_trajectories(server):
    reply = server.client.completions.create(
        model="rtap", prompt=[PROMPT, PROMPT.replace("82", "46")], max_tokens=300, extra_body={"rtap": EAGER}
    )
    assert [c.index for c in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.text.count("<answer>") == sum(c["answer"] is not None for c in choice.rtap["cycles"])


def test_responses_carry_reasoning_answer_and_trajectory(server):
    reply = server.client.responses.create(model="rtap", input="What is 12 * 9?", extra_body={"rtap": EAGER})
    kinds = [item.type for item in reply.output]
    assert kinds == ["reasoning", "message"]
    assert reply.output_text == next(c["answer"] for c in reply.rtap["cycles"] if c["accepted"])
    assert reply.usage.output_tokens == sum(c["tokens"] for c in reply.rtap["cycles"])
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens


def test_responses_stream(server):
    events = list(
        server.client.responses.create(model="rtap", input="What is 12 * 9?", stream=True, extra_body={"rtap": EAGER})
    )
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    thinking = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    done = events[-1]
    assert done.type == "response.completed"
    assert text == next(c["answer"] for c in done.response.rtap["cycles"] if c["accepted"])
    assert "<answer>" not in text
    assert thinking


def test_messages_carry_thinking_answer_and_trajectory(server):
    body = {
        "model": "rtap",
        "max_tokens": 300,
        "messages": [{"role": "user", "content": "What is 12 * 9?"}],
        "rtap": EAGER,
    }
    reply = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).json()
    kinds = {block["type"]: block for block in reply["content"]}
    accepted = next(c["answer"] for c in reply["rtap"]["cycles"] if c["accepted"])
    assert kinds["text"]["text"] == accepted
    assert "=" in kinds["thinking"]["thinking"]
    stream = httpx.post(f"{server.url}/v1/messages", json=body | {"stream": True}, timeout=60).text
    deltas = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert [d["rtap"]["policy"] for d in deltas if "rtap" in d] == ["confidence"]


def test_models_live_ready_and_config(server):
    assert [m.id for m in server.client.models.list()] == ["rtap"]
    assert httpx.get(f"{server.url}/live").json() == {"status": "alive"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    config = httpx.get(f"{server.url}/v1/rtap/config").json()
    assert (config["format"], config["confidence"]["kind"]) == ("rtap", "pooling")
    assert config["defaults"]["policy"] == "confidence"
    assert sum(config["confidence"]["calibration"]["reference"]) > 0


def test_score_agrees_with_the_loop(server):
    reply = server.client.chat.completions.create(
        model="rtap",
        messages=[{"role": "user", "content": "make 82 from 3, 7, 25"}],
        seed=9,
        extra_body={"rtap": {"max_cycles": 1, "return_cycles": True}},
    )
    cycle = reply.rtap["cycles"][0]
    scored = httpx.post(
        f"{server.url}/v1/rtap/score",
        json={"question": "make 82 from 3, 7, 25", "think": cycle["think"], "answer": cycle["answer"]},
    ).json()
    assert scored["confidence"] == pytest.approx(cycle["confidence"], abs=0.02)  # bf16, another batch


@pytest.mark.parametrize("body", [{}, {"question": "1+1"}, {"question": "1+1", "answer": "2", "x": 1}, [1], "no"])
def test_score_refuses_invalid_bodies(server, body):
    reply = httpx.post(f"{server.url}/v1/rtap/score", json=body)
    assert reply.status_code in (400, 422)
    assert reply.json()["error"]["message"]


def test_the_official_sdk_raises_its_own_errors(server):
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "1"}])
