"""Questions, records and the comparisons made from them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import judged, outcome_of
from rtap_training.evaluation.measurement import judge, measure
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import CycleRecord, Outcome, Round, Run, RunFile, RunSpec, write_atomically
from rtap_training.evaluation.replay import RuleParameters
from rtap_training.evaluation.results import task_results


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
    selecting = sum(question.split == "calibration" for question in questions)
    assert 900 < selecting < 1100
    assert len({question.seed(0) for question in questions}) == 2000
    assert questions[0].seed(0) != questions[0].seed(1)
    assert all(0 <= question.seed(0) < 2**31 for question in questions)


def test_a_run_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "run.jsonl"
    answered = outcome(0, [cycle("1", confidence=0.2), cycle(None)])
    file = RunFile(path, resume=False)
    file.add(answered)
    file.add(Outcome(1, error="HTTP 500: no"))  # asked again
    file.end_round(Round(0, 12.5, "today"))
    path.write_text(path.read_text() + '{"index": 2, "error": nu')  # killed while it wrote
    again = RunFile(path, resume=True)
    assert (again.outcomes, again.rounds) == ({0: answered}, {0: Round(0, 12.5, "today")})
    again.add(outcome(2, [cycle("3")]))
    assert set(RunFile(path, resume=True).outcomes) == {0, 2}
    assert RunFile(path, resume=False).outcomes == {}
    assert path.read_text() == ""


def test_the_prompt_is_the_question_or_what_a_template_makes_of_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "sums.jsonl", [{"question": "2{+}2", "answer": "4"}])
    assert load_questions([path])["sums"][0].prompt == "2{+}2"
    (asked,) = load_questions([path], prompt="Q: {question}\n\\boxed{}")["sums"]
    assert (asked.text, asked.prompt) == ("2{+}2", "Q: 2{+}2\n\\boxed{}")
    with pytest.raises(ConfigError, match=r"has no \{question\}"):
        load_questions([path], prompt="just answer")


def test_each_question_is_in_one_half(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "sums.jsonl", [{"question": f"{i}?", "answer": "4"} for i in range(50)])
    halves = [load_questions([path], split=split)["sums"] for split in ("calibration", "test")]
    assert sorted(q.text for half in halves for q in half) == sorted(f"{i}?" for i in range(50))
    assert [{q.split for q in half} for half in halves] == [{"calibration"}, {"test"}]


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
    assert (figures.n, figures.errors, figures.accuracy.value, figures.policy_tokens.value) == (2, 1, 0.5, 25.0)
    assert figures.costs == {
        "generator_tokens": 50.0, "wall_seconds": 4.0, "questions_per_second": 0.5, "median_seconds": 0.5,
        "median_first_answer_seconds": 0.25, "cycles": 1.5, "oops_tokens": 1.5, "oops_per_1000_tokens": 60.0,
        "cached_prompt_tokens": 48.0, "recomputed_prompt_tokens": 27.0, "recomputed_per_later_cycle": 18.0,
        "most_recomputed": 18, "unanswered": 1, "degraded": 1,
    }  # fmt: skip
    assert figures.stop_reasons == {"max_tokens": 1, "threshold": 1}


def test_a_judgement_reads_every_scored_sample() -> None:
    good, bad = cycle("1", right=True, confidence=0.8), cycle("2", confidence=0.3)
    run = Run(
        "demo",
        RunSpec("vote", samples=3),
        (outcome(0, [good, bad, cycle(None)]), outcome(1, [bad, bad, bad]), outcome(2, [bad, good, good])),
        1.0,
    )
    questions = [Question(f"q{i}", "1", "demo") for i in range(3)]
    judged = judge(run, questions)
    assert judged is not None
    assert judged.answers == 8
    assert judged.within is not None
    assert (judged.within.auroc.value, judged.within.mixed_questions) == (1.0, 2)
    assert (judged.best_of.value, judged.ceiling.value) == (2 / 3, 2 / 3)
    assert judge(run_of(RunSpec("vote", samples=1), [True], 5), questions) is None
    stopped = judge(replace(run, spec=RunSpec("confidence", 0.5)), questions)
    assert stopped is not None
    assert stopped.within is None  # the rule selects which answers there are


def reply_of(answer: str | None, content: str) -> dict[str, Any]:
    cycle = {"index": 0, "answer": answer, "confidence": None, "tokens": 30, "oops_tokens": 0, "prompt_tokens": 9,
             "cached_tokens": 0, "seconds": 1.0, "confidence_seconds": None}  # fmt: skip
    return {
        "choices": [{"message": {"content": content}}],
        "usage": {"completion_tokens": 30},
        "rtap": {"cycles": [cycle], "stop_reason": "threshold", "confidence_tokens": 9, "first_answer_seconds": 1.0,
                 "discarded_tokens": 7},
    }  # fmt: skip


def test_what_was_sampled_for_nothing_is_spent_as_well() -> None:
    spent = judged(Question("2+2", "4", "sums"), outcome_of(0, reply_of("4", "4"), 1.5))
    assert (spent.is_correct, spent.policy_tokens, spent.generator_tokens) == (True, 37, 9)


def test_a_cut_answer_is_no_answer() -> None:
    cut = judged(Question("2+2", "4", "sums"), outcome_of(0, reply_of(None, "4"), 1.5))
    assert (cut.answer, cut.is_correct) == (None, False)


def test_seconds_are_compared_within_one_session() -> None:
    def run(rule: str, *rounds: Round | None) -> Run:
        spec = RunSpec(rule, samples=2) if rule == "vote" else RunSpec(rule)
        cycles = [cycle("a"), cycle("a")][: spec.samples or 1]
        return Run("demo", spec, (outcome(0, cycles),), 1.0, rounds)

    parameters = RuleParameters((2,), (0.95,), (0.5,), 1.0)
    vote = run("vote", Round(0, 10.0, "monday"), Round(0, 10.0, "monday"), Round(0, 10.0, "tuesday"))

    def ratio(*rounds: Round | None) -> float | None:
        found = task_results("demo", [run("single", *rounds), vote], [Question("q", "a", "demo")], parameters)
        interval = found.rows[0].wall_ratio
        return None if interval is None else interval.value

    assert ratio(Round(0, 5.0, "monday"), Round(0, 90.0, "tuesday"), Round(0, 5.0, "tuesday")) == 0.5
    assert ratio(Round(0, 5.0, "tuesday"), None, Round(0, 5.0, "")) is None
