"""Benchmarks of a language model: parity, agreement of answers, openings of a continued cycle."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import answers
import httpx
import openings
import parity
import pytest
from harness import Server, Servers

from rtap_core.format import RTAP
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.samples import read_samples
from rtap_training.tasks.equivalence import Comparer

# ------------------------------------------------------------------------------------------------------------- parity

ENTRY = {"token": "4", "logprob": -0.1, "bytes": [52], "top_logprobs": []}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def reply(request: httpx.Request, message: Mapping[str, str], finish_reason: str = "stop") -> httpx.Response:
    """What a server answers: whole, or one chunk for each character."""
    body = json.loads(request.content)
    logprobs = {"content": [ENTRY, ENTRY]} if body.get("logprobs") else None
    if not body.get("stream"):
        choice = {"message": message, "finish_reason": finish_reason, "logprobs": logprobs}
        return httpx.Response(200, json={"choices": [choice], "usage": USAGE})
    parts: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}]
    parts += [{"delta": {name: letter}} for name, text in message.items() for letter in text]
    parts[-1] |= {"finish_reason": finish_reason, "logprobs": logprobs}
    chunks = [{"choices": [part]} for part in parts] + [{"choices": [], "usage": USAGE}]
    return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


def found_differences(fmt: str, ours: Mapping[str, str], plain: Mapping[str, str], **plain_more: Any) -> list[Any]:
    extra = {"stop_token_ids": [7]} if fmt == "rtap" else {}
    servers = Servers(
        fmt,
        Server("rtap", "http://ours", Path("m"), {}),
        Server("vllm", "http://plain", Path("m"), extra),
        None,
        (),
        {},
    )

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.host == "ours":
            return reply(request, ours)
        assert ("include_stop_str_in_output" in json.loads(request.content)) == (fmt == "rtap")
        return reply(request, plain, **plain_more)

    questions = [Question("1+1?", "2", "sums"), Question("2+2?", "4", "sums")]
    cases = parity.cases_of(questions, 64, 8, has_logprobs=fmt != "rtap")
    assert [(case.max_tokens, case.with_logprobs) for case in cases[::2]] == [
        (64, False), (64, False), (64, fmt != "rtap"),
    ]  # fmt: skip
    with httpx.Client(transport=httpx.MockTransport(handle)) as client, ThreadPoolExecutor(2) as executor:
        return [parity.compare(executor, client, servers, case) for case in cases]


def test_equal_replies_are_equal_streamed_and_whole() -> None:
    assert found_differences("think", {"content": "2 = 2"}, {"content": "2 = 2"}) == [None] * 6
    assert (
        found_differences("think", {"reasoning": "Hm.", "content": "2"}, {"reasoning": "Hm.", "content": "2"})
        == [None] * 6
    )


def test_any_difference_is_found() -> None:
    assert None not in found_differences("think", {"content": "2"}, {"content": "2 "})
    assert None not in found_differences("think", {"content": "2"}, {"reasoning": "2"})
    (first, *_) = found_differences("think", {"content": "2"}, {"content": "2"}, finish_reason="length")
    assert (first.ours.finish_reason, first.plain.finish_reason) == ("stop", "length")
    assert "- finish_reason: ours `stop`, plain `length`" in parity.to_markdown({}, 1, [first.case], [first])


def test_the_cycle_of_a_model_with_answer_tags_is_compared() -> None:
    ours = {"reasoning": "1 + 1 = 2", "content": "2"}
    assert found_differences("rtap", ours, {"content": RTAP.render_cycle("1 + 1 = 2", "2")}) == [None] * 6
    assert None not in found_differences("rtap", ours, {"content": RTAP.render_cycle("1 + 1 = 2", " 2")})


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    one = Comparer()
    yield one
    one.close()


ROWS = [
    {"question": "a", "reference": "0.5", "text": "So \\boxed{1/2}"},
    {"question": "a", "reference": "0.5", "text": "The answer is 2."},
    {"question": "a", "reference": "0.5", "text": "\\boxed{1 + 1}"},
]


def test_pairs_are_counted_by_the_verdicts_of_both(comparer: Comparer) -> None:
    pairs = answers.compare(answers.pairs_of(ROWS), comparer)
    assert {(p.one, p.other) for p in pairs} == {
        ("1/2", "0.5"), ("2", "0.5"), ("1 + 1", "0.5"), ("1/2", "2"), ("1/2", "1 + 1"), ("2", "1 + 1"),
    }  # fmt: skip
    found = answers.summarise(pairs)
    assert (found.pairs, found.both, found.only_ours, found.only_math_verify) == (6, 1, 0, 1)  # 1 + 1 is not evaluated
    assert (found.precision, found.recall, found.different_numbers) == (1.0, 0.5, 0)
    wrong = answers.Pair("3", "4", 1, ours=True, math_verify=False)
    assert answers.summarise([wrong]).different_numbers == 1


def test_extraction_is_counted_by_how_the_answer_is_written(comparer: Comparer) -> None:
    box, stated = answers.extraction(ROWS, comparer)
    assert (box.kind, box.texts, box.as_written, box.ours, box.last_number) == ("box", 2, 2, 1, 0)
    assert (stated.kind, stated.texts, stated.ours, stated.math_verify) == ("stated", 1, 0, 0)


# ----------------------------------------------------------------------------------------------------------- openings


class Letters:
    """A tokenizer of code points."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: Any) -> str:
        return f"<{conversation[0]['content']}>"

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(map(ord, text))


def firsts_of(folder: Path, texts: Mapping[str, str]) -> list[openings.First]:
    """First answers to questions whose answer is 4, from samples of one letter. A blank is a sample that was cut."""
    rows = [
        {"task": "sums", "question": question, "reference": "4", "text": text, "tokens": 2, "sample": number}
        | ({"answer": None} if text == " " else {})
        for question, both in texts.items()
        for number, text in enumerate(both)
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    questions, votes = read_samples([path], 2)
    return openings.first_answers(votes, questions, "{question}!")


def test_first_answers_are_continued_after_their_text(tmp_path: Path) -> None:
    firsts = firsts_of(tmp_path, {"r": "45", "w": "54", "v": "55", "cut": " 4", "one": "4"})
    assert [(f.question.text, f.is_right, f.second.text) for f in firsts] == [
        ("r", True, "5"),
        ("w", False, "4"),
        ("v", False, "5"),
    ]
    firsts = openings.some(firsts, right=5, wrong=1)
    assert openings.continued_prompts(firsts, ["", " Wait"], Letters()) == [
        [*map(ord, text)] for text in ("<r!>4", "<r!>4 Wait", "<w!>5", "<w!>5 Wait")
    ]


def test_corrected_and_broken_answers_are_paired_with_fresh_ones(tmp_path: Path) -> None:
    right, wrong = firsts_of(tmp_path, {"r": "45", "w": "55"})
    results = [openings.result_of(first, openings.FRESH, first.second.text or "", 2) for first in (right, wrong)]
    results += [openings.result_of(right, "", " ", 1), openings.result_of(wrong, "", "So the sum is 4.", 9)]
    fresh, again = openings.rows_of(results, [openings.FRESH, ""])
    assert (fresh["corrected"]["value"], fresh["broken"]["value"], fresh["tokens"]["value"]) == (0, 1, 2)
    assert (again["corrected"]["value"], again["broken"]["value"]) == (1, 0)  # an empty one keeps the first answer
    assert (again["corrected_minus_fresh"]["value"], again["broken_minus_fresh"]["value"]) == (1, -1)
    assert (again["empty"]["value"], again["same"]["value"], again["tokens"]["value"]) == (0.5, 0.5, 5)
    assert "| fresh | 0.000" in openings.to_markdown({}, [fresh, again])
