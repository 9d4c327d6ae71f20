"""In-thought probing over a scripted engine; tests/e2e has a real one."""

import asyncio

import pytest

from rtap_core.format import RTAP
from rtap_core.probing import Probing
from rtap_core.recursion import FinalEvent, Recursion, StepEvent
from rtap_core.types import Limits, StopReason
from tests.core.scripted import ScriptedConfidence, ScriptedEngine, decode, encode

QUESTION = encode("q")
LONG = "<think>aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa</think><answer>9</answer>"


def _probing(engine: ScriptedEngine, confidence: ScriptedConfidence, every: int = 6) -> Probing:
    return Probing(engine, RTAP, confidence, QUESTION, None, every=every, threshold=0.5, answer_tokens=8)


async def _run(script, rule, *, every=6, limits=None):
    engine, confidence = ScriptedEngine(script, seconds_per_token=0.002), ScriptedConfidence(rule)
    probing = _probing(engine, confidence, every)
    loop = Recursion(probing, RTAP, confidence, lambda _: 0)
    events = [e async for e in loop.run(QUESTION, limits or Limits(threshold=0.5, max_cycles=1))]
    assert isinstance(events[-1], FinalEvent)
    text = "".join(e.step.text for e in events if isinstance(e, StepEvent))
    return events[-1].trajectory, text, probing, engine, confidence


async def test_two_probes_that_agree_and_are_good_enough_end_the_thought():
    trajectory, text, probing, engine, confidence = await _run([LONG, "7</answer>", "7</answer>"], lambda _: 0.9)
    assert (trajectory.answer, trajectory.stop_reason) == ("7", StopReason.THRESHOLD)
    thought = trajectory.cycles[0].think
    assert 12 <= len(thought) < 40
    assert text == f"<think>{thought}</think><answer>7</answer>"
    assert trajectory.cycles[0].tokens == len(encode(text))
    assert (probing.num_probes, probing.num_stopped) == (2, 1)
    assert probing.discarded_tokens == 2  # those of the first; the second's were taken
    assert engine.closed == 1  # the thought that went on
    # Each probe continues what was written then, with the tags; what is scored is question and cycle.
    assert [decode(p)[:7] for p in engine.prompts[1:]] == ["q<think"] * 2
    assert all(decode(p).endswith("</think><answer>") for p in engine.prompts[1:])
    assert decode(confidence.judged[1].cycle_token_ids).endswith("a</think><answer>7</answer>")
    assert len(engine.prompts[2]) > len(engine.prompts[1])


@pytest.mark.parametrize(
    ("probes", "score"),
    [
        (["7</answer>", "8</answer>"] * 4, 0.9),  # they differ
        (["7</answer>"] * 8, 0.1),  # they agree on what the generator does not believe
        (["7</answer>"] * 8, -1),  # the generator fails
        (["77777777777777</answer>"] * 8, 0.9),  # longer than a probe may be
    ],
)
async def test_otherwise_the_thought_goes_on(probes, score):
    trajectory, text, probing, _, _ = await _run(
        [LONG, *probes], lambda text: score if "9</answer>" not in text else 0.9
    )
    assert trajectory.answer == "9"
    assert text == LONG
    assert probing.num_probes >= (1 if score < 0 else 2)
    assert probing.num_stopped == 0
    assert probing.discarded_tokens > 0


async def test_a_thought_shorter_than_the_distance_is_not_asked():
    trajectory, text, probing, _, _ = await _run([LONG], lambda _: 0.9, every=200)
    assert (trajectory.answer, text, probing.num_probes) == ("9", LONG, 0)


async def test_an_answer_that_the_budget_cannot_hold_is_not_taken():
    limits = Limits(threshold=0.5, max_cycles=1, max_tokens=16)
    trajectory, _, probing, _, _ = await _run([LONG, "7</answer>", "7</answer>"], lambda _: 0.9, limits=limits)
    assert (trajectory.stop_reason, trajectory.answer, probing.num_stopped) == (StopReason.MAX_TOKENS, None, 0)
    assert trajectory.cycles[0].tokens == 16


async def test_a_later_cycle_is_scored_from_its_own_opening():
    second = LONG.removeprefix("<think>")
    trajectory, text, probing, _, confidence = await _run(
        ["<think>b</think><answer>1</answer>", second, "7</answer>", "7</answer>"],
        lambda text: 0.9 if "7</answer>" in text else 0.1,
        limits=Limits(threshold=0.5, max_cycles=2),
    )
    assert trajectory.answer == "7"
    assert probing.num_stopped == 1
    probed = confidence.judged[1]
    assert decode(probed.cycle_token_ids).startswith("<think>aaaa")
    assert decode(probed.context_token_ids) == "q<think>b</think><answer>1</answer>"
    assert text.startswith("<think>b</think><answer>1</answer><think>aaaa")


async def test_leaving_ends_the_thought_and_its_probe():
    engine = ScriptedEngine([LONG, "7" * 40], seconds_per_token=0.002)
    probing = _probing(engine, ScriptedConfidence(lambda _: 0.9))
    stream = probing.cycle(QUESTION, index=0, max_tokens=None)
    async for _ in stream:
        if probing.num_probes and len(engine.prompts) == 2:
            break
    await stream.aclose()
    await asyncio.sleep(0)
    assert engine.closed == 2


class Refusing(ScriptedEngine):
    """Has no room for anything but the thought itself."""

    async def cycle(self, prompt_token_ids, *, index, max_tokens):
        if self.prompts:
            self.prompts.append(list(prompt_token_ids))
            raise ValueError("longer than the context")
        async for step in super().cycle(prompt_token_ids, index=index, max_tokens=max_tokens):
            yield step


async def test_a_probe_that_the_engine_refuses_is_no_answer_and_costs_the_request_nothing():
    engine = Refusing([LONG], seconds_per_token=0.002)
    confidence = ScriptedConfidence(lambda _: 0.9)
    loop = Recursion(_probing(engine, confidence), RTAP, confidence, lambda _: 0)
    events = [e async for e in loop.run(QUESTION, Limits(threshold=0.5, max_cycles=1))]
    assert events[-1].trajectory.answer == "9"
    assert len(engine.prompts) > 2


async def test_a_scorer_that_fails_is_not_asked_again_by_probes():
    _, _, probing, _, confidence = await _run([LONG, *["7</answer>"] * 8], lambda _: -1)
    assert probing.num_probes == 1
    assert len(confidence.judged) == 2  # by the probe, and by the loop


async def test_tags_inside_an_answer_begin_no_thought():
    text = "<think>aaaa</think><answer>a tag: <think>, bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb</answer>"
    trajectory, _, probing, _, _ = await _run([text], lambda _: 0.9)
    assert trajectory.answer == "a tag: <think>, bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    assert probing.num_probes == 0
