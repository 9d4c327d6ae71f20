"""The cycle parser: what it reads must not depend on how the text arrives, and its cost must be linear."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.rtap.errors import ConfigError
from server.rtap.format import RTAP, THINK, Channel, CycleParser, format_from_config, parse_cycle, split_cycles

# Text made of tags, halves of tags and ordinary characters: everything that can confuse a splitter.
_FRAGMENTS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<",
    "</",
    "<ans",
    "wer>",
    "think",
    "<answer",
    "7",
    " ",
    "é",
]
_TEXTS = st.lists(st.sampled_from(_FRAGMENTS), max_size=14).map("".join)


def _pieces(parser: CycleParser, chunks: list[str]) -> dict[Channel, str]:
    got = {Channel.THINK: "", Channel.ANSWER: ""}
    for chunk in chunks:
        for piece in parser.feed(chunk):
            got[piece.channel] += piece.text
    for piece in parser.close(ended_by_model=True):
        got[piece.channel] += piece.text
    return got


@given(_TEXTS, st.data(), st.sampled_from([RTAP, THINK]), st.booleans())
def test_reading_does_not_depend_on_chunking(text, data, fmt, opened):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, cut = CycleParser(fmt, thought_open=opened), CycleParser(fmt, thought_open=opened)
    assert _pieces(whole, [text]) == _pieces(cut, chunks)
    assert (whole.think, whole.answer, whole.partial_answer) == (cut.think, cut.answer, cut.partial_answer)


@given(st.text(alphabet="abc 123+*=\n", max_size=30), st.text(alphabet="abc123+*", min_size=1, max_size=10))
def test_a_rendered_cycle_reads_back(think, answer):
    for fmt in (RTAP, THINK):
        assert parse_cycle(fmt.render_cycle(think, answer), fmt, ended_by_model=True) == (think.strip(), answer)


def test_a_cycle_without_closed_answer_has_none():
    assert parse_cycle("<think>12*9=108</think><answer>108", RTAP) == ("12*9=108", None)
    assert parse_cycle("<think>12*9", RTAP) == ("12*9", None)
    assert parse_cycle("<think>a</think><answer>  </answer>", RTAP) == ("a", None)


def test_partial_answer_is_kept_apart_from_the_answer():
    parser = CycleParser(RTAP)
    list(parser.feed("<think>a</think><answer>10"))
    list(parser.close(ended_by_model=False))
    assert (parser.answer, parser.partial_answer) == (None, "10")


def test_the_turns_end_closes_an_answer_without_end_tag():
    assert parse_cycle("<think>a</think>The answer is 5.", THINK, ended_by_model=True) == ("a", "The answer is 5.")
    assert parse_cycle("<think>a</think>The ans", THINK) == ("a", None)


def test_think_preset_without_thought_is_all_answer():
    assert parse_cycle("Hello!", THINK, ended_by_model=True) == ("", "Hello!")
    assert parse_cycle("<thin air", THINK, ended_by_model=True) == ("", "<thin air")
    parser = CycleParser(THINK, thought_open=True)
    list(parser.feed("so be it</think>done"))
    list(parser.close(ended_by_model=True))
    assert (parser.think, parser.answer) == ("so be it", "done")


@pytest.mark.parametrize(
    ("fmt", "prefix", "text", "read"),
    [
        (RTAP, "<think>12*9=", "108</think><answer>108</answer>", ("108", "108")),
        (RTAP, "<think>12*9=108</think><answer>1", "08</answer>", ("", "08")),
        (RTAP, "<think>12*9=108</think><answer>108 <", "5</answer>", ("", "5")),
        (RTAP, "<think>a</think><answer>1</answer><think>b", "c</think><answer>9</answer>", ("c", "9")),
        (RTAP, "<think>a</think><answer>1</answer>", "<think>c</think><answer>9</answer>", ("c", "9")),
        (THINK, "<think>12*9=", "108</think>108", ("108", "108")),
        (THINK, "<think>12*9=108</think>1", "08", ("", "08")),
        (THINK, "1", "08", ("", "08")),
    ],
)
def test_a_cycle_that_somebody_else_began_is_read_from_there(fmt, prefix, text, read):
    parser = CycleParser(fmt, prefix=prefix)
    got = _pieces(parser, [text])
    assert (got[Channel.THINK], got[Channel.ANSWER]) == read
    assert (parser.think, parser.answer) == read


def test_text_after_the_answer_is_dropped():
    assert parse_cycle("<think>a</think><answer>1</answer>junk<answer>2</answer>", RTAP) == ("a", "1")


def test_split_cycles_reads_a_whole_trajectory():
    text = RTAP.render_cycle("a", "1") + RTAP.render_cycle("Oops, b", "2") + "<think>c"
    assert split_cycles(text) == [("a", "1"), ("Oops, b", "2"), ("c", None)]
    assert split_cycles("") == []


@pytest.mark.parametrize("unit", ["<", "<think", "</answer", "<answer>", "x"])
def test_cost_is_linear_on_hostile_text(unit):
    def seconds(size: int, step: int) -> float:
        text = (unit * (size // len(unit) + 1))[:size]
        best = float("inf")
        for _ in range(3):
            parser = CycleParser(RTAP)
            start = time.perf_counter()
            for at in range(0, size, step):
                for _ in parser.feed(text[at : at + step]):
                    pass
            best = min(best, time.perf_counter() - start)
        return best

    # 4x the text may cost 4x the time (quadratic would be 16x); a margin for a noisy machine.
    assert seconds(400_000, 7) < 9 * seconds(100_000, 7)
    assert seconds(1_000_000, 1_000_000) < 10.0


def test_format_comes_from_the_checkpoint_and_a_flag_overrides():
    assert format_from_config({"format": "rtap"}) is RTAP
    assert format_from_config(None) is THINK
    assert format_from_config({"format": "rtap"}, override="think") is THINK
    assert format_from_config({"format": "rtap", "cycle_open": "\n<think>"}).cycle_open == "\n<think>"
    with pytest.raises(ConfigError, match=r"unknown trajectory format 'x'.*'rtap', 'think'"):
        format_from_config({"format": "x"})
