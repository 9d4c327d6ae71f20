"""Questions, records and the comparisons made from them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import outcome_of
from rtap_training.evaluation.comparison import VoteSeconds, choose_threshold, compare_with_logprob, compare_with_vote
from rtap_training.evaluation.measurement import confidence_quality, measure
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import CycleRecord, Outcome, Run, RunSpec, write_atomically


def cycle(answer: str | None, *, right: bool = False, confidence: float | None = None, tokens: int = 10) -> CycleRecord:
    return CycleRecord(answer, right, confidence, tokens, oops_tokens=1, prompt_tokens=50, cached_tokens=32)


def outcome(index: int, cycles: Sequence[CycleRecord]) -> Outcome:
    last = cycles[-1]
    tokens = sum(c.tokens for c in cycles)
    return Outcome(
        index, None, last.answer, last.is_correct, "threshold", tokens, 2 * tokens, 0.5, 0.25, cycles=tuple(cycles)
    )


def run_of(spec: RunSpec, right: Sequence[bool], tokens: int, *, wall_seconds: float | None = 10.0) -> Run:
    """A run of one cycle a question."""
    outcomes = (outcome(i, [cycle("a" if ok else "b", right=ok, tokens=tokens)]) for i, ok in enumerate(right))
    return Run("demo", spec, tuple(outcomes), wall_seconds)


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_questions_are_grouped_by_task_and_limited_a_task(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "mixed.jsonl",
        [
            {"question": "a", "answer": 1, "task": "sums"},
            {"question": "b", "answer": "2"},
            {"question": "c", "answer": "3", "task": "sums"},
        ],
    )
    assert load_questions([path]) == {
        "sums": [Question("a", "1", "sums"), Question("c", "3", "sums")],
        "mixed": [Question("b", "2", "mixed")],
    }
    assert load_questions([path], limit=1)["sums"] == [Question("a", "1", "sums")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no questions in"),
        ("{not json\n", ":1: not JSON"),
        ("[1]\n", ":1: each row must be an object"),
        ('{"question": "a"}\n', ':1: "answer" is missing or empty'),
        ('{"question": "a", "answer": "1"}\n' * 2, ":2: duplicate question"),
    ],
)
def test_a_bad_question_file_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_questions([path])
    assert sentence in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the question file"):
        load_questions([tmp_path / "missing.jsonl"])


def test_halves_and_seeds_follow_from_the_question_alone() -> None:
    questions = [Question(f"question {i}", "", "t") for i in range(2000)]
    selecting = sum(question.is_for_selection for question in questions)
    assert 900 < selecting < 1100
    assert len({question.seed(0) for question in questions}) == 2000
    assert questions[0].seed(0) != questions[0].seed(1)
    assert all(0 <= question.seed(0) < 2**31 for question in questions)


def test_majority_of_a_prefix_counts_its_own_samples_and_tokens_only() -> None:
    samples = [
        cycle("4", right=True),
        cycle("5 ", tokens=7),
        cycle(None, tokens=90),
        cycle("5"),
        cycle("4", right=True),
    ]
    vote = outcome(0, samples)
    assert (vote.majority_of(1).answer, vote.majority_of(1).policy_tokens) == ("4", 10)
    assert vote.majority_of(4).answer == "5 "  # spaces do not make another answer
    assert not vote.majority_of(4).is_correct
    assert vote.majority_of(4).policy_tokens == 117
    assert vote.majority_of(5).is_correct  # a tie goes to the earliest
    assert not outcome(0, [cycle(None)]).majority_of(1).is_correct


def test_a_run_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    run = Run(
        "demo",
        RunSpec("confidence", threshold=0.3),
        (outcome(0, [cycle("1", confidence=0.2), cycle(None)]), Outcome(1, error="HTTP 500: no")),
        12.5,
    )
    run.save(tmp_path / "runs" / "run.json")
    assert Run.load(tmp_path / "runs" / "run.json") == run


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    write_atomically(target, "old")
    (tmp_path / "results.json.partial").mkdir()  # makes the next write fail half way
    with pytest.raises(IsADirectoryError):
        write_atomically(target, "new")
    assert target.read_text(encoding="utf-8") == "old"


def test_measure_counts_every_cycle_and_keeps_failed_requests_apart() -> None:
    run = Run(
        "demo",
        RunSpec("confidence", threshold=0.5),
        (
            outcome(0, [cycle("1"), cycle("2", right=True, tokens=30)]),
            replace(outcome(1, [cycle(None)]), degraded="timeout", stop_reason="max_tokens"),
            Outcome(2, error="HTTP 500: no"),
        ),
        wall_seconds=4.0,
    )
    figures = measure(run)
    assert (figures.n, figures.errors, figures.degraded, figures.unanswered) == (2, 1, 1, 1)
    assert figures.accuracy.value == 0.5
    assert (figures.policy_tokens.value, figures.generator_tokens) == (25.0, 50.0)
    assert (figures.cycles, figures.oops_tokens, figures.oops_per_1000_tokens) == (1.5, 1.5, 60.0)
    assert (figures.cached_prompt_tokens, figures.recomputed_prompt_tokens) == (48.0, 27.0)
    assert (figures.later_recomputed_mean, figures.later_recomputed_max) == (18.0, 18)
    assert (figures.wall_seconds, figures.questions_per_second) == (4.0, 0.5)
    assert figures.stop_reasons == {"max_tokens": 1, "threshold": 1}


def test_confidence_quality_reads_every_scored_sample() -> None:
    good, bad = cycle("1", right=True, confidence=0.8), cycle("2", confidence=0.3)
    run = Run(
        "demo",
        RunSpec("vote", samples=3),
        (outcome(0, [good, bad, cycle(None)]), outcome(1, [bad, bad, bad]), outcome(2, [bad, good, good])),
        1.0,
    )
    quality = confidence_quality(run, "generator")
    assert quality is not None
    assert quality.scored_answers == 8
    assert quality.within is not None
    assert (quality.within.auroc.value, quality.within.mixed_questions) == (1.0, 2)
    assert (quality.best_of.value, quality.ceiling.value) == (2 / 3, 2 / 3)
    assert confidence_quality(run_of(RunSpec("vote", samples=1), [True], 5), "generator") is None


def halves(index: int) -> bool:
    return index % 2 == 0


def test_the_threshold_is_chosen_on_one_half_within_the_budget_and_reported_on_the_other() -> None:
    vote = run_of(RunSpec("majority", samples=8), [True, False] * 10, tokens=100, wall_seconds=None)
    # selecting half: even questions. 0.2 gets none of them, 0.5 all; 0.9 gets all too but costs more than the budget.
    low = run_of(RunSpec("confidence", threshold=0.2), [False, True] * 10, tokens=10)
    middle = run_of(RunSpec("confidence", threshold=0.5), [True, False] * 10, tokens=30)
    high = run_of(RunSpec("confidence", threshold=0.9), [True, True] * 10, tokens=60)
    seconds = VoteSeconds(scored=50.0, plain=20.0)
    comparison = compare_with_vote([low, middle, high], vote, halves, budget=0.35, seconds=seconds)
    assert comparison is not None
    assert comparison.threshold == 0.5
    assert (comparison.reported.n, comparison.all_questions.n) == (10, 20)
    assert comparison.reported.accuracy.value == comparison.reported.vote_accuracy.value == 0.0
    assert comparison.all_questions.difference.value == 0.0
    assert comparison.reported.token_ratio == pytest.approx(0.3)
    assert comparison.reported.total_token_ratio == pytest.approx(0.9)  # the generator read 60 tokens a question
    assert (comparison.wall_ratio, comparison.wall_ratio_plain) == (0.2, 0.5)
    unlimited = compare_with_vote([low, middle, high], vote, halves, budget=1.0, seconds=seconds)
    assert unlimited is not None
    assert unlimited.threshold == 0.5  # as accurate on the selecting half as 0.9, and cheaper


def test_without_an_affordable_threshold_the_most_accurate_is_taken() -> None:
    vote = run_of(RunSpec("majority", samples=8), [True] * 4, tokens=10)
    runs = [run_of(RunSpec("confidence", threshold=t), [t > 0.5] * 4, tokens=30) for t in (0.2, 0.7)]
    assert choose_threshold(runs, vote, frozenset(range(4)), budget=0.35).spec.threshold == 0.7


def test_a_question_that_failed_anywhere_is_compared_nowhere() -> None:
    vote = run_of(RunSpec("majority", samples=8), [True] * 10, tokens=100)
    curve = run_of(RunSpec("confidence", threshold=0.5), [True] * 10, tokens=30)
    broken = replace(curve, outcomes=(Outcome(0, error="HTTP 500"), *curve.outcomes[1:]))
    comparison = compare_with_vote([broken], vote, halves, budget=1.0, seconds=VoteSeconds(None, None))
    assert comparison is not None
    assert comparison.all_questions.n == 9
    assert comparison.wall_ratio is None


def test_the_logprob_rule_meets_the_curve_at_its_own_tokens() -> None:
    single = run_of(RunSpec("single"), [True, False, False, False] * 5, tokens=10)
    curve = [single, run_of(RunSpec("confidence", threshold=0.5), [True, True, True, False] * 5, tokens=30)]
    rules = [
        run_of(RunSpec("logprob", threshold=0.6, scored_by="logprob"), [True, False, False, False] * 5, tokens=20),
        run_of(RunSpec("logprob", threshold=0.9, scored_by="logprob"), [True] * 20, tokens=90),
    ]
    vote = run_of(RunSpec("majority", samples=8), [True] * 20, tokens=80)
    chosen, first, second = compare_with_logprob(curve, rules, vote, halves, budget=0.35)
    assert (chosen.is_chosen, chosen.threshold, chosen.n) == (True, 0.6, 10)
    assert (first.tokens, first.accuracy, first.n) == (20.0, 0.25, 20)
    assert first.curve_accuracy == pytest.approx(0.5)  # half way between 0.25 and 0.75
    assert first.difference is not None
    assert first.difference.value == pytest.approx(0.25)
    assert first.total_difference is None  # with 20 judged tokens beside its 10, the curve starts at 30
    assert (second.curve_accuracy, second.difference) == (None, None)  # the curve never spends 90 policy tokens
    assert second.total_difference is not None
    assert second.total_difference.value == pytest.approx(-0.25)  # at 30 + 60 judged tokens it reaches 0.75


def test_what_was_sampled_for_nothing_is_spent_as_well() -> None:
    reply = {
        "choices": [{"message": {"content": "4"}}],
        "usage": {"completion_tokens": 30},
        "rtap": {"cycles": [], "stop_reason": "threshold", "confidence_tokens": 9, "first_answer_seconds": 1.0,
                 "discarded_tokens": 7},
    }  # fmt: skip
    spent = outcome_of(0, Question("2+2", "4", "sums"), reply, 1.5, lambda _, answer, right: answer == right)
    assert (spent.is_correct, spent.policy_tokens, spent.generator_tokens) == (True, 37, 9)
