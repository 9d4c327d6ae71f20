"""Every parser costs in proportion to its text, on a megabyte of what is meant to confuse it.

Time is the thread's own: others are busy on the same cores. Twice the text may cost twice as much; quadratic would be
four times, and sixteen from the shortest to the longest.
"""

import contextlib
from collections.abc import Callable

import msgspec
import pytest

from rtap_core.answers import answer_key
from rtap_core.errors import InvalidRequest
from rtap_core.format import RTAP, THINK, CycleParser, split_cycles
from rtap_core.lexicon import load_lexicon
from rtap_server.engine.request_state import RequestState
from rtap_server.http.body_limits import parse_json
from rtap_server.http.errors import shape_error
from rtap_server.http.field_limits import FieldLimits
from rtap_server.http.response_rewriter import EventStream
from rtap_server.telemetry.feedback import Feedback
from tests.costs import cpu_seconds
from tests.server.http.test_recursion_fields import _trajectory

MEBIBYTE = 2**20
UNITS = ["<", "</", "</answer", "<think><answer>", "[]", "oops ", "let me ", " ", "\n", ".", "x"]


def cost(work: Callable[[str], object], unit: str, size: int) -> float:
    """Seconds of this thread."""
    text = (unit * (size // len(unit) + 1))[:size]
    return cpu_seconds(lambda: work(text))


def in_deltas(fmt, step: int) -> Callable[[str], None]:
    """The text as a model writes it: a few characters at a time."""

    def read(text: str) -> None:
        parser = CycleParser(fmt)
        for at in range(0, len(text), step):
            parser.feed(text[at : at + step])
            parser.take_answer(final=False)  # as the loop does
        parser.close(ended_by_model=True)
        assert len(parser.think) + len(parser.partial_answer or "") <= len(text)

    return read


def through_a_stream(text: str) -> None:
    """As the text of events, and as bytes that never end one."""
    stream = EventStream("/v1/chat/completions", RequestState(trajectories={0: _trajectory()}), Feedback())
    delta = msgspec.json.encode({"choices": [{"index": 0, "delta": {"reasoning": text}, "finish_reason": None}]})
    assert len(stream.feed(b"data: " + delta + b"\n\n")) > len(text)
    for at in range(0, len(text), 512):
        assert stream.feed(text[at : at + 512].replace("\n", " ").encode()) == b""


def as_a_body(text: str) -> None:
    """As JSON, whole and as a value, through all that looks at it before a route does."""
    limits = FieldLimits(n=16, messages=1024, token_ids=1024, allows_templates=False)
    for raw in (text.encode(), msgspec.json.encode({"prompt": text}), b'{"a":' + text.encode()):
        with contextlib.suppress(InvalidRequest):
            request = parse_json(raw)
            limits.check(request)
            limits.check_length(request)


def as_an_error(text: str) -> None:
    """Of somebody's who repeats it all: it is cut before it is looked through."""
    body = msgspec.json.encode({"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}})
    shaped = shape_error(400, body, "id", "/v1/models")
    assert shaped is not None
    assert len(shaped.body) < 2**14


PARSERS: dict[str, Callable[[str], object]] = {
    "cycle, in one piece": in_deltas(RTAP, MEBIBYTE * 2),
    "cycle, in deltas": in_deltas(RTAP, 29),
    "cycle, thinking models": in_deltas(THINK, 29),
    "trajectory": split_cycles,
    "stream": through_a_stream,
    "body": as_a_body,
    "lexicon": load_lexicon().find,
    "answer": answer_key,
    "error text": as_an_error,
}


def too_dear(work: Callable[[str], object], unit: str, size: int = MEBIBYTE) -> str | None:
    """What is out of proportion, in three measurements of three: a neighbour's noise is not in all of them."""
    slack, told = 0.03, None  # the clock's own grain, and what a first call pays
    for _ in range(3):
        quarter, half, whole = (cost(work, unit, part) for part in (size // 4, size // 2, size))
        if whole < 2.0 and half < 3 * quarter + slack and whole < 3 * half + slack:
            return None
        told = f"{unit!r}: {quarter:.3f} {half:.3f} {whole:.3f} s"
    return told


@pytest.mark.parametrize("name", PARSERS)
def test_cost_is_in_proportion(name):
    for unit in UNITS:
        assert too_dear(PARSERS[name], unit) is None


def test_a_quadratic_reader_would_be_told():
    def read(text: str) -> None:
        held = ""
        for at in range(0, len(text), 64):
            held = (held + text[at : at + 64]).lstrip("y")
            held.count("z")

    assert too_dear(read, "x") is not None
