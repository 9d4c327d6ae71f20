"""Rollouts through the server's loop on a scripted engine."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest

from rtap_core.format import RTAP, TEXT, THINK, TrajectoryFormat
from rtap_training.rl.lockstep import Completion, Generate, Request
from rtap_training.rl.rollouts import Dialect, Rollout, RolloutQuestion, roll_out

# One token a tag, one a character, END ends the turn.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END = 9


def encode(text: str) -> list[int]:
    ids: list[int] = []
    while text:
        tag = next((t for t in TAGS if text.startswith(t)), None)
        ids.append(1 + TAGS.index(tag) if tag else 100 + ord(text[0]))
        text = text[len(tag or text[0]) :]
    return ids


def decode(ids: Sequence[int]) -> str:
    return "".join("$" if i == END else TAGS[i - 1] if i < 100 else chr(i - 100) for i in ids)


def dialect(fmt: TrajectoryFormat = RTAP) -> Dialect:
    ends = frozenset(encode(fmt.answer_close)) if fmt.answer_close else frozenset[int]()
    return Dialect(
        fmt, END, frozenset({END}), ends, decode, encode,
        count_oops=lambda text: text.count("Oops"), render=lambda messages: messages[-1]["content"],
    )  # fmt: skip


def script(rows: list[list[str]], *, logps: bool = False) -> tuple[Generate, list[list[Request]]]:
    """Each row writes its texts in turn; ``$`` is the end of the turn. Also returns the batches that were asked for."""
    texts = [iter(row) for row in rows]
    asked: list[list[Request]] = []

    def generate(requests: Sequence[Request]) -> list[Completion]:
        asked.append(list(requests))
        results: list[Completion] = []
        for request in requests:
            text = next(texts[request.row])
            ids = [*encode(text.removesuffix("$")), *([END] if text.endswith("$") else [])][: request.max_tokens]
            results.append(Completion(ids, [-0.5] * len(ids) if logps else None))
        return results

    return generate, asked


def cycle(answer: str, think: str = "t") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def again(answer: str, think: str = "t") -> str:
    """A cycle opened by the loop."""
    return cycle(answer, think).removeprefix("<think>")


def play(
    rows: list[list[str]], *, max_cycles: int = 4, max_tokens: int = 500, fmt: TrajectoryFormat = RTAP, **kwargs: bool
) -> tuple[list[Rollout], list[list[Request]]]:
    generate, asked = script(rows, **kwargs)
    questions = [
        RolloutQuestion(f"q{i}", encode(f"q{i}:"), lambda answer: answer.endswith("8")) for i in range(len(rows))
    ]
    rollouts = roll_out(
        questions, generate, dialect(fmt), max_cycles=max_cycles, max_tokens=max_tokens, max_cycle_tokens=None
    )
    return rollouts, asked


def test_a_row_is_cut_after_its_first_right_cycle_and_ends_the_turn() -> None:
    (row,), _ = play([[cycle("7"), again("8"), again("9")]])
    assert decode(row.completion_ids) == f"{cycle('7')}{cycle('8')}$"
    assert [c.is_right for c in row.cycles] == [False, True]
    assert row.is_right


def test_an_answer_that_ended_with_the_turn_is_scored_and_followed_as_a_whole_one() -> None:
    """The loop writes the end tag as a boundary token; the cycle text shows that it was missing."""
    unclosed = cycle("7").removesuffix("</answer>")
    (row,), asked = play([[unclosed + "$", again("8")]])
    assert decode(asked[1][0].prompt_ids) == f"q0:{cycle('7')}<think>"
    assert decode(row.completion_ids) == f"{cycle('7')}{cycle('8')}$"
    assert [decode(c.ids) for c in row.cycles] == [cycle("7"), cycle("8")]
    assert [c.text for c in row.cycles] == [unclosed, cycle("8")]
    injected = "".join(decode([i]) for i, b in zip(row.completion_ids, row.is_boundary, strict=True) if b)
    assert injected == "</answer><think>$"


@pytest.mark.parametrize("fmt", [THINK, TEXT])
def test_a_row_goes_on_after_a_continued_cycle_that_is_empty(fmt: TrajectoryFormat) -> None:
    """The server makes a fresh attempt then; a row of training is one sequence in one context."""
    first = "<think>t</think>7" if fmt is THINK else "7"
    last = "t</think>8" if fmt is THINK else "8"
    (row,), asked = play([[first + "$", "$", last + "$"]], fmt=fmt, max_cycles=3)
    assert [c.is_right for c in row.cycles] == [False, False, True]
    assert decode(asked[2][0].prompt_ids).startswith(f"q0:{first}{fmt.cycle_open}")
    assert decode(row.completion_ids).startswith(f"{first}{fmt.cycle_open}")


def test_only_what_the_cut_wrote_is_a_boundary() -> None:
    (row,), _ = play([[cycle("7"), again("8")]])
    marked = "".join(decode([i]) for i, b in zip(row.completion_ids, row.is_boundary, strict=True) if b)
    assert marked == "<think>$"


def test_a_row_that_is_never_right_has_all_cycles_and_no_end() -> None:
    (row,), _ = play([[cycle("1"), again("2"), again("3")]], max_cycles=3)
    assert decode(row.completion_ids) == cycle("1") + cycle("2") + cycle("3")
    assert not row.is_right
    assert sum(row.is_boundary) == 2


def test_an_early_end_of_turn_is_dropped_and_the_loop_goes_on() -> None:
    """The thought ends the turn without an answer: the next cycle must not see that, and the thought is closed."""
    (row,), asked = play([["<think>t$", again("8")]])
    assert END not in asked[1][0].prompt_ids
    assert decode(row.completion_ids) == f"<think>t</think>{cycle('8')}$"
    assert row.cycles[0].answer is None
    assert decode(row.cycles[0].ids) == "<think>t"


def test_every_prompt_continues_the_row_byte_for_byte() -> None:
    (row,), asked = play([[cycle("1"), again("2"), again("8")]])
    for before, after in pairwise(batch[0].prompt_ids for batch in asked):
        assert after[: len(before)] == before
    assert [*asked[-1][0].prompt_ids, *encode(again("8")), END] == row.prompt_ids + row.completion_ids


def test_one_batch_a_depth_with_only_the_rows_that_go_on() -> None:
    rows, asked = play([[cycle("8")], [cycle("1"), again("8")], [cycle("1"), again("2"), again("8")]])
    assert [[r.row for r in batch] for batch in asked] == [[0, 1, 2], [1, 2], [2]]
    assert [len(r.cycles) for r in rows] == [1, 2, 3]


def test_rows_come_in_the_order_of_the_questions() -> None:
    rows, _ = play([[cycle("1"), again("8")], [cycle("8")]])
    assert [r.question for r in rows] == ["q0", "q1"]


def test_the_budget_of_a_row_covers_all_its_cycles() -> None:
    size = len(encode(cycle("1")))
    (row,), asked = play([[cycle("1"), again("22222")]], max_tokens=size + 4)
    assert asked[1][0].max_tokens == 3  # the opening is a token of the budget too
    assert len(row.completion_ids) == size + 4
    assert row.cycles[-1].answer is None


def test_what_a_generator_scores_is_the_cycle_with_its_opening() -> None:
    (row,), _ = play([[cycle("7"), again("8")]])
    assert [c.text for c in row.cycles] == [cycle("7"), cycle("8")]


def test_sampler_log_probabilities_are_unknown_at_boundaries_only() -> None:
    (row,), _ = play([[cycle("7"), again("8")]], logps=True)
    assert row.logps is not None
    assert [math.isnan(p) for p in row.logps] == row.is_boundary


def test_without_sampler_log_probabilities_there_are_none() -> None:
    (row,), _ = play([[cycle("8")]])
    assert row.logps is None


def test_think_format_ends_cycles_with_the_turn() -> None:
    (row,), _ = play([["<think>t</think>7$", "t</think>8$"]], fmt=THINK)
    assert decode(row.completion_ids) == "<think>t</think>7<think>t</think>8$"
    assert [i for i, b in enumerate(row.is_boundary) if b] == [len(encode("<think>t</think>7"))]


def test_an_opening_written_by_the_chat_template_belongs_to_the_first_cycle() -> None:
    generate, _ = script([["t</think><answer>7</answer>", again("8")]])
    question = RolloutQuestion("q", encode("q:<think>"), lambda answer: answer == "8")
    (row,) = roll_out([question], generate, dialect(), max_cycles=2, max_tokens=99, max_cycle_tokens=None)
    assert [c.text for c in row.cycles] == [cycle("7"), cycle("8")]
    assert decode(row.completion_ids) == f"t</think><answer>7</answer>{cycle('8')}$"


def test_oops_are_counted_in_thoughts() -> None:
    (row,), _ = play([[cycle("7"), again("8", think="Oops Oops")]])
    assert [c.oops_tokens for c in row.cycles] == [0, 2]


def test_a_failing_engine_ends_the_rollout_with_its_error() -> None:
    def generate(requests: Sequence[Request]) -> list[Completion]:
        raise RuntimeError("no memory")

    questions = [RolloutQuestion("q", [1], lambda _: True)] * 3
    with pytest.raises(RuntimeError, match="no memory"):
        roll_out(questions, generate, dialect(), max_cycles=2, max_tokens=50, max_cycle_tokens=None)
