"""What `rtap chat` draws: bars, changes, the running and the finished turn; hostile model text stays text."""

import io
import re

import pytest
from rich.console import Console, RenderableType

from rtap_client.connection import safe
from rtap_client.streams import AnswerEvent, CycleEvent, DoneEvent, ThinkingEvent
from rtap_client.types import Cycle, Trajectory
from rtap_client.view import Turn, bar, changes, render, summary
from tests.clients.fake_server import CYCLE, RTAP

HOSTILE = "[bold]x[/bold]\x1b[2J\x1b]0;owned\x07\x9b31m4\r"


def printed(shown: RenderableType, width: int = 100, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **options).print(shown)
    return out.getvalue()


def cycle(index: int, answer: str | None, confidence: float | None, *, accepted: bool = False) -> Cycle:
    return Cycle.construct(**CYCLE | {"index": index, "answer": answer, "confidence": confidence, "accepted": accepted})


@pytest.mark.parametrize(
    ("confidence", "threshold", "expected"),
    [
        (0.5, None, "█████░░░░░"),
        (0.0, 0.5, "░░░░░│░░░░"),
        (1.0, 0.5, "█████│████"),
        (0.3, 1.0, "███░░░░░░│"),
        (None, 0.0, "│░░░░░░░░░"),
        (7.0, -1.0, "│█████████"),
    ],
)
def test_a_bar_shows_the_confidence_and_where_the_threshold_is(confidence, threshold, expected):
    assert bar(confidence, threshold, cells=10).plain == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, "25*3", "25*3"),
        ("25*3", "25*3", "25*3  same answer"),
        ("25+7", "25*3", "25*3  gone: +7"),
        ("25", "25*3", "25*3"),
        ("a " * 50, "b", "b"),
        ("25", None, "(cut before its answer was complete)"),
    ],
)
def test_changes_between_answers(before, after, expected):
    assert changes(before, after).plain == expected


def test_what_is_new_is_marked():
    text = changes("25+7", "25*3")
    marked = ["".join(text.plain[s.start : s.end]) for s in text.spans if s.style == "bold green"]
    assert marked == ["*3"]


def test_a_running_turn_shows_cycles_and_the_last_thoughts_without_the_rejected_answer():
    turn = Turn("confidence", 0.5, 4)
    for event in (
        ThinkingEvent("first thought", 0),
        CycleEvent(cycle(0, "25*3", 0.1), 0),
        ThinkingEvent("\n<answer>25*3</answer>\n" + "\n".join(f"line {i}" for i in range(20)), 0),
    ):
        turn.observe(event)
    shown = printed(render(turn, 1.25))
    assert "cycle 2 of at most 4 · confidence · 1.2 s · Ctrl-C stops" in shown
    assert re.search(r"1 ✗ ██░+│░+ 0\.100 7 tok", shown)
    assert "line 19" in shown
    assert "line 13" not in shown
    assert "first thought" not in shown
    assert "<answer>" not in shown


def test_a_finished_turn_shows_the_answer_and_why_it_stopped():
    turn = Turn("confidence", 0.5, 4)
    turn.observe(AnswerEvent("4", 0))
    rtap = Trajectory.construct(**RTAP)
    turn.observe(DoneEvent("id", "4", "stop", rtap, (rtap,), None))
    shown = printed(render(turn, 0.5))
    assert "─ answer ─" in shown
    assert "sure enough after 1 cycle · confidence 0.900 (threshold 0.50) · 7 tokens · 0.50 s" in shown
    assert "Ctrl-C" not in shown


def test_a_vote_tells_of_samples_and_marks_all_that_agree_with_the_answer():
    turn = Turn("vote", None, 8)
    assert "sample 1 · vote · 1.0 s" in printed(render(turn, 1.0))
    cycles = [{**CYCLE, "index": i, "answer": a, "accepted": i == 0} for i, a in enumerate(("4", "5", "4"))]
    rtap = Trajectory.construct(**{**RTAP, "policy": "vote", "stop_reason": "vote", "cycles": cycles})
    turn.observe(DoneEvent("id", "4", "stop", rtap, (rtap,), None))
    shown = printed(render(turn, 0.5))
    assert re.findall(r"^\d ([✓✗])", shown, re.MULTILINE) == ["✓", "✗", "✓"]
    assert "majority of 3 samples · confidence 0.900 · " in shown


def test_a_stopped_turn_and_one_without_an_answer_say_so():
    turn = Turn("model", None, 4, cycles=[cycle(0, None, None)], stopped=True)
    assert "stopped after 2.0 s" in printed(render(turn, 2.0))
    assert summary(turn, 2.0) == "7 tokens · 2.00 s"
    cut = Turn("model", None, 4, done=DoneEvent("id", "", "length", None, (), None))
    assert "no answer was completed; raise max-tokens or the deadline" in printed(render(cut, 1.0))


def test_hostile_model_text_is_shown_and_does_not_command_the_terminal():
    turn = Turn("confidence", 0.5, 4, cycles=[cycle(0, HOSTILE, 0.1)], thought=HOSTILE)
    finished = Turn("confidence", 0.5, 4, answer=HOSTILE, done=DoneEvent("id", HOSTILE, "stop", None, (), None))
    for shown in (printed(render(turn, 1.0)), printed(render(finished, 1.0))):
        assert "[bold]x[/bold]" in shown
        assert not set(shown) & set("\x1b\x07\x9b\r")


def test_safe_text_keeps_lines_and_letters():
    assert safe("a\tb\nç→𝟙" + HOSTILE) == "a\tb\nç→𝟙[bold]x[/bold][2J]0;owned31m4"


def test_a_narrow_terminal_loses_nothing_of_the_answer():
    shown = printed(render(Turn("confidence", 0.5, 4, cycles=[cycle(0, "abcdefghij" * 4, 0.2)]), 1.0), width=70)
    assert sum(shown.split("⠋")[0].count(letter) for letter in "hij") == 12
