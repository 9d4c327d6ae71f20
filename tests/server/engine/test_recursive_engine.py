"""RecursiveEngine over a scripted AsyncLLM: requests to the engine, outputs, aborts, token counts, failures."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.artifact import Artifact, Calibration
from rtap_core.format import PRESETS
from rtap_core.types import Policy
from rtap_server.engine.output_writer import ANSWER_MARK
from rtap_server.engine.request_state import RequestState, begin_request, salted_prompt
from rtap_server.engine.vllm_cycles import count_spent
from rtap_server.settings import Settings
from rtap_server.telemetry.logs import ERRORS
from tests.core.scripted import EOS, encode
from tests.costs import async_cpu_seconds
from tests.server.fake_engine import CLOSE, QUESTION, FakeEngine, all_of, ask, build

WRONG = "<think>25*7=175</think><answer>25*7</answer>"
DOUBT = "Oops, 3*25+7=82</think><answer>3*25+7</answer>"
THINK = encode("<think>")[0]


async def test_every_cycle_is_the_same_request_on_more_tokens():
    """Adapter, priority, session, salt, trace and images are of the request, so each cycle has them."""
    llm = FakeEngine([WRONG, DOUBT])
    options = {"lora_request": None, "priority": 3, "session_id": "s", "trace_headers": {"traceparent": "00-1"}}
    prompt = {"type": "multimodal", "prompt_token_ids": QUESTION, "prompt": "make 82?", "cache_salt": "salt",
              "arrival_time": 1.0, "mm_kwargs": object(), "mm_hashes": {"image": ["h"]}}  # fmt: skip
    stream, state = ask(build(llm), prompt=prompt, options=options)
    (output,) = await all_of(stream)
    assert [call.prompt["prompt_token_ids"] for call in llm.calls] == [
        QUESTION,
        [*QUESTION, *encode(WRONG + "<think>")],
    ]
    for asked, _, _, passed in llm.calls:
        assert {k: asked[k] for k in ("cache_salt", "mm_kwargs", "mm_hashes", "type")} == {
            k: prompt[k] for k in ("cache_salt", "mm_kwargs", "mm_hashes", "type")
        }
        assert passed == options
    assert "arrival_time" in llm.calls[0][0]
    assert {"prompt", "arrival_time"}.isdisjoint(llm.calls[1][0])  # both are of the first part only
    assert (output.request_id, output.finished, output.prompt) == ("request", True, "make 82?")
    assert output.outputs[0].text == WRONG + "<think>" + DOUBT
    assert list(output.outputs[0].token_ids) == encode(WRONG + "<think>" + DOUBT)
    assert state.trajectories[0].answer == "3*25+7"


@pytest.mark.parametrize(
    ("fmt", "prompt", "is_ended"),
    [
        ("rtap", "hi", False),
        ("think", "hi", False),
        ("think", "hi<think>\n", False),
        ("think", "hi<think>\n\n</think>\n\n", True),  # Qwen3, thinking disabled
        ("text", "hi</think>", True),
    ],
)
async def test_a_grammar_begins_where_the_answer_does(fmt, prompt, is_ended):
    llm = FakeEngine(["7"], ends_turn=True)
    engine, options = build(llm, format=PRESETS[fmt]), {"reasoning_parser_kwargs": {}}
    stream, _ = ask(engine, rtap={"policy": "single"}, prompt={"prompt_token_ids": encode(prompt)}, options=options)
    await all_of(stream)
    assert llm.calls[0].options["reasoning_ended"] is is_ended


@pytest.mark.parametrize(
    ("rtap", "wanted", "asked"),
    [
        ({}, None, 0),
        ({}, 3, 3),
        ({"policy": "single"}, None, None),  # nothing scores it
        ({"policy": "model"}, 2, 2),
        ({"policy": "model", "select": "best"}, None, 0),
        ({"policy": "vote", "samples": 2}, None, 0),
    ],
)
async def test_log_probabilities_are_asked_for_where_a_scorer_reads_them(rtap, wanted, asked):
    llm = FakeEngine([WRONG.replace("25*7<", "82<")] * 3)
    engine = build(llm, logprobs=0)
    outputs = await all_of(ask(engine, rtap={"max_cycles": 1} | rtap, logprobs=wanted)[0])
    assert {call.params.logprobs for call in llm.calls} == {asked}
    assert (outputs[-1].outputs[0].logprobs is None) == (wanted is None)  # the client sees what it asked for


async def test_the_budget_seed_and_stops_of_each_cycle():
    llm = FakeEngine([WRONG, DOUBT])
    await all_of(ask(build(llm), seed=7, min_tokens=5, stop=["x"], prompt_logprobs=2)[0])
    first, second = (call.params for call in llm.calls)
    assert (first.seed, second.seed) == (7, 7 + 1_000_003)
    assert (first.max_tokens, second.max_tokens) == (200, 200 - len(encode(WRONG)) - 1)
    assert (first.min_tokens, second.min_tokens) == (5, 0)
    assert (first.prompt_logprobs, second.prompt_logprobs) == (2, None)
    for params in (first, second):
        assert (params.n, params.stop) == (1, ["x"])
        assert CLOSE in params.stop_token_ids
    assert [call.request_id for call in llm.calls] == ["request-0", "request-1"]


async def test_choices_have_their_own_seeds_and_come_together():
    llm = FakeEngine([WRONG, DOUBT])
    (output,) = await all_of(ask(build(llm), n=2, seed=1)[0])
    assert [part.index for part in output.outputs] == [0, 1]
    assert {call.params.seed for call in llm.calls} == {1, 2, 1 + 1_000_003, 2 + 1_000_003}


async def test_of_choices_that_end_at_once_the_last_output_is_the_finished_one():
    outputs = await all_of(ask(build(FakeEngine([WRONG, DOUBT])), n=3, output_kind=RequestOutputKind.DELTA)[0])
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert sorted(o.outputs[0].index for o in outputs if o.outputs[0].finish_reason) == [0, 1, 2]


async def test_patience_ends_a_request_whose_confidence_does_not_rise():
    llm = FakeEngine([WRONG, WRONG.removeprefix("<think>"), DOUBT])
    stream, state = ask(build(llm), rtap={"patience": 1})
    await all_of(stream)
    assert state.trajectories[0].stop_reason == "no_gain"
    assert len(llm.calls) == 2


async def test_a_cycle_is_one_output_when_the_request_wants_one():
    llm = FakeEngine([WRONG, DOUBT])
    await all_of(ask(build(llm))[0])
    assert {call.params.output_kind for call in llm.calls} == {RequestOutputKind.FINAL_ONLY}


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_a_cycle_that_the_engine_gives_up_ends_the_request_with_its_reason(reason: str):
    llm = FakeEngine([WRONG], finish_reason=reason)
    stream, state = ask(build(llm))
    (output,) = await all_of(stream)
    assert (output.finished, output.outputs[0].finish_reason) == (True, reason)
    assert not state.trajectories


async def test_an_abort_by_the_routes_id_ends_the_running_cycle():
    llm = FakeEngine([WRONG], size=1)
    engine = build(llm)
    stream, state = ask(engine, output_kind=RequestOutputKind.DELTA)
    async with aclosing(stream):
        await anext(stream)
        await engine.abort("request")
        rest = [output async for output in stream]
    assert llm.aborted == ["request-0"]
    assert (rest[-1].finished, rest[-1].outputs[0].finish_reason) == (True, "abort")
    assert not state.trajectories
    await engine.abort(["request", "other"])
    assert llm.aborted == ["request-0"]  # nothing runs under these ids


async def test_a_client_that_leaves_closes_the_running_cycle():
    llm = FakeEngine([WRONG], size=1)
    stream, _ = ask(build(llm), output_kind=RequestOutputKind.DELTA)
    await anext(stream)
    await stream.aclose()
    assert (llm.num_closed, llm.num_sampled) == (1, 1)


async def test_a_deadline_ends_no_other_request_under_the_same_id():
    llm = FakeEngine([DOUBT], size=1, token_seconds=0.005)
    engine = build(llm)
    asked = [ask(engine, rtap=rtap) for rtap in ({}, {"deadline_seconds": 0.05}, {})]
    outputs = await asyncio.gather(*(all_of(stream) for stream, _ in asked))
    assert [state.trajectories[0].stop_reason for _, state in asked] == ["threshold", "deadline", "threshold"]
    assert [state.trajectories[0].answer for _, state in asked] == ["3*25+7", None, "3*25+7"]
    assert [output.request_id for (output,) in outputs] == ["request"] * 3
    (aborted,) = set(llm.aborted)
    assert [call.request_id for call in llm.calls].count(aborted) == 1
    assert all(state.request_id not in call.request_id for call in llm.calls for _, state in asked)


async def test_a_request_that_does_not_recurse_is_the_engines_own():
    llm = FakeEngine([WRONG])
    begin_request(state := RequestState())
    params = SamplingParams(max_tokens=9)
    (output,) = await all_of(build(llm).generate({"prompt_token_ids": QUESTION}, params, "plain", priority=1))
    assert llm.calls == [({"prompt_token_ids": QUESTION}, params, "plain-0", {"priority": 1})]
    assert output.request_id == "plain"
    assert state.spent_tokens == 0  # only API keys have token limits


def test_what_cannot_recurse_is_a_400_before_anything_is_generated():
    llm = FakeEngine([])
    with pytest.raises(VLLMValidationError, match="prompt embeddings are not supported"):
        ask(build(llm), prompt={"prompt_embeds": object()})
    with pytest.raises(VLLMValidationError, match="out-of-vocab"):
        ask(build(llm), stop_token_ids=[EOS + 1], options={"reasoning_parser_kwargs": {}})
    assert not llm.calls


@pytest.mark.parametrize("split", [True, False])
async def test_what_the_engine_says_of_its_cycles_is_said_of_the_request(split: bool):
    llm = FakeEngine([WRONG, DOUBT], size=1, cached_tokens=10)
    options = {"reasoning_parser_kwargs": {}} if split else {}
    prompt = {"prompt_token_ids": QUESTION, "prompt": "what?"}
    stream, state = ask(
        build(llm, logprobs=0), prompt=prompt, n=2, output_kind=RequestOutputKind.DELTA, max_tokens=None,
        options=options,
    )  # fmt: skip
    outputs = await all_of(stream)
    assert all(call.params.logprobs == 0 for call in llm.calls)  # for the scorer, not for the client
    for choice in (0, 1):
        own = [output for output in outputs if output.outputs[0].index == choice]
        assert len(own) > 20
        written = [token_id for output in own for token_id in output.outputs[0].token_ids]
        assert len(written) == sum(cycle.tokens for cycle in state.trajectories[choice].cycles)
        assert [output.outputs[0].finish_reason for output in own] == [None] * (len(own) - 1) + ["stop"]
        assert len({(output.num_cached_tokens, output.num_cache_creation_tokens) for output in own[1:]}) == 1
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for output in outputs:
        assert (output.request_id, output.prompt, output.prompt_token_ids) == ("request", "what?", QUESTION)
        assert output.outputs[0].logprobs is None


@pytest.mark.parametrize("split", [True, False])
async def test_a_stream_begins_with_the_first_token_though_that_may_be_a_tag(split: bool):
    """vLLM sends the role with the first output, and clients take the time until then."""
    llm = FakeEngine(["<think>" + DOUBT], size=1)
    options = {"reasoning_parser_kwargs": {}} if split else {}
    stream, state = ask(build(llm), output_kind=RequestOutputKind.DELTA, max_tokens=None, options=options)
    async with aclosing(stream):
        first = (await anext(stream)).outputs[0]
        assert (llm.num_sampled, first.text, list(first.token_ids)) == (
            1,
            *(("", []) if split else ("<think>", [THINK])),
        )
        rest = [output.outputs[0] async for output in stream]
    assert all(part.text or part.token_ids or part.finish_reason for part in rest)
    assert sum(len(part.token_ids) for part in (first, *rest)) == state.trajectories[0].cycles[0].tokens


async def test_no_delta_is_of_both_kinds():
    """vLLM takes reasoning by the one name that it knows out of those that have an answer as well."""
    llm = FakeEngine(["<think>3</think><answer>82</answer>", "<think>4</think><answer>1</answer>"], size=1)
    stream, state = ask(
        build(llm), rtap={"threshold": 1.0, "max_cycles": 2}, output_kind=RequestOutputKind.DELTA,
        options={"reasoning_parser_kwargs": {}},
    )  # fmt: skip
    texts = [output.outputs[0].text for output in await all_of(stream)]
    assert state.trajectories[0].selected == 0
    assert "".join(texts).endswith(f"<answer>1</answer>\n{ANSWER_MARK}82")
    assert texts[-4:] == [ANSWER_MARK, "8", "2", ""]  # the last one has the end tag and the finish reason


@pytest.mark.parametrize("split", [True, False])
async def test_a_token_costs_the_same_however_many_came_before(split: bool):
    """Parser, loop and writer over two cycles of each length; 4x the tokens may cost 4x the time."""

    async def seconds(size: int) -> float:
        script = [f"<think>{'x' * size}</think><answer>1</answer>", f"{'y' * size}</think><answer>82</answer>"]
        options = {"reasoning_parser_kwargs": {}} if split else {}

        async def answer() -> None:
            stream, state = ask(
                build(FakeEngine(script, size=1)), output_kind=RequestOutputKind.DELTA, max_tokens=None, options=options
            )
            outputs = await all_of(stream)
            assert state.trajectories[0].answer == "82"
            assert sum(len(o.outputs[0].token_ids) for o in outputs) > 2 * size

        return await async_cpu_seconds(answer)

    short, long = await seconds(3_000), await seconds(12_000)
    assert long < 8 * short  # quadratic would be 16 times; a margin for a noisy machine


async def test_a_long_thought_does_not_keep_what_the_engine_told_of_each_token():
    """An engine's objects weigh a thousand times what a token id does."""
    told: list[weakref.ref[RequestOutput]] = []

    class Watched(FakeEngine):
        async def generate(self, prompt: Any, params: SamplingParams, request_id: str, **options: Any):
            async for output in super().generate(prompt, params, request_id, **options):
                told.append(weakref.ref(output))
                yield output

    script = [f"<think>{'x' * 500}</think><answer>1</answer>", f"{'y' * 500}</think><answer>82</answer>"]
    stream, _ = ask(build(Watched(script, size=1)), output_kind=RequestOutputKind.DELTA, max_tokens=None)
    most = 0
    async for _ in stream:
        most = max(most, sum(ref() is not None for ref in told))
    assert len(told) > 1000
    assert most < 10


async def test_nothing_of_a_request_waits_for_the_garbage_collector():
    """A server collects seldom, because most of its objects stay."""
    engine = build(FakeEngine([WRONG, DOUBT], arrival_seconds=0.05))
    gc.collect()
    gc.disable()
    try:
        await all_of(ask(engine)[0])
        await all_of(ask(engine, n=2)[0])
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = {type(thing) for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not {kind for kind in found if kind.__module__.startswith("rtap_")}


async def test_a_key_pays_for_what_was_sampled_and_read_even_when_its_client_leaves():
    """Two cycles: the question, what was written and the injected tag are read; the script is what was sampled."""
    llm = FakeEngine([WRONG, DOUBT])
    stream, left = ask(build(llm), output_kind=RequestOutputKind.DELTA, owner=b"key")
    async for _ in stream:
        break  # after the first cycle
    await stream.aclose()
    once = len(QUESTION) + len(encode(WRONG))
    assert left.spent_tokens == once
    stream, stayed = ask(build(llm), owner=b"key")
    await all_of(stream)
    second = len(QUESTION) + len(encode(WRONG + "<think>")) + len(encode(DOUBT))
    assert stayed.spent_tokens == once + second
    assert {call.prompt["cache_salt"] for call in llm.calls} == {salted_prompt({})["cache_salt"]}
    begin_request(plain := RequestState(owner=b"key"))
    await all_of(build(llm).generate({"prompt_token_ids": QUESTION}, SamplingParams(max_tokens=9), "plain"))
    assert plain.spent_tokens == len(QUESTION) + 9


async def test_a_key_with_a_token_limit_pays_for_a_whole_reply_that_it_does_not_wait_for():
    llm = FakeEngine(["<think>" + "x" * 10_000], size=1, token_seconds=0.001)
    stream, state = ask(build(llm), owner=b"key", max_tokens=None)
    state.tokens_per_minute = 1_000
    with suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await all_of(stream)
    assert state.spent_tokens - len(QUESTION) in range(1, llm.num_sampled + 1)


async def test_without_api_keys_no_tokens_are_counted():
    stream, state = ask(build(FakeEngine([WRONG, DOUBT])))
    await all_of(stream)
    assert state.spent_tokens == 0


@pytest.mark.parametrize("kind", list(RequestOutputKind))
async def test_tokens_are_counted_once_in_every_kind_of_output(kind):
    def output(n: int, index: int, ids: list[int]) -> RequestOutput:
        part = CompletionOutput(index, "", ids, None, None)
        return RequestOutput("r", None, [1, 2, 3], None, [part], finished=n == 3, num_cached_tokens=1)

    async def outputs() -> AsyncGenerator[RequestOutput, None]:
        """Four tokens in two choices."""
        if kind is RequestOutputKind.FINAL_ONLY:
            yield output(3, 0, [7, 8])
            yield output(3, 1, [7, 8])
            return
        for n, (index, first, second) in enumerate([(0, 7, 8), (1, 7, 8)]):
            yield output(2 * n, index, [first])
            yield output(2 * n + 1, index, [second] if kind is RequestOutputKind.DELTA else [first, second])

    state = RequestState()
    assert len([o async for o in count_spent(outputs(), state, kind)]) >= 2
    assert state.spent_tokens == 2 + 4


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
@pytest.mark.parametrize(("script", "answer"), [([WRONG], "25*7"), ([], None)])
async def test_at_the_deadline_the_engine_is_stopped_and_what_there_is_comes_back(kind, script, answer):
    # Later calls arrive after the deadline: the engine ignores an abort before that.
    llm = FakeEngine(
        [*script, "x" * 10_000], size=1, arrival_seconds=0.08, token_seconds=0.001, num_instant=len(script)
    )
    stream, state = ask(build(llm), rtap={"deadline_seconds": 0.05}, output_kind=kind, max_tokens=None)
    async with asyncio.timeout(5):
        outputs = await all_of(stream)
    done = state.trajectories[0]
    assert (done.stop_reason, done.answer) == ("deadline", answer)
    assert outputs[-1].outputs[0].finish_reason == ("stop" if answer else "length")
    assert done.cycles[-1].tokens > 0  # sampled for it, though nobody saw them coming


async def test_a_deadline_counts_from_the_arrival_of_the_request():
    llm = FakeEngine(["x" * 10_000], size=1, token_seconds=0.001)
    stream, state = ask(build(llm), rtap={"deadline_seconds": 60}, max_tokens=None)
    state.started -= 60  # spent before the engine was asked
    async with asyncio.timeout(5):
        await all_of(stream)
    assert state.trajectories[0].stop_reason == "deadline"


async def test_a_drain_ends_what_runs_and_what_begins_after_it():
    llm = FakeEngine([WRONG, "x" * 10_000], size=1, arrival_seconds=0.1, token_seconds=0.001, num_instant=1)
    engine = build(llm)
    stream, state = ask(engine, max_tokens=None)
    running = asyncio.create_task(all_of(stream))
    await asyncio.sleep(0.05)
    engine._server.drain.end()
    await running
    assert (state.trajectories[0].stop_reason, state.trajectories[0].answer) == ("drained", "25*7")
    stream, state = ask(engine, max_tokens=None)
    async with asyncio.timeout(5):
        await all_of(stream)
    assert state.trajectories[0].stop_reason == "drained"


async def test_what_the_engine_gives_up_during_a_drain_is_answered_as_it_is():
    """Ctrl-C reaches the engine's process as well."""
    llm = FakeEngine([WRONG], finish_reason="abort")
    engine = build(llm)
    engine._server.drain.begin()
    stream, state = ask(engine)
    await all_of(stream)
    assert state.trajectories[0].stop_reason == "drained"


async def test_every_token_id_has_its_own_logprob_injected_tags_included():
    """vLLM's completions and responses look each id up in its entry; an empty entry is a 500."""
    stream, _ = ask(build(FakeEngine([WRONG, DOUBT], size=1)), output_kind=RequestOutputKind.DELTA, logprobs=0)
    parts = [output.outputs[0] for output in await all_of(stream)]
    entries = [pair for part in parts for pair in zip(part.token_ids, part.logprobs, strict=True)]
    assert len(entries) == len(encode(WRONG + "<think>" + DOUBT))
    assert all(token_id in entry for token_id, entry in entries)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("recurses", [True, False])
async def test_a_failure_of_the_engine_is_logged_once_under_the_request_id(caplog, n, recurses):
    def crash(_: str) -> str:
        raise RuntimeError("weights at 0x7f")

    engine = build(FakeEngine(crash))
    if recurses:
        stream, state = ask(engine, n=n)
    else:
        begin_request(state := RequestState("of-the-client"))
        stream = engine.generate({"prompt_token_ids": QUESTION}, SamplingParams(n=n), "plain")
    with pytest.raises(RuntimeError, match="weights"):
        await all_of(stream)
    assert state.is_failure_logged
    (record,) = [record for record in caplog.records if record.name == ERRORS]
    assert (record.levelname, record.getMessage()) == ("ERROR", "request of-the-client failed")
    text = logging.Formatter().format(record)
    assert "RuntimeError: weights at 0x7f" in text
    assert "in crash" in text


@pytest.mark.parametrize("error", [VLLMValidationError("too long"), ValueError("too long")])
async def test_a_request_that_the_engine_refuses_is_no_failure(caplog, error):
    def refuse(_: str) -> str:
        raise error

    stream, state = ask(build(FakeEngine(refuse)))
    with pytest.raises(type(error), match="too long"):
        await all_of(stream)
    assert not state.is_failure_logged
    assert not [record for record in caplog.records if record.name == ERRORS]


CALIBRATIONS = [(Artifact(), False), (Artifact(calibration=Calibration(reference=(1.0,))), True)]


@pytest.mark.parametrize(("artifact", "is_calibrated"), CALIBRATIONS)
@pytest.mark.parametrize("kind", ["yesno", "logprob"])
async def test_votes_weigh_answers_only_by_calibrated_confidences(artifact, is_calibrated, kind):
    """An uncalibrated source may be sure of every answer: then the most frequent one is returned."""
    answers = iter(("7", "7", "82"))
    llm = FakeEngine(lambda _: f"<think>a</think><answer>{next(answers)}</answer>")
    engine = build(llm, generator=artifact, settings=Settings(confidence=kind))
    stream, state = ask(engine, rtap={"policy": "vote", "samples": 3, "threshold": 1.0})
    await all_of(stream)
    trajectory = state.trajectories[0]
    assert trajectory.answer == ("82" if is_calibrated else "7")
    assert {cycle.confidence for cycle in trajectory.cycles} == ({0.1, 0.9} if is_calibrated else {None})
    assert engine._server.scorer(Policy.CONFIDENCE) is engine._server.confidence  # which still orders cycles
