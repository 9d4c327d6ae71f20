"""FakeEngine ends requests as vLLM does, because other tests rely on it."""

import asyncio

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tests.core.scripted import encode
from tests.server.fake_engine import CLOSE, QUESTION, FakeEngine, all_of

PROMPT = {"prompt_token_ids": QUESTION}
KINDS = list(RequestOutputKind)


def request(llm: FakeEngine, request_id: str, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY, **params):
    return all_of(llm.generate(PROMPT, SamplingParams(output_kind=kind, **params), request_id))


@pytest.mark.parametrize("kind", KINDS)
async def test_an_abort_ends_every_request_under_the_id_with_the_tokens_so_far(kind):
    llm = FakeEngine(["x" * 1000], size=1, token_seconds=0.005)
    running = [asyncio.create_task(request(llm, name, kind, max_tokens=60)) for name in ("a", "a", "b")]
    while llm.num_sampled < 15:  # some of each request, on a busy machine too
        await asyncio.sleep(0.001)
    await llm.abort(["a"])
    first, second, other = await asyncio.gather(*running)
    for outputs, reason in ((first, "abort"), (second, "abort"), (other, "length")):
        assert [o.outputs[0].finish_reason for o in outputs] == [None] * (len(outputs) - 1) + [reason]
        parts = outputs if kind is RequestOutputKind.DELTA else outputs[-1:]
        num_tokens = sum(len(o.outputs[0].token_ids) for o in parts)
        assert num_tokens == 60 if reason == "length" else 0 < num_tokens < 60
        assert "".join(o.outputs[0].text for o in parts) == "x" * num_tokens
    assert llm.aborted == ["a", "a"]


async def test_an_abort_before_the_request_arrives_does_nothing():
    llm = FakeEngine(["xy"], arrival_seconds=0.03)
    running = asyncio.create_task(request(llm, "a"))
    await asyncio.sleep(0.01)
    await llm.abort("a")
    (output,) = await running
    assert (output.outputs[0].text, output.outputs[0].finish_reason, llm.aborted) == ("xy", "stop", [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(
    ("params", "text", "reason", "stop"),
    [
        ({"max_tokens": 99}, "<answer>7</answer>!", "stop", None),  # the end of the turn
        ({"max_tokens": 99, "stop_token_ids": [CLOSE]}, "<answer>7", "stop", CLOSE),
        (
            {"max_tokens": 99, "stop_token_ids": [CLOSE], "include_stop_str_in_output": True},
            "<answer>7</answer>", "stop", CLOSE,
        ),
        ({"max_tokens": 2}, "<answer>7", "length", None),
    ],
)  # fmt: skip
async def test_a_request_ends_at_a_stop_token_or_its_limit(kind, size, params, text, reason, stop):
    outputs = await request(FakeEngine(["<answer>7</answer>!"], size=size), "a", kind, **params, logprobs=0)
    parts = [o.outputs[0] for o in (outputs if kind is RequestOutputKind.DELTA else outputs[-1:])]
    assert "".join(part.text for part in parts) == text
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == (reason, stop)
    ids = [token_id for part in parts for token_id in part.token_ids]
    assert ids[: len(encode(text))] == encode(text)
    assert [list(entry) for part in parts for entry in part.logprobs] == [[token_id] for token_id in ids]
    assert len(outputs) == 1 or kind is not RequestOutputKind.FINAL_ONLY
