"""Cycles from one engine request equal those from several. The engine is scripted; tests/e2e has vLLM."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from rtap_core.types import Cycle, Step
from rtap_server.engine.output_writer import ANSWER_MARK
from rtap_server.engine.recursive_engine import RecursiveEngine
from rtap_server.engine.vllm_cycles import split_step
from tests.core.scripted import EOS, decode, encode
from tests.server.engine.test_recursive_engine import all_of, ask, build

FIRST, SECOND = "<think>3+4=8</think><answer>8</answer>", "<think>Oops, 7</think><answer>7</answer>"
CLOSE = encode("</answer>")[0]
MODEL = {"policy": "model", "max_cycles": 4, "threshold": None}


@dataclass
class Whole:
    """Writes ``text`` and the end of the turn, ``size`` tokens an output; stops where it is told to, as vLLM does."""

    text: str
    size: int = 1
    calls: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    written: int = 0
    closed: int = 0

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        asked, question = list(prompt["prompt_token_ids"]), len(self.calls) and self.calls[0][0]
        self.calls.append((asked, params))
        ids = [*encode(self.text), EOS][len(asked) - len(question or asked) :][: params.max_tokens] or [EOS]
        stops = [*(params.stop_token_ids or ()), EOS]
        end = next((n for n, i in enumerate(ids, 1) if i in stops), len(ids))
        reason = "stop" if ids[end - 1] in stops else "length"
        pieces = [ids[n : min(n + self.size, end)] for n in range(0, end, self.size)]
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            pieces = [ids[:end]]
        try:
            for number, piece in enumerate(pieces, 1):
                is_last = number == len(pieces)
                shown = piece[:-1] if is_last and reason == "stop" else piece  # not the token that it stopped at
                part = CompletionOutput(
                    index=0, text=decode(shown), token_ids=piece, cumulative_logprob=None,
                    logprobs=None if params.logprobs is None else [{i: Logprob(-0.5, 1, "x")} for i in piece],
                    finish_reason=reason if is_last else None,
                    stop_reason=piece[-1] if is_last and piece[-1] != EOS else None,
                )  # fmt: skip
                self.written += len(piece)
                yield RequestOutput(
                    request_id=request_id, prompt=None, prompt_token_ids=asked, prompt_logprobs=None, outputs=[part],
                    finished=is_last, num_cached_tokens=0,
                )  # fmt: skip
        except (GeneratorExit, asyncio.CancelledError):
            self.closed += 1
            raise

    async def abort(self, request_ids: Any, **options: Any) -> None: ...


def engine_of(llm: Whole, *, shows_cycle_end: bool = True) -> RecursiveEngine:
    engine = build(llm)  # type: ignore[arg-type]
    engine._server = replace(engine._server, shows_cycle_end=shows_cycle_end)
    return engine


def told(outputs: list[RequestOutput]) -> tuple[str, list[int], list[Any], str | None]:
    """Text, ids, log-probabilities and finish reason of what a client sees."""
    parts = [output.outputs[0] for output in outputs]
    return (
        "".join(part.text for part in parts),
        [i for part in parts for i in part.token_ids],
        [entry for part in parts for entry in part.logprobs or ()],
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
        llm = Whole(text, size)
        stream, state = ask(
            engine_of(llm, shows_cycle_end=shows), rtap=MODEL | rtap, output_kind=kind, max_tokens=max_tokens,
            logprobs=0, options=options,
        )  # fmt: skip
        outputs = await all_of(stream)
        done = state.trajectories[0]
        cycles = [(c.think, c.answer, c.tokens, c.answer_tokens, c.oops_tokens, c.accepted) for c in done.cycles]
        found.append((told(outputs), cycles, done.stop_reason, done.selected, len(llm.calls)))
    assert found[0][:4] == found[1][:4]
    assert found[0][4] == 1
    if len(encode(FIRST)) < max_tokens and "<" in text:
        assert found[1][4] > 1
    if split and found[0][1][-1][1]:
        assert ANSWER_MARK + found[0][1][-1][1] in found[0][0][0]


async def test_each_cycle_says_that_nothing_was_read_again():
    stream, state = ask(engine_of(Whole(FIRST + SECOND)), rtap=MODEL)
    await all_of(stream)
    first, second = state.trajectories[0].cycles
    assert (first.prompt_tokens, first.cached_tokens) == (len(encode("make 82?")), 0)
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

    spans, engine = Spans(), engine_of(Whole(FIRST + SECOND))
    engine._tracing = SimpleNamespace(start_cycles=lambda *_: spans)  # type: ignore[assignment]
    await all_of(ask(engine, rtap=MODEL)[0])
    assert spans.begun[:2] == spans.ended == [0, 1]


async def test_the_engine_is_stopped_after_the_last_cycle_that_is_wanted():
    llm = Whole(FIRST + SECOND * 9)
    stream, state = ask(engine_of(llm), rtap=MODEL | {"max_cycles": 2})
    await all_of(stream)
    assert (llm.closed, llm.written) == (1, len(encode(FIRST + SECOND)))
    assert state.trajectories[0].discarded_tokens == 0
    llm = Whole(FIRST + SECOND * 9, size=len(encode(FIRST + SECOND)) + 3)
    stream, state = ask(engine_of(llm), rtap=MODEL | {"max_cycles": 2})
    await all_of(stream)
    assert state.trajectories[0].discarded_tokens == 3  # the engine had told of them already


async def test_a_client_that_leaves_stops_the_engine():
    llm = Whole(FIRST + SECOND)
    stream, _ = ask(engine_of(llm), rtap=MODEL, output_kind=RequestOutputKind.DELTA)
    async with aclosing(stream):
        async for _ in stream:
            if llm.written > len(encode(FIRST)):
                break
    assert llm.closed == 1


@pytest.mark.parametrize(
    ("rtap", "wanted"),
    [
        ({"policy": "confidence"}, {}),
        ({"policy": "single"}, {}),
        ({"select": "best"}, {}),  # then each is scored
        ({"max_cycles": 1}, {}),
        ({}, {"stop": ["x"]}),  # held back by the engine, so that text and tokens part
        ({}, {"min_tokens": 5}),
        ({}, {"structured_outputs": StructuredOutputsParams(regex=".*")}),
        ({}, {"detokenize": False}),
    ],
)
async def test_what_needs_the_end_of_each_cycle_gets_it(rtap: dict[str, Any], wanted: dict[str, Any]):
    llm = Whole(FIRST + SECOND)
    await all_of(ask(engine_of(llm), rtap=MODEL | {"threshold": 0.5} | rtap, **wanted)[0])
    assert all(CLOSE in params.stop_token_ids for _, params in llm.calls)


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
