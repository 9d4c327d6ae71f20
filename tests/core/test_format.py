"""The cycle parser: its results do not depend on chunking, and only tags are lost.

test_hostile_text.py holds its linear cost.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import ConfigError
from rtap_core.format import (
    RTAP,
    TEXT,
    THINK,
    CycleParser,
    TrajectoryFormat,
    default_recursion,
    detect_format,
    format_from_config,
    parse_cycle,
    split_cycles,
)

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
    "\n",
    "é",
]
_TEXTS = st.lists(st.sampled_from(_FRAGMENTS), max_size=14).map("".join)


def _read(parser: CycleParser, chunks: list[str]) -> tuple[str, str | None]:
    """(thinking as it was returned, answer)"""
    returned = [parser.feed(chunk) for chunk in chunks] + [parser.close(ended_by_model=True)]
    assert "".join(returned) == parser.think
    return "".join(returned), parser.partial_answer


@given(_TEXTS, st.data(), st.sampled_from([RTAP, THINK, TEXT]), st.booleans())
def test_reading_does_not_depend_on_chunking(text, data, fmt, opened):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, cut = CycleParser(fmt, thought_open=opened), CycleParser(fmt, thought_open=opened)
    assert _read(whole, [text]) == _read(cut, chunks)
    assert (whole.think, whole.answer, whole.partial_answer) == (cut.think, cut.answer, cut.partial_answer)


def _plainly(text: str, fmt: TrajectoryFormat, *, opened: bool) -> tuple[str, str | None]:
    """The same, from a whole text cut at its tags: all of it is in one of the two, but for tags that did something and
    what follows the end of the answer."""
    think = answer = ""
    begins_with_thought = opened or fmt.has_answer_tags or text.lstrip().startswith(fmt.think_open)
    in_answer = not begins_with_thought or not fmt.has_think_tags
    for part in re.split("(" + "|".join(map(re.escape, fmt.tags)) + ")", text):
        if in_answer and part == fmt.answer_close:
            break
        if not in_answer and part in (fmt.think_open, fmt.think_close, fmt.answer_open):
            in_answer = part == (fmt.answer_open or fmt.think_close)
        elif in_answer:
            answer += part
        else:
            think += part
    return think, answer.strip() or None


@given(st.one_of(_TEXTS, st.text()), st.sampled_from([RTAP, THINK, TEXT]), st.booleans())
def test_nothing_is_lost_but_tags(text, fmt, opened):
    assert _read(CycleParser(fmt, thought_open=opened), [text]) == _plainly(text, fmt, opened=opened)


@given(st.text(alphabet="abc 123+*=\n", max_size=30), st.text(alphabet="abc123+*", min_size=1, max_size=10))
def test_a_rendered_cycle_reads_back(think, answer):
    for fmt in (RTAP, THINK):
        assert parse_cycle(fmt.render_cycle(think, answer), fmt, ended_by_model=True) == (think.strip(), answer)


def test_a_cycle_continues_the_thought_that_its_prompt_has_begun():
    assert THINK.render_cycle("so", "2", prompt="<|user|>1+1<|assistant|>") == "<think>so</think>2"
    assert THINK.render_cycle("so", "2", prompt="<|user|>1+1<|assistant|><think>\n") == "so</think>2"
    assert THINK.render_cycle("", "2", prompt="<|user|>1+1<|assistant|><think>\n\n</think>\n\n") == "2"
    assert TEXT.render_cycle("", "2", prompt="<|user|>1+1<|assistant|>") == "2"


def test_a_cycle_without_closed_answer_has_none():
    assert parse_cycle("<think>12*9=108</think><answer>108", RTAP) == ("12*9=108", None)
    assert parse_cycle("<think>12*9", RTAP) == ("12*9", None)
    assert parse_cycle("<think>a</think><answer>  </answer>", RTAP) == ("a", None)


def test_partial_answer_is_kept_apart_from_the_answer():
    parser = CycleParser(RTAP)
    parser.feed("<think>a</think><answer>10")
    parser.close(ended_by_model=False)
    assert (parser.answer, parser.partial_answer) == (None, "10")


def test_the_turns_end_closes_an_answer_without_end_tag():
    assert parse_cycle("<think>a</think>The answer is 5.", THINK, ended_by_model=True) == ("a", "The answer is 5.")
    assert parse_cycle("<think>a</think>The ans", THINK) == ("a", None)


def test_think_preset_without_thought_is_all_answer():
    assert parse_cycle("Hello!", THINK, ended_by_model=True) == ("", "Hello!")
    assert parse_cycle("<thin air", THINK, ended_by_model=True) == ("", "<thin air")
    parser = CycleParser(THINK, thought_open=True)
    parser.feed("so be it</think>done")
    parser.close(ended_by_model=True)
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
        (TEXT, "<think>1", "08</think>", ("", "08</think>")),
    ],
)
def test_a_cycle_that_somebody_else_began_is_read_from_there(fmt, prefix, text, read):
    parser = CycleParser(fmt, prefix=prefix)
    assert _read(parser, [text]) == read
    assert (parser.think, parser.answer) == read


@given(
    st.lists(st.sampled_from([*_FRAGMENTS, "ab", "b"]), max_size=14),
    st.sampled_from([RTAP, THINK, TEXT]),
    st.booleans(),
)
def test_a_stop_string_ends_the_answer_wherever_it_is_split_and_nothing_else(pieces, fmt, include):
    """Against a search of the whole answer of a parser without stops."""
    stops = ("7b", "b7", "<", "aba", "\n", "think")
    plain, stopped = CycleParser(fmt), CycleParser(fmt, stop=stops, include_stop=include)
    for piece in pieces:
        plain.feed(piece)
        if stopped.stopped_at is None:
            stopped.feed(piece)
    for parser in (plain, stopped):
        parser.close(ended_by_model=True)
    answer = "".join(plain._answer).lstrip()
    found = min((answer.index(s) + len(s), stops.index(s)) for s in stops if s in answer) if any(
        s in answer for s in stops) else None  # fmt: skip
    if found is None:
        assert (stopped.stopped_at, stopped.answer) == (None, plain.answer)
        return
    end, stop = found[0], stops[found[1]]
    kept = answer[:end] if include else answer[: end - len(stop)]
    assert (stopped.stopped_at, stopped.answer) == (stop, kept.strip() or None)
    assert plain.think.startswith(stopped.think)


@pytest.mark.parametrize(
    ("fmt", "text", "tag"),
    [
        (RTAP, "", ""),
        (RTAP, "no tags", ""),
        (RTAP, "<think>a", "</think>"),
        (RTAP, "<think>a</answer>", "</think>"),
        (RTAP, "<think>a</think>b", ""),
        (RTAP, "<think>a</think><think>b", "</think>"),
        (RTAP, "<think>a<answer>b", "</answer>"),
        (RTAP, "<think>a</think><answer>b</ans", "</answer>"),
        (RTAP, "<think>a</think><answer>b</answer>", ""),
        (TEXT, "<think>a", ""),
        (THINK, "a", ""),
        (THINK, "<think>a", "</think>"),
        (THINK, "<think>a</think>b", ""),
        (THINK, "<think>a</think>b<think>c", "</think>"),
        (THINK, "<think>a</think>b<think>c</think>d", ""),
    ],
)
def test_what_is_open_at_the_end_of_a_cycle_has_a_closing_tag(fmt, text, tag):
    parser = CycleParser(fmt)
    parser.feed(text)
    parser.close(ended_by_model=True)
    assert parser.closing_tag == tag


def test_text_after_the_answer_is_dropped():
    assert parse_cycle("<think>a</think><answer>1</answer>junk<answer>2</answer>", RTAP) == ("a", "1")


def test_split_cycles_reads_a_whole_trajectory():
    text = RTAP.render_cycle("a", "1") + RTAP.render_cycle("Oops, b", "2") + "<think>c"
    assert split_cycles(text) == [("a", "1"), ("Oops, b", "2"), ("c", None)]
    assert split_cycles("") == []


def test_format_comes_from_the_checkpoint_and_a_flag_overrides():
    assert format_from_config({"format": "rtap"}) is RTAP
    assert format_from_config(None) is THINK
    assert format_from_config({"format": "rtap"}, override="think") is THINK
    assert format_from_config({"format": "rtap", "cycle_open": "\n<think>"}).cycle_open == "\n<think>"
    assert format_from_config({"format": "rtap", "cycle_open": "<think>"}, override="text") is TEXT
    with pytest.raises(ConfigError, match=r"unknown trajectory format 'x'.*'rtap', 'text', 'think'"):
        format_from_config({"format": "x"})


@pytest.mark.parametrize(
    ("block", "template", "vocabulary", "override", "fmt", "source"),
    [
        ({"format": "rtap"}, "</think>", set(), None, RTAP, "the rtap block of config.json"),
        ({"format": "text"}, "</think>", {"<think>", "</think>"}, None, TEXT, "the rtap block of config.json"),
        ({"format": "rtap"}, "", set(), "text", TEXT, "--trajectory-format"),
        ({"threshold": 0.5}, "x", {"<think>"}, None, TEXT, "no <think> in chat template or vocabulary"),
        (None, "{{ content.split('</think>')[-1] }}", set(), None, THINK, "<think> in the chat template"),
        (None, "<think>\n", set(), None, THINK, "<think> in the chat template"),
        (None, "", {"<think>", "</think>"}, None, THINK, "<think> in the vocabulary"),
        (None, "<|im_start|>", {"a"}, None, TEXT, "no <think> in chat template or vocabulary"),
    ],
)
def test_the_format_of_a_model_and_what_shows_it(block, template, vocabulary, override, fmt, source):
    assert detect_format(block, template=template, vocabulary=vocabulary, override=override) == (fmt, source)


def test_a_block_without_format_still_names_its_opening():
    fmt, _ = detect_format({"cycle_open": "Wait,"}, template="", vocabulary=())
    assert (fmt.name, fmt.cycle_open) == ("text", "Wait,")


@given(_TEXTS, st.booleans())
def test_tags_in_the_answer_of_a_text_model_are_text(text, ended):
    parser = CycleParser(TEXT)
    assert [parser.feed(c) for c in text] == [""] * len(text)
    assert parser.close(ended_by_model=ended) == ""
    assert parser.take_answer(final=True) == text
    assert (parser.answer, parser.partial_answer) == (text.strip() or None if ended else None, text.strip() or None)
    assert (parser.think, parser.closing_tag) == ("", "")


@pytest.mark.parametrize(
    ("block", "recursion"),
    [
        (None, "fresh"), ({"format": "rtap"}, "continue"), ({"format": "think"}, "fresh"),
        ({"threshold": 0.5}, "fresh"),
        ({"format": "think", "recursion": "continue"}, "continue"), ({"format": "rtap", "recursion": "fresh"}, "fresh"),
    ],
)  # fmt: skip
def test_only_models_that_were_trained_to_continue_continue(block, recursion):
    assert default_recursion(block) == recursion


@pytest.mark.parametrize("wrong", ["again", ["fresh"], 3])
def test_an_unknown_recursion_is_one_sentence(wrong):
    with pytest.raises(ConfigError, match=r"unknown recursion .*; use one of \['continue', 'fresh'\]"):
        default_recursion({"recursion": wrong})
