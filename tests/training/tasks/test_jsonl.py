"""Question files are read completely, or refused with the line at fault."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import ConfigError
from rtap_training.tasks.base import Question, Split
from rtap_training.tasks.jsonl import question_split, read_questions, read_rows

GOOD = '{"question": "a?", "answer": "1"}'


def write(folder: Path, *lines: str) -> Path:
    path = folder / "sums.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return path


def test_rows_are_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "", '{"question": "b?", "answer": 2.5, "task": "mine", "extra": []}', "")
    assert read_questions(path) == [Question("a?", "1", "sums"), Question("b?", "2.5", "mine")]
    assert [where for where, _ in read_rows(path, task="t")] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "a?", "answer": ', "not JSON"),
        ("[1, 2]", "must be an object"),
        ("3", "must be an object"),
        ('{"question": "a?"}', '"answer" is missing or empty'),
        ('{"answer": "1"}', '"question" is missing or empty'),
        ('{"question": " ", "answer": "1"}', '"question" is missing or empty'),
        ('{"question": "b?", "answer": ""}', '"answer" is missing or empty'),
        ('{"question": "b?", "answer": null}', '"answer" is missing or empty'),
        ('{"question": "b?", "answer": true}', '"answer" is missing or empty'),
        ('{"question": "b?", "answer": ["1"]}', '"answer" is missing or empty'),
        ('{"question": "b?", "answer": "1", "task": 3}', '"task" must be text'),
        ("[" * 100_000, "sums.jsonl:2: "),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_files_that_cannot_be_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no questions"):
        read_questions(write(tmp_path, "", " "))
    with pytest.raises(ConfigError, match="cannot read the question file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot read the question file"):
        read_questions(tmp_path)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_questions(tmp_path / "bytes.jsonl")


def test_repeated_questions_count_once_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, GOOD, '{"question": "A ?", "answer": "2"}', '{"question": "b?", "answer": "3"}', GOOD)
    with caplog.at_level(logging.WARNING):
        read = read_questions(path)
    assert (read[0], len(read)) == (Question("a?", "1", "sums"), 2)
    assert caplog.text.count("2 duplicate questions") == 1


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.mktemp("q"), json.dumps({"question": text, "answer": text}, ensure_ascii=False))
    assert read_questions(path) == [Question(text, text, "sums")]


def test_the_split_is_blind_to_spaces_and_case_and_holds_out_a_tenth() -> None:
    texts = [f"How many apples has basket {n}?" for n in range(3000)]
    splits = [question_split(t) for t in texts]
    assert splits == [question_split(f"  {t.upper()}\n") for t in texts]
    assert 0.08 < splits.count(Split.HELD_OUT) / len(texts) < 0.12
