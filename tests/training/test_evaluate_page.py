"""The page that `rtap eval` writes for readers: what it says, that nothing of a question can become markup, and that it
needs nothing but itself."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rtap_training.evaluation.measurement import WORST, judge
from rtap_training.evaluation.page import choose, interval, percent, to_html
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Outcome, Run, RunSpec
from rtap_training.evaluation.replay import RuleParameters
from rtap_training.evaluation.results import Results, task_results
from rtap_training.evaluation.statistics import Interval

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
TASK = "demo"
PARAMETERS = RuleParameters(samples=(2, 4), vote_thresholds=(0.95,), thresholds=(0.5,), budget=0.6)


def cycle(answer: str | None, right: bool, confidence: float | None) -> CycleRecord:
    return CycleRecord(answer, right, confidence, 20, 1, 30, 16)


def questions(count: int) -> list[Question]:
    return [Question(f"question {i} {HOSTILE if i == 0 else ''}", "right & proper", TASK) for i in range(count)]


def run(spec: RunSpec, count: int) -> Run:
    """Odd questions are answered right; the confidence says so for most."""
    outcomes = []
    for i in range(count):
        right = i % 2 == 1
        first = cycle(HOSTILE if i == 0 else f"answer {i}", right, 0.01 * i if right else 1 - 0.01 * i)
        cycles = (first, cycle(None, False, None)) if spec.samples is None else (first,) * spec.samples
        outcomes.append(
            Outcome(i, None, first.answer, right, "threshold", 20 * len(cycles), 50, 0.1, 0.1, None, cycles)
        )
    return Run(TASK, spec, tuple(outcomes), 2.0)


def results(count: int = 40) -> Results:
    specs = (RunSpec("single"), RunSpec("confidence", 0.5), RunSpec("vote", samples=4))
    task = task_results(TASK, [run(s, count) for s in specs], questions(count), PARAMETERS)
    setting = {
        "command": f"rtap eval --questions '{HOSTILE}'",
        "questions": {TASK: count},
        "date": "2026-11-25T01:02:03",
    }
    return Results(setting, (task,))


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = to_html(results())
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "object", "form", "a"} & {tag for tag, _ in reader.tags}
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source is not None and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in reader.tags if tag == "img")
    outside = re.sub(r"data:[^\"]+", "", page)
    assert "url(" not in outside
    assert "@import" not in outside
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]


def test_text_of_questions_and_answers_is_never_markup() -> None:
    page = to_html(results())
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("right &amp; proper") >= WORST


def test_it_says_what_the_table_says() -> None:
    page = to_html(results())
    assert "50.0 %" in page
    assert "adaptive@0.95 x4 answers 50.0 % right with 80.0 tokens a question: 100 % of what majority x4 spends" in page
    for label in ("single", "confidence@0.5", "vote x4", "majority x2", "cges@0.95 x4"):
        assert label in page
    assert "2026-11-25" in page


def test_the_same_results_give_the_same_bytes() -> None:
    assert to_html(results()) == to_html(results())


def test_the_worst_answers_are_the_surest_wrong_and_the_least_sure_right_one_a_question() -> None:
    judged = judge(run(RunSpec("vote", samples=4), 40), questions(40))
    assert judged is not None
    assert judged.answers == 160
    assert [m.confidence for m in judged.surely_wrong] == pytest.approx([1.0 - 0.02 * k for k in range(WORST)])
    assert [m.confidence for m in judged.hardly_right] == pytest.approx([0.01 + 0.02 * k for k in range(WORST)])
    assert judged.surely_wrong[0].answer == HOSTILE
    assert sum(b.cycles for b in judged.bins) == 160


def test_without_a_vote_the_confidence_rule_is_judged_and_without_both_nothing_is() -> None:
    alone = task_results(TASK, [run(RunSpec("confidence", t), 10) for t in (0.2, 0.7)], questions(10), PARAMETERS)
    assert alone.judgement is not None
    assert alone.judgement.rule == "confidence@0.7"
    silent = run(RunSpec("single"), 4)
    nothing = task_results(TASK, [silent], questions(4), PARAMETERS)
    assert nothing.judgement is None
    page = to_html(Results({}, (nothing,)))
    assert "Largest errors of the confidence" not in page
    assert "Reliability" not in page
    assert 'class="lead"' not in page


def test_failed_requests_are_told() -> None:
    broken = run(RunSpec("single"), 4)
    broken = replace(broken, outcomes=(Outcome(0, error="HTTP 500 <b>"), *broken.outcomes[1:]))
    page = to_html(Results({}, (task_results(TASK, [broken], questions(4), PARAMETERS),)))
    assert "1 requests failed" in page
    assert "HTTP 500 &lt;b&gt;" in page


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (float("nan"), "–"), (0.7, "70.0 %"), (1.0, "100.0 %"), (0.0, "0.0 %")]
)
def test_shares(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_intervals() -> None:
    assert interval(Interval(0.5, 0.433, 0.52)) == "43.3–52.0"
    assert interval(Interval(0.0, -0.013, 0.02), sign=True) == "-1.3 to +2.0"


def test_a_headline_without_a_vote_names_the_cost_alone() -> None:
    task = task_results(TASK, [run(RunSpec("confidence", 0.5), 4)], questions(4), PARAMETERS)
    setting = {"server": {"defaults": {"policy": "confidence", "threshold": 0.5}}}
    assert "with 40.0 tokens a question.</p>" in to_html(Results(setting, (task,)))


def test_a_threshold_is_highlighted_if_it_was_chosen_or_is_served_and_not_for_its_accuracy() -> None:
    runs = [run(RunSpec("confidence", t), 4) for t in (0.2, 0.7)]
    task = task_results(TASK, runs, questions(4), PARAMETERS)
    task = replace(task, rows=tuple(row for row in task.rows if "chosen" not in row.label))
    assert "Stopped by confidence" not in choose(task)
    assert choose(task, 0.7)["Stopped by confidence"].threshold == 0.7
