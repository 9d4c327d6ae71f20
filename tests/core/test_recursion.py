"""The Think–Answer loop over a scripted engine."""

import asyncio
import re
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.cutoff import Cutoff
from rtap_core.draft import num_thought_tokens
from rtap_core.format import RTAP, TEXT, THINK
from rtap_core.recursion import CycleEvent, DraftEvent, FinalEvent, Recursion, StepEvent
from rtap_core.types import Continuation, Limits, Policy, Select, StopReason
from tests.core.scripted import EOS, ScriptedConfidence, ScriptedEngine, decode, encode

QUESTION = encode("make 82?")
WRONG = "<think>25*7=175</think><answer>25*7</answer>"
DOUBT = "Oops, no. 3*25+7=82</think><answer>3*25+7</answer>"


async def _run(engine, limits, confidence=None, fmt=RTAP):
    with Cutoff(limits.deadline_seconds) as cutoff:
        engine.cutoff = cutoff
        loop = Recursion(engine, fmt, confidence, lambda text: text.count("Oops"), cutoff=cutoff)
        events = [event async for event in loop.run(QUESTION, limits)]
    assert isinstance(events[-1], FinalEvent)
    assert sum(isinstance(e, FinalEvent) for e in events) == 1
    return events, events[-1].trajectory


def _right_is_confident(text: str) -> float:
    return 0.9 if "3*25+7</answer>" in text else 0.2


async def test_a_rejected_cycle_is_followed_by_one_that_sees_it():
    engine, scorer = ScriptedEngine([WRONG, DOUBT]), ScriptedConfidence(_right_is_confident)
    events, done = await _run(engine, Limits(threshold=0.5), scorer)
    assert (done.stop_reason, done.answer, done.confidence) == (StopReason.THRESHOLD, "3*25+7", 0.9)
    assert engine.prompts[1] == QUESTION + encode(WRONG) + encode("<think>")
    assert [c.accepted for c in done.cycles] == [False, True]
    assert [c.oops_tokens for c in done.cycles] == [0, 1]
    assert [c.confidence for c in done.cycles] == [0.2, 0.9]
    cycle_events = [e for e in events if isinstance(e, CycleEvent)]
    assert [e.stop for e in cycle_events] == [None, StopReason.THRESHOLD]


async def test_each_cycle_is_scored_alone_with_the_question():
    engine, scorer = ScriptedEngine([WRONG, DOUBT]), ScriptedConfidence(_right_is_confident)
    await _run(engine, Limits(threshold=0.5), scorer)
    assert [list(j.question_token_ids) for j in scorer.judged] == [QUESTION, QUESTION]
    assert decode(scorer.judged[1].cycle_token_ids) == "<think>" + DOUBT


async def test_a_scorer_gets_the_context_of_a_cycle_and_the_request():
    engine, scorer = ScriptedEngine([WRONG, DOUBT]), ScriptedConfidence(_right_is_confident)
    loop = Recursion(engine, RTAP, scorer, lambda _: 0, request="the call")
    async with aclosing(loop.run(QUESTION, Limits(threshold=0.5))) as events:
        async for _ in events:
            pass
    first, second = scorer.judged
    assert [first.request, second.request] == ["the call", "the call"]
    assert list(first.context_token_ids) == QUESTION
    assert list(second.context_token_ids) == QUESTION + encode(WRONG)
    written = engine.prompts[1] + encode(DOUBT)
    assert [*second.context_token_ids, *second.cycle_token_ids] == written


async def test_reasoning_is_every_token_but_the_returned_answers():
    _, done = await _run(ScriptedEngine([WRONG, DOUBT]), Limits(threshold=0.5), ScriptedConfidence(_right_is_confident))
    written = len(encode(WRONG + "<think>" + DOUBT))
    assert done.reasoning_tokens == written - len(encode("<answer>3*25+7</answer>"))
    assert replace(done, selected=None).reasoning_tokens == written


async def test_every_token_comes_exactly_once_and_counted():
    engine = ScriptedEngine([WRONG, DOUBT])
    events, done = await _run(engine, Limits(threshold=0.5), ScriptedConfidence(_right_is_confident))
    ids = [i for e in events if isinstance(e, StepEvent) for i in e.step.token_ids]
    assert ids == encode(WRONG) + encode("<think>") + encode(DOUBT)
    assert sum(c.tokens for c in done.cycles) == len(ids)
    assert done.cycles[1].answer_tokens == len(encode("<answer>3*25+7</answer>"))


async def test_best_so_far_is_returned_at_max_cycles():
    scores = iter([0.1, 0.4, 0.3])
    engine = ScriptedEngine(
        ["<think>a</think><answer>1</answer>", "b</think><answer>2</answer>", "c</think><answer>3</answer>"]
    )
    _, done = await _run(engine, Limits(threshold=0.5, max_cycles=3), ScriptedConfidence(lambda _: next(scores)))
    assert (done.stop_reason, done.answer, done.selected) == (StopReason.MAX_CYCLES, "2", 1)
    assert [c.accepted for c in done.cycles] == [False, True, False]


async def test_single_writes_one_cycle_and_scores_nothing():
    scorer = ScriptedConfidence(_right_is_confident)
    _, done = await _run(ScriptedEngine([WRONG]), Limits(policy=Policy.SINGLE), scorer)
    assert (done.stop_reason, done.answer, len(done.cycles)) == (StopReason.MAX_CYCLES, "25*7", 1)
    assert scorer.judged == []


async def test_model_policy_lets_the_model_continue_and_end():
    engine = ScriptedEngine([WRONG, "<think>" + DOUBT, "$"])
    limits = Limits(policy=Policy.MODEL, select=Select.LAST)
    events, done = await _run(engine, limits)
    assert (done.stop_reason, done.answer, len(done.cycles)) == (StopReason.MODEL, "3*25+7", 2)
    assert engine.prompts[1] == QUESTION + encode(WRONG)  # nothing injected
    assert done.cycles[-1].tokens == len(encode("<think>" + DOUBT)) + 1  # the end of turn counts, as in plain vLLM
    order = [e.cycle.index if isinstance(e, CycleEvent) else "s" for e in events[:-1]]
    assert [o for o in order if o != "s"] == [0, 1]
    assert order.index(0) == len(encode(WRONG)) + 1  # once the model has written more than a tag


async def test_model_policy_that_ends_within_the_cycle_stops():
    _, done = await _run(ScriptedEngine(["<think>a</think>$"]), Limits(policy=Policy.MODEL, select=Select.LAST))
    assert (done.stop_reason, done.answer) == (StopReason.MODEL, None)


async def test_the_end_of_turn_is_dropped_before_the_loop_goes_on():
    engine = ScriptedEngine(["<think>a</think>75$", "b</think>82$"])
    scorer = ScriptedConfidence(lambda text: 0.9 if text.endswith("82") else 0.1)
    _, done = await _run(engine, Limits(threshold=0.5), scorer, fmt=THINK)
    assert (done.stop_reason, done.answer) == (StopReason.THRESHOLD, "82")
    assert EOS not in engine.prompts[1]
    assert decode(engine.prompts[1]) == "make 82?<think>a</think>75<think>"


async def test_an_answer_that_ended_with_the_turn_is_closed_before_the_loop_goes_on():
    """A grammar binds an answer up to the end of the turn, so the model cannot write the tag after it."""
    unclosed = WRONG.removesuffix("</answer>")
    engine, scorer = ScriptedEngine([unclosed + "$", DOUBT]), ScriptedConfidence(_right_is_confident)
    events, done = await _run(engine, Limits(threshold=0.5), scorer)
    assert decode(scorer.judged[0].cycle_token_ids) == WRONG
    assert engine.prompts[1] == QUESTION + encode(WRONG) + encode("<think>")
    ids = [i for e in events if isinstance(e, StepEvent) for i in e.step.token_ids]
    assert ids == [*encode(unclosed), EOS, *encode("</answer><think>" + DOUBT)]
    assert sum(c.tokens for c in done.cycles) == len(ids)
    assert "".join(e.step.text for e in events if isinstance(e, StepEvent)) == WRONG + "<think>" + DOUBT


async def test_an_engine_that_fails_fails_the_trajectory_after_the_cycles_before_it():
    class Failing(ScriptedEngine):
        async def cycle(self, prompt_token_ids, *, index, max_tokens):
            if index:
                raise RuntimeError("the engine is gone")
            async for step in super().cycle(prompt_token_ids, index=index, max_tokens=max_tokens):
                yield step

    seen = []

    async def read():
        loop = Recursion(Failing([WRONG]), RTAP, ScriptedConfidence(_right_is_confident), lambda _: 0)
        async for event in loop.run(QUESTION, Limits(threshold=0.5)):
            seen.append(event)

    with pytest.raises(RuntimeError, match="the engine is gone"):
        await read()
    assert isinstance(seen[-2], CycleEvent)  # then the opening of the second cycle


class _Clock:
    """Seconds that pass only while something is generated or scored: one each."""

    def __init__(self):
        self.now = 0.0

    def score(self, rule):
        def scored(text):
            self.now += 1.0
            return rule(text)

        return ScriptedConfidence(scored)

    def engine(self, script):
        clock = self

        class Timed(ScriptedEngine):
            async def cycle(self, prompt_token_ids, *, index, max_tokens):
                async for step in super().cycle(prompt_token_ids, index=index, max_tokens=max_tokens):
                    clock.now += step.finished
                    yield step

        return Timed(script)


@pytest.mark.parametrize(
    ("script", "limits", "rule", "first", "seconds"),
    [
        ([WRONG, DOUBT], Limits(threshold=0.5), _right_is_confident, 2.0, 4.0),
        ([WRONG, "<think>" + DOUBT, "$"], Limits(policy=Policy.MODEL, select=Select.LAST), None, 1.0, 3.0),
        (["<think>a</think>$", DOUBT], Limits(threshold=0.5), _right_is_confident, 3.0, 3.0),  # the first has none
        ([WRONG, DOUBT], Limits(threshold=0.5, max_tokens=len(encode(WRONG)) + 6), _right_is_confident, 2.0, 3.0),
        (["<think>a</think>$"], Limits(policy=Policy.SINGLE), None, None, 1.0),
        ([WRONG], Limits(policy=Policy.SINGLE), None, 1.0, 1.0),
        ([WRONG, "<think>" + DOUBT, "$"], Limits(threshold=0.5), lambda _: -1.0, 2.0, 4.0),  # the generator failed
    ],
)
async def test_the_first_answer_is_timed_when_it_is_complete_and_scored(script, limits, rule, first, seconds):
    clock = _Clock()
    loop = Recursion(clock.engine(script), RTAP, rule and clock.score(rule), lambda _: 0, clock=lambda: clock.now)
    *_, last = [event async for event in loop.run(QUESTION, limits)]
    assert (last.trajectory.first_answer_seconds, last.trajectory.seconds) == (first, seconds)


async def test_the_first_answer_of_a_vote_is_that_of_the_sample_that_finishes_first():
    clock = _Clock()
    script = [f"<think>{'x' * size}</think><answer>{size}</answer>" for size in (60, 10, 30)]
    loop = Recursion(clock.engine(script), RTAP, None, lambda _: 0, clock=lambda: clock.now)
    events = [event async for event in loop.run(QUESTION, Limits(policy=Policy.VOTE, threshold=1.0, samples=3))]
    done = events[-1].trajectory
    assert [e.cycle.index for e in events if isinstance(e, CycleEvent)] == [1, 2, 0]
    assert (done.first_answer_seconds, done.seconds, done.answer) == (1.0, 3.0, "60")


async def test_drafts_are_the_steps_of_a_votes_samples_while_they_are_written():
    script = [f"<think>{'x' * size}</think><answer>{size}</answer>" for size in (60, 10, 30)]

    async def events(*, drafts: bool) -> list:
        clock = _Clock()
        loop = Recursion(clock.engine(script), RTAP, None, lambda _: 0, clock=lambda: clock.now, drafts=drafts)
        limits = Limits(policy=Policy.VOTE, threshold=1.0, samples=3)
        return [event async for event in loop.run(QUESTION, limits)]

    got = await events(drafts=True)
    rest = [event for event in got if not isinstance(event, DraftEvent)]
    assert rest == await events(drafts=False)
    for index in range(3):
        drafts = [event.step for event in got if isinstance(event, DraftEvent) and event.step.cycle_index == index]
        assert drafts == [event for event in rest if isinstance(event, StepEvent) and event.cycle_index == index]
        first = next(i for i, e in enumerate(got) if isinstance(e, StepEvent) and e.cycle_index == index)
        assert all(got.index(DraftEvent(step)) < first for step in drafts)


async def test_a_last_answer_that_ended_with_the_turn_gets_no_further_token():
    engine = ScriptedEngine([WRONG.removesuffix("</answer>") + "$"])
    events, done = await _run(engine, Limits(threshold=0.5), ScriptedConfidence(lambda _: 0.9))
    assert done.answer == "25*7"
    assert sum(len(e.step.token_ids) for e in events if isinstance(e, StepEvent)) == done.cycles[0].tokens


async def test_max_tokens_is_one_budget_over_all_cycles():
    engine = ScriptedEngine([WRONG, DOUBT])
    spent = len(encode(WRONG))
    events, done = await _run(
        engine, Limits(threshold=0.5, max_tokens=spent + 6), ScriptedConfidence(_right_is_confident)
    )
    assert engine.max_tokens == [spent + 6, 5]  # the injected tag is part of the budget
    assert (done.stop_reason, done.answer) == (StopReason.MAX_TOKENS, "25*7")
    assert sum(c.tokens for c in done.cycles) == spent + 6
    assert done.cycles[1].answer is None
    del events


async def test_no_cycle_is_opened_without_budget_for_it():
    engine = ScriptedEngine([WRONG])
    _, done = await _run(engine, Limits(max_tokens=len(encode(WRONG)) + 1), ScriptedConfidence(_right_is_confident))
    assert (done.stop_reason, len(done.cycles)) == (StopReason.MAX_TOKENS, 1)


async def test_a_cut_answer_is_kept_as_partial_only():
    _, done = await _run(ScriptedEngine([WRONG]), Limits(policy=Policy.SINGLE, max_tokens=len(encode(WRONG)) - 1))
    assert (done.answer, done.partial_answer, done.stop_reason) == (None, "25*7", StopReason.MAX_TOKENS)


@pytest.mark.parametrize("fails_at", [0, 1])
async def test_a_failing_generator_degrades_to_model(fails_at):
    calls = iter(range(9))
    scorer = ScriptedConfidence(lambda _: -1.0 if next(calls) == fails_at else 0.1)
    second = "<think>" + DOUBT if fails_at == 0 else DOUBT
    engine = ScriptedEngine([WRONG, second, "$"])
    _, done = await _run(engine, Limits(threshold=0.5), scorer)
    assert (done.degraded, done.stop_reason, done.answer) == ("error", StopReason.MODEL, "3*25+7")
    assert done.policy is Policy.CONFIDENCE  # what was asked for
    assert len(scorer.judged) == fails_at + 1


async def test_the_deadline_returns_the_best_so_far():
    engine = ScriptedEngine([WRONG, "x" * 10_000], seconds_per_token=0.001)
    limits = Limits(threshold=0.5, deadline_seconds=0.3)
    _, done = await _run(engine, limits, ScriptedConfidence(_right_is_confident))
    assert (done.stop_reason, done.answer) == (StopReason.DEADLINE, "25*7")
    assert 0.3 <= done.seconds < 1.0
    assert done.cycles[1].answer is None


@pytest.mark.parametrize(("rule", "answer"), [(lambda _: 0.1, "25*7"), (None, None)])
async def test_a_cut_from_outside_returns_the_best_answer_so_far_or_none(rule, answer):
    """rule: None if the cut comes during the first cycle."""
    script = ["<think>" + "x" * 10_000] if rule is None else [WRONG, "x" * 10_000]
    engine, cutoff = ScriptedEngine(script, seconds_per_token=0.001), Cutoff()
    engine.cutoff = cutoff
    loop = Recursion(engine, RTAP, rule and ScriptedConfidence(rule), lambda _: 0, cutoff=cutoff)
    asyncio.get_running_loop().call_later(0.2, cutoff.cut, StopReason.DRAINED)
    *_, last = [event async for event in loop.run(QUESTION, Limits(threshold=0.5))]
    done = last.trajectory
    assert (done.stop_reason, done.answer, done.degraded) == (StopReason.DRAINED, answer, None)
    assert done.seconds < 1.0
    assert done.cycles[-1].tokens > 10  # what was written of it counts


async def test_a_vote_that_is_cut_counts_the_samples_that_are_whole():
    engine, cutoff = ScriptedEngine([WRONG, WRONG, "x" * 10_000], seconds_per_token=0.001), Cutoff()
    engine.cutoff = cutoff
    loop = Recursion(engine, RTAP, None, lambda _: 0, cutoff=cutoff)
    asyncio.get_running_loop().call_later(0.3, cutoff.cut, StopReason.DRAINED)
    *_, last = [event async for event in loop.run(QUESTION, Limits(policy=Policy.VOTE, threshold=1.0, samples=3))]
    assert (last.trajectory.stop_reason, last.trajectory.answer) == (StopReason.DRAINED, "25*7")


async def test_a_slow_score_does_not_outlive_the_deadline():
    class Slow:
        async def score(self, judged):
            await asyncio.sleep(5)

    _, done = await _run(ScriptedEngine([WRONG]), Limits(deadline_seconds=0.1), Slow())
    assert (done.stop_reason, done.answer, done.degraded) == (StopReason.DEADLINE, "25*7", None)
    assert done.seconds < 1.0


async def test_closing_the_loop_aborts_the_cycle_being_written():
    engine = ScriptedEngine([WRONG])
    loop = Recursion(engine, RTAP, None, lambda _: 0)
    async with aclosing(loop.run(QUESTION, Limits(policy=Policy.SINGLE))) as events:
        async for _ in events:
            break
    assert engine.closed == 1


async def test_a_reader_that_is_cancelled_at_every_await_leaves_nothing_running():
    """As anyio cancels a stream whose client has disconnected."""
    engine = ScriptedEngine([WRONG, "x" * 500], seconds_per_token=1e-4)
    loop = Recursion(engine, RTAP, ScriptedConfidence(_right_is_confident), lambda _: 0)

    async def read():
        async for _ in loop.run(QUESTION, Limits(threshold=0.5)):
            pass

    reader = asyncio.create_task(read())
    while len(engine.prompts) < 2:
        await asyncio.sleep(1e-3)
    while not reader.done():
        reader.cancel()
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert engine.closed == 1


async def test_vote_returns_the_majority_of_independent_samples():
    texts = [f"<think>t</think><answer>{a}</answer>" for a in ("7", "8", "8")]
    engine = ScriptedEngine(texts)
    events, done = await _run(engine, Limits(policy=Policy.VOTE, threshold=1.0, samples=3))
    assert (done.stop_reason, done.answer) == (StopReason.SAMPLES, "8")
    assert engine.prompts == [QUESTION] * 3
    assert sum(c.accepted for c in done.cycles) == 1
    num_tokens = sum(len(e.step.token_ids) for e in events if isinstance(e, StepEvent))
    assert num_tokens == sum(c.tokens for c in done.cycles)


async def test_fresh_cycles_start_on_the_question_and_inject_nothing():
    texts = [f"<think>t</think><answer>{a}</answer>$" for a in ("7", "8", "9")]
    engine, scorer = ScriptedEngine(texts), ScriptedConfidence(lambda text: 0.9 if ">9<" in text else 0.1)
    limits = Limits(threshold=0.5, recursion=Continuation.FRESH)
    events, done = await _run(engine, limits, scorer)
    assert engine.prompts == [QUESTION] * 3
    assert (done.answer, done.stop_reason, [c.index for c in done.cycles]) == ("9", StopReason.THRESHOLD, [0, 1, 2])
    num_tokens = sum(len(e.step.token_ids) for e in events if isinstance(e, StepEvent))
    assert num_tokens == len(encode("".join(text.removesuffix("$") for text in texts))) + 3
    assert not done.is_fresh_fallback
    assert {len(judged.context_token_ids) for judged in scorer.judged} == {len(QUESTION)}


@pytest.mark.parametrize(
    ("fmt", "opening", "second", "cycle"),
    [
        (TEXT, "\nWait.\n", "<think>8$", ("", "<think>8")),
        (THINK, "<think>Wait.", "no</think>8$", ("no", "8")),
        (THINK, "\nWait, ", "8$", ("", "8")),
        (RTAP, "<think>Wait.", "no</think><answer>8</answer>", ("no", "8")),
        (RTAP, "<answer>", "8</answer>", ("", "8")),
    ],
)
async def test_a_continued_cycle_begins_with_the_opening_and_is_read_from_where_it_ends(fmt, opening, second, cycle):
    """The opening is in the prompt and counted, and in neither thought nor answer."""
    first = fmt.render_cycle("", "7") + ("" if fmt is RTAP else "$")
    engine = ScriptedEngine([first, second])
    limits = Limits(threshold=0.5, max_cycles=2, select=Select.LAST)
    _, done = await _run(engine, limits, ScriptedConfidence(lambda _: 0.1), fmt=replace(fmt, cycle_open=opening))
    assert decode(engine.prompts[1]) == decode(QUESTION) + first.removesuffix("$") + opening
    assert (done.cycles[1].think, done.cycles[1].answer) == cycle
    assert done.cycles[1].tokens == len(encode(opening + second))
    assert not done.is_fresh_fallback


async def test_after_an_empty_continued_cycle_the_next_ones_are_fresh():
    texts = ["<think>t</think><answer>7</answer>$", "</think>\n$", "<think>t</think><answer>9</answer>$"]
    engine, scorer = ScriptedEngine(texts), ScriptedConfidence(lambda text: 0.9 if ">9<" in text else 0.1)
    events, done = await _run(engine, Limits(threshold=0.5), scorer)
    assert [prompt == QUESTION for prompt in engine.prompts] == [True, False, True]
    assert (done.answer, done.is_fresh_fallback) == ("9", True)
    assert [c.answer for c in done.cycles] == ["7", None, "9"]
    assert sum(c.tokens for c in done.cycles) == sum(len(e.step.token_ids) for e in events if isinstance(e, StepEvent))


async def test_a_vote_ends_with_the_wave_in_which_its_leader_is_certain():
    def texts(answers: str) -> list[str]:
        return [f"<think>t</think><answer>so it is {a} apples</answer>" for a in answers]

    limits = Limits(policy=Policy.VOTE, threshold=0.95, samples=16)
    for answers, samples, stop in (
        ("7777" + "8" * 12, 4, StopReason.AGREEMENT),  # 1 - 2^-5
        ("7778777" + "8" * 9, 7, StopReason.AGREEMENT),  # 3 more could decide, and did
        ("78" * 8, 16, StopReason.SAMPLES),
        ("777888" + "7" * 10, 12, StopReason.AGREEMENT),
    ):
        engine = ScriptedEngine(texts(answers))
        _, done = await _run(engine, limits)
        assert (len(done.cycles), done.stop_reason) == (samples, stop), answers
        assert done.answer == "so it is 7 apples"
        assert len(engine.prompts) == samples


async def test_confidences_end_a_vote_earlier_or_later_than_counts():
    texts = ["<think>t</think><answer>7</answer>"] * 16
    limits = Limits(policy=Policy.VOTE, threshold=0.95, samples=16)
    for confidence, samples in ((0.9, 4), (0.52, 16)):
        _, done = await _run(ScriptedEngine(texts), limits, ScriptedConfidence(lambda _, c=confidence: c))
        assert (len(done.cycles), done.answer) == (samples, "7")


async def test_vote_is_weighted_and_falls_back_to_counting():
    texts = [f"<think>t</think><answer>{a}</answer>" for a in ("7", "8", "8")]
    sure = ScriptedConfidence(lambda text: 0.9 if ">7<" in text else 0.1)
    _, done = await _run(ScriptedEngine(texts), Limits(policy=Policy.VOTE, threshold=1.0, samples=3), sure)
    assert done.answer == "7"
    broken = ScriptedConfidence(lambda text: 0.9 if ">7<" in text else -1.0)
    _, done = await _run(ScriptedEngine(texts), Limits(policy=Policy.VOTE, threshold=1.0, samples=3), broken)
    assert (done.answer, done.degraded) == ("8", "error")


async def test_closing_a_vote_aborts_all_samples():
    engine = ScriptedEngine(
        ["<think>" + "x" * 1000] * 2 + ["<think>t</think><answer>1</answer>"], seconds_per_token=0.001
    )
    loop = Recursion(engine, RTAP, None, lambda _: 0)
    async with aclosing(loop.run(QUESTION, Limits(policy=Policy.VOTE, threshold=1.0, samples=3))) as events:
        async for _ in events:
            break
    assert engine.closed == 2


async def test_a_prompt_may_open_the_thought():
    question = encode("hi<think>\n")
    engine = ScriptedEngine(["a</think>5$"])
    loop = Recursion(engine, THINK, None, lambda _: 0)
    events = [e async for e in loop.run(question, Limits(policy=Policy.SINGLE))]
    assert events[-1].trajectory.cycles[0].think == "a"
    assert events[-1].trajectory.answer == "5"


async def test_white_space_before_the_end_of_turn_is_no_cycle():
    engine = ScriptedEngine([WRONG, "\n$"])
    _, done = await _run(engine, Limits(policy=Policy.MODEL, select=Select.LAST))
    assert (done.stop_reason, done.answer, len(done.cycles)) == (StopReason.MODEL, "25*7", 1)
    assert done.cycles[0].tokens == len(encode(WRONG)) + 2


async def test_a_prompt_whose_thought_is_closed_starts_with_the_answer():
    loop = Recursion(ScriptedEngine(["5$"]), THINK, None, lambda _: 0)
    events = [e async for e in loop.run(encode("hi<think></think>"), Limits(policy=Policy.SINGLE))]
    assert events[-1].trajectory.answer == "5"


async def test_samples_of_a_vote_are_in_order_whatever_order_they_end_in():
    slow_first = ["<think>" + "x" * 50 + "</think><answer>7</answer>", "<think>t</think><answer>8</answer>"]
    events, done = await _run(ScriptedEngine(slow_first), Limits(policy=Policy.VOTE, threshold=1.0, samples=2))
    assert [e.cycle.index for e in events if isinstance(e, CycleEvent)] == [1, 0]
    assert [c.index for c in done.cycles] == [0, 1]
    assert done.answer == "7"  # a tie goes to the first sample, not to the first to end


def _is_closed(text: str, fmt) -> bool:
    """True if every thought and answer of ``text`` is closed, read tag by tag."""
    where = "outside"
    for tag in re.findall("</?(?:think|answer)>", text):
        if where == "answer" and fmt.has_answer_tags:
            where = "outside" if tag == fmt.answer_close else where
        elif tag == fmt.think_open:
            where = "thought"
        elif tag == fmt.answer_open:
            where = "answer"
        elif tag == fmt.think_close:
            where = "outside"
    return where == "outside"


_PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", "7", "x", " ", "\n", "<", "$"]), max_size=10
).map("".join)


@given(
    st.lists(_PIECES, min_size=4, max_size=4),
    st.sampled_from([RTAP, THINK, TEXT]),
    st.sampled_from(list(Policy)),
    st.sampled_from([(), ("7",), ("ax", "7\n"), ("<",)]),
    st.sampled_from([frozenset(), frozenset(encode("x</think>"))]),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([0.1, -1.0]),
)
async def test_a_cycle_is_opened_only_where_the_one_before_is_closed(
    script, fmt, policy, stop, stop_ids, thinking_tokens, score
):
    """Whatever the engine writes, wherever it ends, and whatever ends an answer. "$" ends the turn."""
    texts = [text.partition("$")[0] + "$" * ("$" in text) or "$" for text in script]
    if fmt.answer_close:  # where the engine ends a cycle
        texts = ["".join(text.partition(fmt.answer_close)[:2]) for text in texts]
    engine, scorer = ScriptedEngine(texts), ScriptedConfidence(lambda _: score)
    limits = Limits(
        policy=policy, threshold=0.5, max_cycles=4, samples=2, stop=stop, stop_token_ids=stop_ids,
        thinking_tokens=thinking_tokens,
    )  # fmt: skip
    events, done = await _run(engine, limits, scorer, fmt=fmt)
    opening = encode(fmt.cycle_open)
    if policy is Policy.CONFIDENCE and done.degraded is None:
        for prompt in engine.prompts[1:]:
            is_fresh = done.is_fresh_fallback and prompt == QUESTION
            assert is_fresh or prompt[-len(opening) :] == opening
            assert is_fresh or _is_closed(decode(prompt[len(QUESTION) : -len(opening)]), fmt)
    if policy is not Policy.VOTE:
        for before, after in pairwise(prompt for prompt in engine.prompts if prompt != QUESTION):
            assert after[: len(before)] == before
    assert sum(c.tokens for c in done.cycles) == sum(len(e.step.token_ids) for e in events if isinstance(e, StepEvent))
    for cycle in done.cycles:
        assert cycle.answer is None or not any(s in cycle.answer for s in stop)


@pytest.mark.parametrize(
    ("limits", "stop", "answer", "with_stop"),
    [
        (Limits(stop=("7",)), "7", "25*", "25*7"),
        (Limits(stop=("none", "*7")), "*7", "25", "25*7"),
        (Limits(stop_token_ids=frozenset(encode("*"))), ord("*"), "25", "25*"),
        (Limits(stop_token_ids=frozenset(encode("7\n</think><answer>"))), ord("7"), "25*", "25*7"),
    ],
)
async def test_a_stop_ends_the_answer_and_the_work_on_it_but_no_thought(limits, stop, answer, with_stop):
    """The thought, the tags and the white space before the answer have them too."""
    text = "<think>25*7=175</think><answer>\n25*7 and so on</answer>"
    engine, scorer = ScriptedEngine([text, text.removeprefix("<think>")]), ScriptedConfidence(lambda _: 0.1)
    _, done = await _run(engine, replace(limits, max_cycles=2), scorer)
    assert engine.closed == 2
    assert [(c.think, c.answer) for c in done.cycles] == [("25*7=175", answer)] * 2
    cycle = text[: text.index(with_stop, text.index("\n")) + len(with_stop)] + "</answer>"
    assert decode(engine.prompts[1]) == "make 82?" + cycle + "<think>"
    assert [decode(judged.cycle_token_ids) for judged in scorer.judged] == [cycle, cycle]
    assert [c.stop for c in done.cycles] == [stop, stop]
    engine = ScriptedEngine([text])
    _, done = await _run(engine, replace(limits, policy=Policy.MODEL, select=Select.LAST, include_stop=True))
    assert (done.stop_reason, done.answer) == (StopReason.MODEL, with_stop)


async def test_a_stop_before_the_first_word_leaves_no_answer():
    for limits in (Limits(stop=("so",)), Limits(stop_token_ids=frozenset(encode("s")))):
        _, done = await _run(ScriptedEngine(["\nso be it$"]), replace(limits, policy=Policy.SINGLE), fmt=THINK)
        assert (done.answer, done.partial_answer) == (None, None)


async def test_a_stop_of_the_whole_text_ends_the_trajectory():
    class Stopped(ScriptedEngine):
        async def cycle(self, prompt_token_ids, *, index, max_tokens):
            async for step in super().cycle(prompt_token_ids, index=index, max_tokens=max_tokens):
                yield step._replace(ended_text=step.finished, stop_reason="7" if step.finished else None)

    for text, answer in (("<think>25*7$", None), ("<think>a</think><answer>25*7$", "25*7")):
        engine = Stopped([text])
        _, done = await _run(engine, Limits(threshold=0.5), ScriptedConfidence(lambda _: 0.1))
        assert (done.stop_reason, done.answer, len(engine.prompts)) == (StopReason.MODEL, answer, 1)


@pytest.mark.parametrize(
    ("policy", "budget", "cycles"), [("confidence", 9, 2), ("confidence", 8, 1), ("confidence", 0, 1), ("model", 8, 1)]
)
async def test_no_cycle_follows_a_spent_thinking_budget(policy, budget, cycles):
    engine = ScriptedEngine([WRONG, DOUBT if policy == "confidence" else "<think>" + DOUBT])  # 8 tokens in the first
    limits = Limits(policy=Policy(policy), thinking_tokens=budget, max_cycles=5, select=Select.LAST)
    _, done = await _run(engine, limits, ScriptedConfidence(lambda _: 0.1))
    assert (done.stop_reason, len(done.cycles)) == (StopReason.MAX_TOKENS, cycles)


@pytest.mark.parametrize(
    ("question", "written", "count"),
    [
        ("q", "", 0),
        ("q", "<think>abc</think>", 3),
        ("q", "<think>abc</think>7<think>de</think>", 5),
        ("q", "<think>abc</think>7<think>Wait", 3),  # vLLM counts that of the running cycle itself
        ("q", "no thought", 0),
        ("q<think>", "abc</think>7", 3),
        ("<think>q</think>", "<think>abc</think>7", 3),
    ],
)
def test_tokens_of_closed_thoughts_are_counted(question, written, count):
    ids = encode(question)
    assert num_thought_tokens(ids, ids + encode(written), ScriptedEngine([]), RTAP) == count
