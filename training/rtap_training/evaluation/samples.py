"""Kept samples of votes: one JSON line a sample, from which rules are replayed without a server.

Fields of a line: ``task``, ``question``, ``reference`` (the reference answer), ``sample`` (number), ``think``, ``text``
(the whole answer), ``answer`` (extracted; null if the sample was cut), ``is_correct``, ``tokens``, ``confidence`` and
``logprobs`` (both may be null). ``question``, ``reference``, ``text`` and ``tokens`` are enough: the rest is computed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtap_core.answers import extract_answer
from rtap_core.artifact import Logistic, read_artifact_file
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Outcome, Run, RunSpec, whole_lines, write_atomically
from rtap_training.evaluation.rules import VOTE


def write_samples(path: Path, votes: Sequence[Run], questions: Mapping[str, Sequence[Question]]) -> None:
    """Write the samples of all votes."""
    rows = [
        {
            "task": vote.task,
            "question": questions[vote.task][outcome.index].text,
            "reference": questions[vote.task][outcome.index].answer,
            "sample": number,
            "think": cycle.think,
            "text": cycle.text,
            "answer": cycle.answer,
            "is_correct": cycle.is_correct,
            "tokens": cycle.tokens,
            "confidence": cycle.confidence,
            "logprobs": cycle.logprobs,
        }
        for vote in votes
        for outcome in vote.answered
        for number, cycle in enumerate(outcome.cycles)
    ]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_samples(
    paths: Sequence[Path],
    samples: int,
    *,
    limit: int | None = None,
    split: str | None = None,
    confidence_config: Path | None = None,
) -> tuple[dict[str, list[Question]], list[Run]]:
    """Questions by task, and a vote over the first ``samples`` samples of each; questions with fewer are left out.

    confidence_config: file of ``rtap calibrate`` that computes confidences from ``logprobs``, in place of those kept.
    Raises ConfigError with the file and line at fault."""
    logistic = None if confidence_config is None else _logistic(confidence_config)
    found: dict[Question, list[CycleRecord]] = {}
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"cannot read the samples file {path}: no such file")
        for number, line in enumerate(whole_lines(path), start=1):
            try:
                row: dict[str, Any] = json.loads(line)
                question = Question(row["question"], row["reference"], row.get("task") or path.stem)
                cycle = _cycle(question, row, logistic)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{path}:{number}: not a sample ({type(error).__name__}: {error}); a line needs question, "
                    "reference, text and tokens"
                ) from error
            if split in (None, question.split):
                found.setdefault(question, []).append(cycle)
    questions: dict[str, list[Question]] = {}
    outcomes: dict[str, list[Outcome]] = {}
    for question, cycles in found.items():
        rows = questions.setdefault(question.task, [])
        if len(cycles) >= samples and len(rows) != limit:
            vote = tuple(cycles[:samples])
            outcomes.setdefault(question.task, []).append(
                Outcome(len(rows), policy_tokens=sum(one.tokens for one in vote), cycles=vote)
            )
            rows.append(question)
    if not outcomes:
        most = max((len(cycles) for cycles in found.values()), default=0)
        raise ConfigError(
            f"no question of {', '.join(map(str, paths))} has {samples} samples, the largest of --samples; the most "
            f"that one has is {most}"
        )
    spec = RunSpec(VOTE, samples=samples)
    runs = [Run(task, spec, tuple(of_task), wall_seconds=None) for task, of_task in outcomes.items()]
    return {task: questions[task] for task in outcomes}, runs


def _logistic(path: Path) -> Logistic:
    logistic = read_artifact_file(path).logistic
    if logistic is None or not logistic.reads_logprobs or logistic.generator:
        raise ConfigError(f"{path} does not compute confidence from log-probabilities alone; only these are kept")
    return logistic


def _cycle(question: Question, row: Mapping[str, Any], logistic: Logistic | None) -> CycleRecord:
    text: str | None = row["text"]
    answer = row["answer"] if "answer" in row else extract_answer(text or "") or None
    confidence = row.get("confidence")
    if logistic is not None:
        confidence = None if answer is None else logistic.confidence(None, LogprobFeatures.from_shown(row["logprobs"]))
    record = CycleRecord(answer, False, confidence, row["tokens"], 0, 0, None)
    right = row["is_correct"] if "is_correct" in row else question.is_right(answer)
    return replace(record, is_correct=right, think=row.get("think"), text=text, logprobs=row.get("logprobs"))
