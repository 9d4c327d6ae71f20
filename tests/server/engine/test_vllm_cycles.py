"""Cycles from one engine request equal those from several. The engine is scripted; tests/e2e has vLLM."""

from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from rtap_core.format import RTAP, THINK
from rtap_core.types import Cycle, Step
from rtap_server.engine.output_writer import ANSWER_MARK
from rtap_server.engine.recursive_engine import RecursiveEngine
from rtap_server.engine.vllm_cycles import split_step
from tests.core.scripted import decode, encode
from tests.server.fake_engine import CLOSE, QUESTION, FakeEngine, all_of, ask, build

FIRST, SECOND = "<think>3+4=8</think><answer>8</answer>", "<think>Oops, 7</think><answer>7</answer>"
MODEL = {"policy": "model", "max_cycles": 4, "threshold": None}


def whole(text: str, size: int = 1) -> FakeEngine:
    """An engine that goes on with ``text`` from where a prompt ends."""
    return FakeEngine(lambda prompt: text[len(prompt) - len(decode(QUESTION)) :], size=size)


def engine_of(llm: FakeEngine, *, shows_cycle_end: bool = True) -> RecursiveEngine:
    return build(llm, shows_cycle_end=shows_cycle_end)


def told(outputs: list[RequestOutput], *, in_order: bool) -> tuple[str, list[int], list[Any], str | None]:
    """Text, ids, log-probabilities of the content and finish reason of what a client sees.

    in_order: of the ids. A stream has those of rejected answers after all thoughts."""
    parts = [output.outputs[0] for output in outputs]
    ids = [i for part in parts for i in part.token_ids]
    entries = [entry for part in parts for entry in part.logprobs or ()]
    assert len(entries) == len(ids)
    return (
        "".join(part.text for part in parts),
        ids if in_order else sorted(ids),
        [e for e in entries if next(iter(e.values())).decoded_token != ANSWER_MARK],
        parts[-1].finish_reason,
    )


@pytest.mark.parametrize("split", [True, False], ids=["split", "raw"])
@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 1000])
@pytest.mark.parametrize(
    ("text", "rtap", "max_tokens"),
    [
        (FIRST + SECOND, {}, 200),
        (FIRST, {}, 200),
        (FIRST + SECOND + FIRST, {"max_cycles": 2}, 200),
        (FIRST + SECOND, {}, len(encode(FIRST)) + 9),  # the limit cuts the second cycle
        (FIRST + SECOND, {}, len(encode(FIRST))),  # the limit is where the first ends
        (FIRST + "nothing more", {}, 200),
        ("no tags at all", {}, 200),
    ],
)
async def test_what_is_told_is_what_several_requests_tell(text, rtap, max_tokens, size, kind, split):
    options = {"reasoning_parser_kwargs": {}} if split else {}
    found = []
    for shows in (True, False):
        llm = whole(text, size)
        stream, state = ask(
            engine_of(llm, shows_cycle_end=shows), rtap=MODEL | rtap, output_kind=kind, max_tokens=max_tokens,
            logprobs=0, options=options,
        )  # fmt: skip
        outputs = await all_of(stream)
        done = state.trajectories[0]
        cycles = [(c.think, c.answer, c.tokens, c.answer_tokens, c.oops_tokens, c.accepted) for c in done.cycles]
        shown = told(outputs, in_order=not split or kind is RequestOutputKind.FINAL_ONLY)
        found.append((shown, cycles, done.stop_reason, done.selected, len(llm.calls)))
    assert found[0][:4] == found[1][:4]
    assert found[0][4] == 1
    if len(encode(FIRST)) < max_tokens and "<" in text:
        assert found[1][4] > 1
    if split and found[0][1][-1][1]:
        assert ANSWER_MARK + found[0][1][-1][1] in found[0][0][0]


async def test_each_cycle_says_that_nothing_was_read_again():
    stream, state = ask(engine_of(whole(FIRST + SECOND)), rtap=MODEL)
    await all_of(stream)
    first, second = state.trajectories[0].cycles
    assert (first.prompt_tokens, first.cached_tokens) == (len(QUESTION), 0)
    assert second.prompt_tokens == second.cached_tokens == first.prompt_tokens + first.tokens


async def test_each_cycle_has_its_span():
    """The engine's own spans are those of the first."""

    class Spans:
        def __init__(self) -> None:
            self.begun, self.ended = list[int](), list[int]()

        def headers(self, index: int) -> dict[str, str]:
            self.begun.append(index)
            return {}

        def end_cycle(self, cycle: Cycle) -> None:
            self.ended.append(cycle.index)

        def close(self) -> None: ...

    spans = Spans()
    tracing = SimpleNamespace(start_cycles=lambda *_: spans)
    engine = build(whole(FIRST + SECOND), shows_cycle_end=True, tracing=tracing)
    await all_of(ask(engine, rtap=MODEL)[0])
    assert spans.begun[:2] == spans.ended == [0, 1]


async def test_the_engine_is_stopped_after_the_last_cycle_that_is_wanted():
    llm = whole(FIRST + SECOND * 9)
    stream, state = ask(engine_of(llm), rtap=MODEL | {"max_cycles": 2})
    await all_of(stream)
    assert (llm.num_closed, llm.num_sampled) == (1, len(encode(FIRST + SECOND)))
    assert state.trajectories[0].discarded_tokens == 0
    llm = whole(FIRST + SECOND * 9, size=len(encode(FIRST + SECOND)) + 3)
    stream, state = ask(engine_of(llm), rtap=MODEL | {"max_cycles": 2})
    await all_of(stream)
    assert state.trajectories[0].discarded_tokens == 3  # the engine had told of them already


async def test_a_client_that_leaves_stops_the_engine():
    llm = whole(FIRST + SECOND)
    stream, _ = ask(engine_of(llm), rtap=MODEL, output_kind=RequestOutputKind.DELTA)
    async with aclosing(stream):
        async for _ in stream:
            if llm.num_sampled > len(encode(FIRST)):
                break
    assert llm.num_closed == 1


@pytest.mark.parametrize(
    ("rtap", "wanted"),
    [
        ({"policy": "confidence"}, {}),
        ({"policy": "single"}, {}),
        ({"select": "best"}, {}),  # then each is scored
        ({"max_cycles": 1}, {}),
        ({}, {"stop": ["x"]}),
        ({}, {"stop_token_ids": [5]}),
        ({}, {"thinking_token_budget": 50}),  # vLLM begins it anew with each thought
        ({}, {"min_tokens": 5}),
        ({}, {"structured_outputs": StructuredOutputsParams(regex=".*")}),
        ({}, {"detokenize": False}),
    ],
)
async def test_what_needs_the_end_of_each_cycle_gets_it(rtap: dict[str, Any], wanted: dict[str, Any]):
    llm = whole(FIRST + SECOND)
    await all_of(ask(engine_of(llm), rtap=MODEL | {"threshold": 0.5} | rtap, **wanted)[0])
    # With stop strings as text: vLLM does not look for them in a stop token.
    ends = [CLOSE in call.params.stop_token_ids or "</answer>" in call.params.stop[1:] for call in llm.calls]
    assert all(ends)


@pytest.mark.parametrize("logprobs", [None, [{1: 1}, {CLOSE: 2}, {2: 3}]])
def test_an_output_is_cut_where_a_cycle_ends_in_it(logprobs):
    part = CompletionOutput(
        index=0, text="a</answer>b", token_ids=[1, CLOSE, 2], cumulative_logprob=None, logprobs=logprobs,
        finish_reason="length", stop_reason=None,
    )  # fmt: skip
    native = RequestOutput("r", None, [9], None, [part], finished=True)
    step = Step(part.text, part.token_ids, True, True, False, 1, 0, native, logprobs)
    head, rest = split_step(step, CLOSE, "</answer>")
    assert rest is not None
    for piece, text, ids, at, reason in ((head, "a</answer>", [1, CLOSE], slice(0, 2), None),
                                         (rest, "b", [2], slice(2, 3), "length")):  # fmt: skip
        own = piece.native.outputs[0]
        assert (piece.text, piece.token_ids, own.text, own.token_ids) == (text, ids, text, ids)
        assert piece.logprobs == own.logprobs == (None if logprobs is None else logprobs[at])
        assert (own.finish_reason, piece.native.finished) == (reason, reason is not None)
    assert (head.finished, head.truncated, rest.finished, rest.truncated) == (True, False, True, True)
    assert (native.outputs[0].text, native.finished) == ("a</answer>b", True)  # as it was


SPLIT: dict[str, Any] = {"reasoning_parser_kwargs": {}}  # the route separates reasoning from content


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("wanted", "content", "stop"),
    [
        ({"stop": ["*7"]}, "25", "*7"),
        ({"stop": ["none", "7-"]}, "25*", "7-"),
        ({"stop": "</think>"}, "25*7-93", None),
        ({"stop_token_ids": encode("*")}, "25", ord("*")),
        ({"stop_token_ids": encode("=<think></think><answer></answer>")}, "25*7-93", None),
    ],
)
async def test_stops_end_the_answer_at_their_token_however_it_arrives(wanted, content, stop, include, size, kind):
    text = "<think>25*7=175-93</think><answer>25*7-93</answer>"
    llm = FakeEngine([text], size=size)
    stream, state = ask(
        build(llm), rtap={"policy": "single"}, output_kind=kind, options=SPLIT, include_stop_str_in_output=include,
        **wanted,
    )  # fmt: skip
    outputs = await all_of(stream)
    parts = [output.outputs[0] for output in outputs]
    last = content + (("*7" if stop == "*7" else "7-" if stop == "7-" else "*") if include and stop else "")
    written = text if stop is None else text[: text.rindex({"*7": "-", "7-": "9"}.get(stop, "7"))]
    assert "".join(part.text for part in parts) == f"25*7=175-93{ANSWER_MARK}{last}"
    assert [i for part in parts for i in part.token_ids] == encode(written)
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == ("stop", stop)
    assert state.trajectories[0].answer == last
    (call,) = llm.calls
    assert (call.params.stop, call.params.stop_token_ids) == ([], [CLOSE])


@settings(deadline=None, max_examples=60)
@given(
    st.text(alphabet="ab \n<", max_size=12),
    st.sets(st.sampled_from(["b", "ab", "ba", "aab", "a\n", " b", "<a"]), max_size=3).map(sorted),
    st.sampled_from([RTAP, THINK]),
    st.sampled_from([{"policy": "single"}, {"policy": "vote", "samples": 1}]),
    st.sampled_from([RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY]),
    st.integers(1, 3),
    st.booleans(),
)
async def test_content_is_the_answer_up_to_the_first_stop(text, stops, fmt, rtap, kind, size, include):
    """However it is streamed. "first" is that which is complete first."""
    llm = FakeEngine([RTAP.render_cycle("t", text) if fmt is RTAP else THINK.render_cycle("t", text)], size=size)
    stream, state = ask(
        build(llm, format=fmt), rtap=rtap, output_kind=kind, options=SPLIT, stop=stops,
        include_stop_str_in_output=include, logprobs=0,
    )  # fmt: skip
    parts = [output.outputs[0] for output in await all_of(stream)]
    answer = text.lstrip()
    end, stop = min(((answer.index(s) + len(s), s) for s in stops if s in answer), default=(len(answer), None))
    wanted = answer[: end - (0 if include or stop is None else len(stop))]
    content = "".join(part.text for part in parts).partition(ANSWER_MARK)[2]
    assert content.strip() == wanted.strip()
    assert fmt is THINK or content == wanted.strip()
    assert (state.trajectories[0].answer or "") == wanted.strip()
    assert sum(len(part.token_ids) for part in parts) == sum(len(part.logprobs or ()) for part in parts)
    assert parts[-1].stop_reason == stop


async def test_the_stop_that_is_reported_is_that_of_the_returned_answer():
    llm = FakeEngine(["<think>a</think><answer>82*", "b</think><answer>7</answer>"])
    limits = {"threshold": 1.0, "max_cycles": 2}
    (output,) = await all_of(ask(build(llm), rtap=limits, options=SPLIT, stop=["*"])[0])
    (part,) = output.outputs
    assert (part.text.partition(ANSWER_MARK)[2], part.finish_reason, part.stop_reason) == ("82", "stop", "*")


async def test_a_stop_ends_the_engines_work():
    llm = FakeEngine(["<think>7</think><answer>8" + "x" * 900], size=1)
    await all_of(ask(build(llm), rtap={"policy": "single"}, options=SPLIT, stop=["xx"], max_tokens=1000)[0])
    assert (llm.num_closed, llm.num_sampled) == (1, len(encode("<think>7</think><answer>8xx")))


async def test_the_whole_text_of_a_completion_ends_at_a_stop_of_the_engine():
    llm = FakeEngine(["<think>7*8</think>"])  # ends at its stop token in the thought
    stream, state = ask(build(llm), stop_token_ids=encode("*"), stop=["x"])
    (output,) = await all_of(stream)
    (part,), (call,) = output.outputs, llm.calls
    assert (part.text, part.finish_reason, part.stop_reason) == ("<think>7", "stop", ord("*"))
    assert (state.trajectories[0].stop_reason, state.trajectories[0].answer) == ("model", None)
    assert (call.params.stop, call.params.stop_token_ids) == (["x"], [*encode("*"), CLOSE])


async def test_each_cycle_has_what_is_left_of_the_thinking_budget():
    llm = FakeEngine([FIRST, "Oops, 7</think><answer>7</answer>", "Oops</think><answer>9</answer>"])
    stream, state = ask(build(llm), thinking_token_budget=15)
    await all_of(stream)
    assert [call.params.thinking_token_budget for call in llm.calls] == [15, 10, 3]
    assert [cycle.think for cycle in state.trajectories[0].cycles] == ["3+4=8", "Oops, 7", "Oops"]
    assert state.trajectories[0].stop_reason == "max_tokens"
