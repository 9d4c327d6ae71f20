"""Outputs of one choice: an answer comes in the steps that the model wrote, and whole and streamed replies agree."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from rtap_core.format import RTAP, TEXT, THINK
from rtap_server.engine.output_writer import ANSWER_MARK
from tests.core.scripted import encode
from tests.server.fake_engine import FakeEngine, all_of, ask, build

PARSED: dict[str, Any] = {"reasoning_parser_kwargs": {}}
RIGHT, WRONG = "<think>3+79</think><answer>82 = 3+79</answer>", "<think>3*7</think><answer>21</answer>"
SINGLE, MODEL, EAGER = {"policy": "single"}, {"policy": "model"}, {"threshold": 1.0, "max_cycles": 2}
VOTE = {"policy": "vote", "samples": 3}


@dataclass
class Reply:
    """What vLLM's parsers see of one choice."""

    reasoning: str
    content: str | None
    chunks: int
    ids: list[int]
    logprobs: list[str]
    finish_reason: str | None

    @classmethod
    def of(cls, outputs: list[RequestOutput]) -> "Reply":
        parts = [output.outputs[0] for output in outputs]
        reasoning, mark, content = "".join(part.text for part in parts).partition(ANSWER_MARK)
        at = next((n for n, part in enumerate(parts) if ANSWER_MARK in part.text), len(parts))
        entries = [(i, e) for part in parts for i, e in zip(part.token_ids, part.logprobs or (), strict=True)]
        return cls(
            reasoning, content if mark else None, sum(bool(part.text.strip(ANSWER_MARK)) for part in parts[at:]),
            [i for part in parts for i in part.token_ids],
            [text for i, entry in entries if (text := entry[i].decoded_token) != ANSWER_MARK],
            parts[-1].finish_reason,
        )  # fmt: skip


async def reply(
    script: list[str], rtap: dict[str, Any], *, stream: bool, fmt: Any = RTAP, size: int = 1, **wanted: Any
) -> tuple[Reply, Any]:
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    # An `rtap` cycle ends at its tag, others with the turn.
    llm = FakeEngine(lambda prompt: script[prompt.count("</answer>")], size=size, ends_turn=fmt is not RTAP)
    asked, state = ask(
        build(llm, format=fmt), rtap=rtap, output_kind=kind, logprobs=0, options=PARSED,
        **{"max_tokens": None} | wanted,
    )  # fmt: skip
    return Reply.of(await all_of(asked)), state.trajectories[0]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("script", "rtap"),
    [
        ([RIGHT], SINGLE), ([RIGHT], {}), ([WRONG, RIGHT.removeprefix("<think>")], {}),
        ([RIGHT, WRONG.removeprefix("<think>")], EAGER), ([RIGHT], VOTE), ([WRONG, RIGHT, ""], MODEL),
    ],
    ids=["single", "first", "second", "earlier", "vote", "model"],
)  # fmt: skip
async def test_an_answer_comes_in_the_steps_of_the_model(script, rtap, size):
    streamed, done = await reply(script, rtap, stream=True, size=size)
    whole, _ = await reply(script, rtap, stream=False, size=size)
    answer = "82 = 3+79"
    assert done.answer == streamed.content == whole.content == answer
    assert streamed.reasoning == whole.reasoning
    assert streamed.finish_reason == whole.finish_reason == "stop"
    assert sorted(streamed.ids) == sorted(whole.ids)
    assert len(whole.ids) == sum(cycle.tokens for cycle in done.cycles)
    if size == 1:
        assert streamed.chunks == len(answer) - answer.count(" ")  # white space waits for what follows it
    if size < 100:
        assert streamed.chunks > 2
    assert "".join(streamed.logprobs) == "".join(whole.logprobs) == answer


@pytest.mark.parametrize("rtap", [SINGLE, MODEL])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Eighty-two.\n", "Eighty-two.\n"), ("\n 82 ", "\n 82 "), (" ", " "), ("", ""), ("a < b", "a < b"),
        ("<think>3</think>\n\n82\n", "82\n"), ("<think></think>82", "82"),
    ],
)  # fmt: skip
async def test_without_tags_the_content_is_what_the_model_wrote(text, content, rtap):
    """White space belongs to it, but not that between a thought and its answer."""
    streamed, _ = await reply([text], rtap, stream=True, fmt=THINK)
    whole, _ = await reply([text], rtap, stream=False, fmt=THINK)
    assert (streamed.content, streamed.finish_reason) == (whole.content, whole.finish_reason) == (content, "stop")
    assert "".join(streamed.logprobs).lstrip() == content.lstrip()


@pytest.mark.parametrize("rtap", [SINGLE, MODEL])
@pytest.mark.parametrize("text", ["Eighty-two.\n", "<think>3</think>\n\n82\n", " a</answer>", "<", ""])
async def test_tags_are_content_of_a_model_without_thoughts(text, rtap):
    streamed, _ = await reply([text], rtap, stream=True, fmt=TEXT)
    whole, _ = await reply([text], rtap, stream=False, fmt=TEXT)
    assert (streamed.content, streamed.reasoning) == (whole.content, whole.reasoning) == (text, "")
    assert "".join(streamed.logprobs) == "".join(whole.logprobs) == text


@pytest.mark.parametrize(
    ("script", "rtap", "fmt", "streams"),
    [
        ([RIGHT], SINGLE, RTAP, True),
        ([RIGHT], {"max_cycles": 1}, RTAP, True),  # its score decides nothing
        (["eighty-two"], SINGLE, THINK, True),
        (["eighty-two"], MODEL, THINK, True),
        (["eighty-two"], SINGLE, TEXT, True),
        (["eighty-two"], MODEL, TEXT, True),
        (["eighty-two"], {}, TEXT, False),
        ([RIGHT, ""], MODEL, RTAP, False),
        ([RIGHT], {}, RTAP, False),
        (["eighty-two"], {}, THINK, False),
        ([RIGHT], VOTE, RTAP, False),
    ],
)
async def test_an_answer_that_nothing_can_reject_is_streamed_as_it_is_written(script, rtap, fmt, streams):
    llm = FakeEngine(lambda prompt: script[prompt.count("</answer>")], size=1, ends_turn=fmt is not RTAP)
    stream, _ = ask(build(llm, format=fmt), rtap=rtap, output_kind=RequestOutputKind.DELTA, options=PARSED)
    async with aclosing(stream):
        seen = ""
        while ANSWER_MARK not in seen:
            seen += (await anext(stream)).outputs[0].text
        (text,) = (await anext(stream)).outputs[0].text
        written = llm.num_sampled
    assert text == (script[0].partition("<answer>")[2] or script[0])[0]
    assert (written < len(encode(script[0]))) == streams


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("script", "rtap", "max_tokens", "content", "finish_reason"),
    [
        ([WRONG, RIGHT.removeprefix("<think>")], EAGER, len(encode(WRONG)) + 4, "21", "stop"),  # cut in the next cycle
        ([WRONG, RIGHT.removeprefix("<think>")], EAGER, len(encode(WRONG)) + 1, "21", "stop"),  # no room for one
        ([RIGHT], SINGLE, len(encode(RIGHT)), "82 = 3+79", "stop"),
        ([RIGHT], SINGLE, len(encode(RIGHT)) - 3, "82 = 3+", "length"),
        ([RIGHT], {}, len(encode(RIGHT)) - 3, "82 = 3+", "length"),
        ([RIGHT], SINGLE, 4, None, "length"),
        ([RIGHT], {}, 4, None, "length"),
        ([RIGHT], VOTE, 4, None, "length"),
        ([RIGHT], VOTE, len(encode(RIGHT)), "82 = 3+79", "stop"),
        (["<think>no answer"], MODEL, 100, None, "stop"),  # the model ended its turn
    ],
)
async def test_the_finish_reason_is_that_of_the_returned_answer(
    script, rtap, max_tokens, content, finish_reason, stream
):
    got, _ = await reply(script, rtap, stream=stream, max_tokens=max_tokens)
    assert (got.content, got.finish_reason) == (content, finish_reason)


async def test_an_aborted_request_passes_on_the_tokens_before():
    llm = FakeEngine(["<think>3</think><answer>82 and more"], size=1, finish_reason="abort", end_of_turn_id=None)
    stream, _ = ask(build(llm), output_kind=RequestOutputKind.DELTA, logprobs=0, options=PARSED)
    got = Reply.of(await all_of(stream))
    assert (got.finish_reason, got.content, len(got.ids)) == ("abort", None, llm.num_sampled - 1)


async def test_a_client_that_does_not_read_holds_up_its_choices():
    llm = FakeEngine(["<think>" + "x" * 5_000], size=1)
    stream, _ = ask(build(llm), rtap=SINGLE, n=4, max_tokens=None, output_kind=RequestOutputKind.DELTA, options=PARSED)
    async with aclosing(stream):
        await anext(stream)
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert llm.num_sampled < 50
    assert llm.num_closed == 4
