"""Kept samples of votes: one JSON line a sample, from which rules are replayed without a server.

Fields of a line: ``task``, ``question``, ``prompt`` (the message that was sent; left out if it is the question),
``reference`` (the reference answer), ``sample`` (number), ``think``, ``text``
(the whole answer), ``answer`` (extracted; null if the sample was cut), ``is_correct``, ``tokens``, ``confidence`` and
``logprobs`` (both may be null), ``kind`` and ``logistic`` (the server's confidence and the calibration it applied),
``confidence_tokens`` (read by the generator, where known).
``question``, ``reference``, ``text`` and ``tokens`` are enough: the rest is computed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtap_core.answers import extract_answer
from rtap_core.artifact import Logistic, read_artifact_file
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Outcome, Run, RunSpec, write_atomically
from rtap_training.evaluation.rules import VOTE


def write_samples(
    path: Path, votes: Sequence[Run], questions: Mapping[str, Sequence[Question]], *, confidence: Mapping[str, Any]
) -> None:
    """Write the samples of all votes. confidence: that of GET /v1/rtap/config."""
    lines = [
        sample_line(questions[vote.task][outcome.index], number, cycle, confidence)
        for vote in votes
        for outcome in vote.answered
        for number, cycle in enumerate(outcome.cycles)
    ]
    write_atomically(path, "".join(lines))


def sample_line(question: Question, number: int, cycle: CycleRecord, confidence: Mapping[str, Any]) -> str:
    """The line of one sample. confidence: see ``write_samples``."""
    names = ("think", "text", "answer", "is_correct", "tokens", "confidence", "logprobs")
    row = {"task": question.task, "question": question.text, "reference": question.answer, "sample": number}
    row |= {name: getattr(cycle, name) for name in names}
    row |= {"kind": confidence["kind"], "logistic": confidence.get("logistic")}
    if question.prompt != question.text:
        row["prompt"] = question.prompt
    return json.dumps(row, ensure_ascii=False) + "\n"


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
    for question, cycle, _ in sample_rows(paths, logistic):
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


def sample_rows(
    paths: Sequence[Path], logistic: Logistic | None = None
) -> Iterator[tuple[Question, CycleRecord, Mapping[str, Any]]]:
    """(question, sample, all fields) of each line. logistic: computes confidences, in place of those kept.

    Raises ConfigError with the file and line at fault."""
    for path in paths:
        try:
            lines = path.read_text("utf-8").split("\n")
        except OSError as error:
            raise ConfigError(f"cannot read the samples file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the samples file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row: dict[str, Any] = json.loads(line)
                question = Question(row["question"], row["reference"], row.get("task") or path.stem)
                cycle = _cycle(question, row, logistic)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{path}:{number}: not a sample ({type(error).__name__}: {error}); a line needs question, "
                    "reference, text and tokens"
                ) from error
            yield question, cycle, row


def _logistic(path: Path) -> Logistic:
    logistic = read_artifact_file(path).logistic
    if logistic is None or not logistic.reads_logprobs or logistic.generator:
        raise ConfigError(f"{path} does not compute confidence from log-probabilities alone; only these are kept")
    return logistic


def _cycle(question: Question, row: Mapping[str, Any], logistic: Logistic | None) -> CycleRecord:
    text, confidence = row["text"], row.get("confidence")
    answer = row["answer"] if "answer" in row else extract_answer(text or "") or None
    if confidence is not None and not 0.0 <= float(confidence) <= 1.0:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    if logistic is not None:
        confidence = None if answer is None else logistic.confidence(None, LogprobFeatures.from_shown(row["logprobs"]))
    return CycleRecord(
        answer,
        row["is_correct"] if "is_correct" in row else question.is_right(answer),
        confidence,
        row["tokens"],
        think=row.get("think"),
        text=text,
        logprobs=row.get("logprobs"),
        confidence_tokens=row.get("confidence_tokens"),
    )
