"""Fit a confidence to right and wrong samples, taken from a server or from files.

For ``confidence=logprob`` a logistic regression on the log-probability features is fitted, for other kinds a Platt
calibration of the score.
"""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rtap_core.artifact import LOGPROB_WEIGHTS, UNCALIBRATED, Logistic
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.evaluation import calibration
from rtap_training.evaluation.calibration import Bools
from rtap_training.evaluation.client import judged, open_server
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import CycleRecord, Load, Outcome, RunSpec
from rtap_training.evaluation.rules import CONFIDENCE
from rtap_training.evaluation.samples import sample_line, sample_rows
from rtap_training.evaluation.statistics import within_question_auroc

LOGPROB = "logprob"
FITTED = "fitted, cross-validated"
MIN_QUESTIONS = 5


@dataclass(frozen=True, slots=True)
class Served:
    """Judged samples of one server, as (question, sample with an answer). kind: of confidence; None if unknown.
    logistic: calibration that the server applied."""

    kind: str | None
    samples: Sequence[tuple[str, CycleRecord]]
    logistic: Mapping[str, float] | None = None


def fit(served: Served) -> tuple[dict[str, Any], str]:
    """(``rtap`` block of the file, report). Raises ConfigError for samples from which nothing can be learned."""
    is_logprob = served.kind == LOGPROB
    names = LOGPROB_WEIGHTS if is_logprob else ("generator",)
    rows = [one for one in served.samples if (one[1].logprobs if is_logprob else one[1].confidence) is not None]
    if not rows:
        what = "log-probability features" if is_logprob else "a confidence"
        raise ConfigError(f"none of the {len(served.samples)} samples has {what}; sample a server with --confidence")
    try:
        known = [None if one.logprobs is None else LogprobFeatures.from_shown(one.logprobs) for _, one in rows]
        inputs = map(Logistic.inputs, [None if is_logprob else one.confidence for _, one in rows], known)
        features = np.array([[row[name] for name in names] for row in inputs])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the samples hold wrong features ({type(error).__name__}: {error})") from error
    labels = np.array([one.is_correct for _, one in rows], dtype=np.bool_)
    _, firsts, place = np.unique([question for question, _ in rows], return_index=True, return_inverse=True)
    questions: list[int] = place.tolist()
    _check_contrast(labels, len(firsts))
    bias, *weights = calibration.fit_logistic(features, labels)
    logistic = Logistic(bias=round(bias, 5), **{n: round(w, 5) for n, w in zip(names, weights, strict=True)})
    if served.logistic is not None and not is_logprob:
        logistic = Logistic(**served.logistic).then(logistic)
    confidences = [
        UNCALIBRATED.confidence(None, f) if one.confidence is None else one.confidence
        for (_, one), f in zip(rows, known, strict=True)
    ]
    fitted = calibration.cross_validated(features, labels, questions)
    metrics = {
        name: asdict(calibration.figures(scores, labels, questions))
        for name, scores in (("as served", np.array(confidences)), (FITTED, fitted))
    }
    threshold = calibration.best_threshold(fitted, labels)
    block = {
        "kind": "confidence",
        "source": served.kind,
        "threshold": threshold,
        "logistic": logistic.model_dump(exclude_defaults=True),
        "calibration": {
            "reference": calibration.histogram(fitted[firsts]),
            "held_out": metrics[FITTED],
        },
    }
    lines = [_row(name, row) for name, row in metrics.items()]
    for number, name in enumerate(names if is_logprob else ()):
        alone = within_question_auroc(questions, features[:, number], labels)
        lines += [] if alone is None else [f"  {name:26}{alone.auroc.value:.3f}"]
    first = metrics["as served"]
    report = [
        f"{len(rows)} samples of {len(firsts)} questions, {first['right_share']:.0%} right; "
        f"{first['contrast_questions']} questions with right and wrong samples",
        f"{'':28}{'within-question AUROC':24}{'ECE':24}Brier",
        *lines,
        f"threshold {threshold}",
    ]
    return block, "\n".join(report)


def _row(name: str, metrics: Mapping[str, Any]) -> str:
    """Line of the report."""
    cells = [f"{name:28}"]
    for figure in ("within_auroc", "ece", "brier"):
        low, high = metrics["intervals"].get(figure, (None, None))
        cells.append(f"{'–' if low is None else f'{metrics[figure]:.3f} [{low:.3f}, {high:.3f}]':24}")
    return "".join(cells).rstrip()


def _check_contrast(labels: Bools, questions: int) -> None:
    right, wrong = int(labels.sum()), int((~labels).sum())
    if right == 0 or wrong == 0:
        raise ConfigError(
            f"all {len(labels)} samples are {'wrong' if right == 0 else 'right'}, so nothing separates them; give "
            f"{'easier' if right == 0 else 'harder'} questions"
        )
    if questions < 2 * MIN_QUESTIONS or min(right, wrong) < MIN_QUESTIONS:
        raise ConfigError(
            f"{right} right and {wrong} wrong samples of {questions} questions are too few; give at least "
            f"{2 * MIN_QUESTIONS} questions and {MIN_QUESTIONS} samples of each kind (100 questions are a good start)"
        )


def read(paths: Sequence[Path], split: str | None) -> Served:
    """Samples of files that ``rtap eval`` or ``rtap calibrate`` wrote, without those that have no answer.

    Raises ConfigError for scores of unknown origin: their calibration could not follow that of the server."""
    shown = ", ".join(map(str, paths))
    samples, sources = list[tuple[str, CycleRecord]](), list[tuple[str | None, Mapping[str, float] | None]]()
    for question, cycle, row in sample_rows(paths):
        if cycle.answer is None or split not in (None, question.split):
            continue
        kind = row.get("kind") or (None if cycle.logprobs is None else LOGPROB)
        if kind is None and cycle.confidence is not None:
            raise ConfigError(
                f"{shown} has confidences without kind and logistic, the server's calibration that they include; "
                "sample again with `rtap calibrate MODEL`"
            )
        samples.append((question.text, cycle))
        if kind is not None and (source := (kind, row.get("logistic"))) not in sources:
            sources.append(source)
    if not samples:
        raise ConfigError(f"{shown} has no samples with an answer; sample again with a larger --max-tokens")
    if len(sources) > 1:
        raise ConfigError(f"{shown} has samples of {len(sources)} different confidences; give those of one server")
    samples.sort(key=lambda one: one[0])  # concurrent samples are kept as they come
    kind, logistic = sources[0] if sources else (None, None)
    return Served(kind, samples, logistic)


def sample(args: argparse.Namespace, kept: Path) -> None:
    """Sample the questions through a server, one scored cycle for each request, and write the samples to ``kept`` as
    they come. Raises ConfigError for questions and servers that cannot be used, OSError for the file."""
    questions = load_questions(args.questions, limit=args.limit, prompt=args.prompt, split=args.split)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("w", encoding="utf-8", buffering=1) as file:
        asyncio.run(_sample(args, questions, file))


async def _sample(args: argparse.Namespace, questions: Mapping[str, Sequence[Question]], file: TextIO) -> None:
    flags = args.serve_flags
    if not args.confidence_model and not any(f.split("=")[0] in ("--confidence", "--confidence-model") for f in flags):
        flags = ["--confidence", LOGPROB, *flags]
    load = Load(args.concurrency, args.temperature, args.seed, max_cycles=1, max_tokens=args.max_tokens)
    async with open_server(args, flags, log=args.output.with_suffix(".log")) as server:
        source: Mapping[str, Any] = server.config["confidence"]
        if source["kind"] == "none":
            raise ConfigError("the server has no confidence; start it with --confidence or --confidence-model")

        def keep(rows: Sequence[Question], number: int, outcome: Outcome) -> None:
            question = rows[outcome.index]
            cycles = judged(question, outcome).cycles
            file.writelines(sample_line(question, number, cycle, source) for cycle in cycles)

        for (task, rows), number in product(questions.items(), range(args.samples)):
            part, spec = replace(load, seed=load.seed + number), RunSpec(CONFIDENCE, threshold=1.0)
            outcomes, _ = await server.ask(rows, spec, part, on_outcome=partial(keep, rows, number))
            errors = [outcome.error for outcome in outcomes if outcome.error is not None]
            if len(errors) == len(outcomes):
                raise ConfigError(f"every request failed: {errors[0]}")
            progress = f"{number + 1} of {args.samples} samples of each question, {len(errors)} failed"
            sys.stderr.write(f"{task}: {progress}\n")
