"""Rules replayed on kept samples: they decide as the server does, and their figures are compared fairly."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP
from rtap_core.recursion import FinalEvent, Recursion
from rtap_core.types import Continuation, Limits, Policy, Trajectory
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Outcome, Run, RunSpec
from rtap_training.evaluation.replay import Figures, RuleParameters, majority_as_drawn, outcome_of_rule, replay
from rtap_training.evaluation.replay import _sample as sample_of
from rtap_training.evaluation.results import CHOSEN, Reference, choose_threshold, row_of
from rtap_training.evaluation.samples import read_samples, write_samples
from tests.core.scripted import ScriptedConfidence, ScriptedEngine, encode

DRAWS = st.lists(st.tuples(st.sampled_from("1234-"), st.floats(0, 1)), min_size=1, max_size=12)


def record(
    answer: str | None, *, right: bool = False, confidence: float | None = None, tokens: int = 10
) -> CycleRecord:
    return CycleRecord(answer, right, confidence, tokens, 0, 0, None, text=answer)


def served(draws: Sequence[tuple[str, float]], limits: Limits, *, is_scored: bool) -> Trajectory:
    """What the loop does with these samples. "-" is a sample that was cut."""
    script = ["<think>t" if a == "-" else f"<think>t</think><answer>{a}</answer>$" for a, _ in draws]
    scores = iter([confidence for a, confidence in draws if a != "-"])
    scorer = ScriptedConfidence(lambda _: next(scores)) if is_scored else None
    loop = Recursion(ScriptedEngine(script), RTAP, scorer, lambda _: 0)

    async def run() -> Trajectory:
        events = [event async for event in loop.run(encode("?"), limits)]
        assert isinstance(events[-1], FinalEvent)
        return events[-1].trajectory

    return asyncio.run(run())


def replayed(spec: RunSpec, draws: Sequence[tuple[str, float]]) -> tuple[int | None, int]:
    cycles = [record(None if a == "-" else a, confidence=None if a == "-" else c) for a, c in draws]
    return outcome_of_rule(spec, [sample_of(i, cycle) for i, cycle in enumerate(cycles)])


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.floats(0.5, 1), st.booleans())
def test_a_replayed_vote_draws_and_returns_what_the_server_would(
    draws: list[tuple[str, float]], threshold: float, is_scored: bool
) -> None:
    limits = Limits(policy=Policy.VOTE, threshold=threshold, samples=len(draws))
    done = served(draws, limits, is_scored=is_scored)
    spec = RunSpec("cges" if is_scored else "adaptive", threshold, len(draws))
    assert replayed(spec, draws) == (done.selected, len(done.cycles))
    full = served(draws, replace(limits, threshold=1.0), is_scored=is_scored)
    assert replayed(RunSpec("weighted" if is_scored else "majority", samples=len(draws)), draws)[0] == full.selected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("1234"), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1))
def test_a_replayed_confidence_rule_stops_where_fresh_attempts_would(
    draws: list[tuple[str, float]], threshold: float
) -> None:
    limits = Limits(threshold=threshold, max_cycles=len(draws), recursion=Continuation.FRESH)
    done = served(draws, limits, is_scored=True)
    assert replayed(RunSpec("confidence", threshold, len(draws)), draws) == (done.selected, len(done.cycles))


def vote_of(samples: Sequence[Sequence[CycleRecord]]) -> tuple[Run, list[Question]]:
    outcomes = (Outcome(i, cycles=tuple(cycles)) for i, cycles in enumerate(samples))
    spec = RunSpec("vote", samples=len(samples[0]))
    return Run("t", spec, tuple(outcomes), None), [Question(f"q{i}", "4", "t") for i in range(len(samples))]


def rules(vote: Run, questions: Sequence[Question]) -> dict[str, Figures]:
    found = replay(vote, questions, RuleParameters((2,), (0.95,), (0.5,), 1.0))
    return {figures.label: figures for figures in found}


def test_every_rule_is_replayed_in_many_orders() -> None:
    right, wrong = record("4", right=True, confidence=0.9), record("5", confidence=0.1, tokens=30)
    found = rules(*vote_of([[right, right, right, wrong], [wrong, wrong, wrong, right]]))
    assert set(found) == {
        "single", "majority x2", "majority x4", "adaptive@0.95 x4", "weighted x2", "weighted x4", "cges@0.95 x4",
        "confidence@0.5 x4",
    }  # fmt: skip
    assert list(found["majority x4"].right) == [1.0, 0.0]
    assert list(found["majority x4"].tokens) == [60.0, 100.0]
    assert list(found["weighted x4"].right) == [1.0, 1.0]
    single = found["single"].right
    assert 0.5 < single[0] < 1.0
    assert 0.0 < single[1] < 0.5
    assert found["confidence@0.5 x4"].right.tolist() == [1.0, 1.0]
    assert found["confidence@0.5 x4"].samples[0] < found["confidence@0.5 x4"].samples[1]


def test_live_runs_compare_with_the_majority_as_drawn() -> None:
    vote, questions = vote_of([[record("4", right=True), record("5")]] * 20)
    drawn = majority_as_drawn(vote)
    assert drawn is not None
    assert drawn.right.mean() == 1.0  # a tie goes to the first
    assert 0.4 < rules(vote, questions)["majority x2"].right.mean() < 0.6


def test_a_question_with_an_unscored_answer_counts_votes_and_is_reported() -> None:
    scored = [record("4", right=True, confidence=0.9), record("5", confidence=0.1), record("5", confidence=0.1)]
    found = rules(*vote_of([scored, [*scored[:2], record("5")]]))
    assert found["weighted x3 (1 questions not fully scored)"].right.tolist() == [1.0, 0.0]
    assert {label.split("@")[0] for label in found if "scored" in label} >= {"cges", "confidence"}
    assert not [label for label in rules(*vote_of([[record("4")] * 3])) if "weighted" in label]


def test_judged_tokens_of_a_replayed_generator_are_unknown() -> None:
    scored = replace(record("4", confidence=0.9), logprobs={"mean": -0.1})
    free = rules(*vote_of([[scored] * 2]))["weighted x2"]
    assert free.judged is not None
    paid = rules(*vote_of([[record("4", confidence=0.9)] * 2]))
    assert paid["weighted x2"].judged is None
    assert row_of(paid["weighted x2"], Reference(paid["majority x2"], []), is_live=False).total_token_ratio is None


def test_without_extraction_texts_that_state_one_answer_are_different_answers() -> None:
    texts = ["So \\boxed{5}.", "It is \\boxed{4}.", "Thus \\boxed{4}."]
    samples = [CycleRecord(t[-3], t[-3] == "4", None, 9, 0, 0, None, text=t) for t in texts]
    found = rules(*vote_of([samples] * 30))
    assert found["majority x3"].right.mean() == 1.0
    assert 0.5 < found["majority x3 by text"].right.mean() < 0.8  # the first of them


def figures(rule: str, right: Sequence[float], tokens: float, threshold: float | None = None) -> Figures:
    count = len(right)
    columns = (np.asarray(right, dtype=float), np.ones(count), np.full(count, tokens), np.full(count, 5.0))
    return Figures(RunSpec(rule, threshold), tuple(range(count)), *columns)


def test_a_row_compares_with_the_majority_on_the_same_questions() -> None:
    majority, half = figures("majority", [1, 1, 0, 0] * 10, 100), figures("adaptive", [1, 0, 0, 0] * 10, 40, 0.9)
    reference = Reference(majority, [figures("single", [0] * 40, 10), figures("adaptive", [1, 0, 1, 0] * 10, 90, 0.9)])
    row = row_of(half, reference, is_live=False)
    assert row.difference is not None
    assert (row.difference.value, row.n, row.tokens.value) == (-0.25, 40, 40.0)
    assert row.difference.low < -0.25 < row.difference.high < 0.0
    assert row.token_ratio is not None
    assert (row.token_ratio.low, row.token_ratio.high) == pytest.approx((0.4, 0.4))
    assert row.total_token_ratio == pytest.approx(0.45)
    assert row.at_equal_tokens is None  # it is the curve itself
    other = row_of(figures("confidence", [1, 0, 0, 0] * 10, 50, 0.5), reference, is_live=False)
    assert other.at_equal_tokens is not None
    assert other.at_equal_tokens.value == pytest.approx(0.0)  # half way from 10 tokens and 0 to 90 and 0.5
    few = replace(half, indices=tuple(range(100, 140)))
    assert row_of(few, reference, is_live=True).n == 0
    assert row_of(half, None, is_live=True).difference is None


def test_a_threshold_is_chosen_on_one_half_within_the_budget_and_judged_on_the_other() -> None:
    majority = figures("majority", [1, 0] * 10, 100)
    curve = [
        figures("confidence", [0, 1] * 10, 10, 0.2),
        figures("confidence", [1, 0] * 10, 30, 0.5),
        figures("confidence", [1, 1] * 10, 60, 0.9),
    ]
    even = list(range(0, 20, 2))
    chosen = choose_threshold(curve, majority, even, budget=0.35)
    assert chosen is not None
    assert (chosen.label, len(chosen.indices)) == (f"confidence@0.5{CHOSEN}", 10)
    assert chosen.right.mean() == 0.0  # judged on the odd questions
    assert choose_threshold(curve, majority, even, budget=0.05) is None  # none is affordable
    assert choose_threshold(curve, majority, range(20), budget=1.0) is None
    assert choose_threshold([], majority, even, budget=1.0) is None


def test_samples_are_read_back_as_they_were_written_and_a_text_is_enough(tmp_path: Path) -> None:
    cycle = record("4", right=True, confidence=0.5)
    kept = replace(cycle, think="2+2", text="It is 4.", logprobs={"mean": -0.1})
    vote, questions = vote_of([[kept, kept], [kept, record(None)]])
    file = tmp_path / "samples.jsonl"
    write_samples(file, [vote], {"t": questions}, confidence={"kind": "none"})
    read, (again,) = read_samples([file], 2)
    assert read == {"t": questions}
    assert [o.cycles for o in again.outcomes] == [o.cycles for o in vote.outcomes]
    lines = [{"question": "2+2", "reference": "4", "text": f"I say \\boxed{{{a}}}.", "tokens": 9} for a in (4, 5)]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, (vote,) = read_samples([plain], 2)
    assert [(c.answer, c.is_correct) for c in vote.outcomes[0].cycles] == [("4", True), ("5", False)]
    assert vote.task == "plain"
    with pytest.raises(ConfigError, match=r"has 3 samples, the largest of --samples; the most that one has is 2"):
        read_samples([plain], 3)
    plain.write_text('{"question": "2+2"}\n')
    with pytest.raises(ConfigError, match=r"plain.jsonl:1: not a sample \(KeyError: 'reference'\)"):
        read_samples([plain], 1)
    with pytest.raises(ConfigError, match="No such file"):
        read_samples([tmp_path / "missing"], 1)


def test_a_last_line_without_newline_is_a_sample(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    lines = [{"question": "2+2", "reference": "4", "text": text, "tokens": 9} for text in "45"]
    file.write_text("\n".join(map(json.dumps, lines)))
    _, (vote,) = read_samples([file], 2)
    assert len(vote.outcomes[0].cycles) == 2


def test_a_calibration_computes_confidences_of_kept_log_probabilities(tmp_path: Path) -> None:
    features = {"mean": -0.5, "lowest": -3.0, "lowest_tenth": -2.0, "answer": -0.1, "tokens": 9}
    vote, questions = vote_of([[replace(record("4"), logprobs=features), replace(record(None), logprobs=features)]])
    file, config = tmp_path / "samples.jsonl", tmp_path / "confidence.json"
    write_samples(file, [vote], {"t": questions}, confidence={"kind": "none"})
    config.write_text(json.dumps({"rtap": {"logistic": {"bias": 1.0, "logprob_mean": 2.0}}}))
    _, (again,) = read_samples([file], 2, confidence_config=config)
    assert [cycle.confidence for cycle in again.outcomes[0].cycles] == [pytest.approx(0.5), None]
    config.write_text(json.dumps({"rtap": {"logistic": {"bias": 1.0, "generator": 2.0}}}))
    with pytest.raises(ConfigError, match="does not compute confidence from log-probabilities alone"):
        read_samples([file], 2, confidence_config=config)


def test_only_one_half_of_the_questions_on_request(tmp_path: Path) -> None:
    vote, questions = vote_of([[record("4")]] * 40)
    file = tmp_path / "samples.jsonl"
    write_samples(file, [vote], {"t": questions}, confidence={"kind": "none"})
    halves = [read_samples([file], 1, split=split)[0]["t"] for split in ("calibration", "test")]
    assert sorted(q.text for half in halves for q in half) == sorted(q.text for q in questions)
    assert all(q.split == "calibration" for q in halves[0])
