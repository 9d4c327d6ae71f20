"""``rtap calibrate``: fit a server's confidence to right and wrong answers, and write its ``--confidence-config``.

Questions are sampled through the server, or samples of an earlier run are read. For ``confidence=logprob`` a logistic
regression on the log-probability features is fitted, for other kinds a Platt calibration of the score.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtap_core.errors import ConfigError
from rtap_training.evaluation.arguments import add_shared_flags, positive, run_command

if TYPE_CHECKING:
    from rtap_training.evaluation.question_files import Question
    from rtap_training.evaluation.records import CycleRecord, Outcome

LOGPROB = "logprob"
_CONFIDENCE_FLAGS = ("--confidence", "--confidence-model")
MIN_QUESTIONS = 5


@dataclass(frozen=True, slots=True)
class Served:
    """Judged samples of one server. kind: of confidence; None if unknown. logistic: calibration that it applied."""

    kind: str | None
    samples: Sequence[tuple[str, "CycleRecord"]]
    """(question, sample with an answer)"""
    logistic: Mapping[str, float] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rtap calibrate``. Returns 0; 2 for invalid arguments, servers or samples."""
    return run_command(
        _parser(), argv, _calibrate, lambda args: f"fit the samples so far with --from-samples {_kept(args.output)}"
    )


def _calibrate(args: argparse.Namespace) -> int:
    from rtap_training.evaluation.records import write_atomically

    if args.from_samples and (args.model or args.confidence_model):
        raise ConfigError("--from-samples needs no server; omit MODEL and --confidence-model")
    if args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a folder; give the name of a file")
    served = _read(args.from_samples, args.split) if args.from_samples else _sampled(args)
    block, report = fit(served)
    write_atomically(args.output, json.dumps({"rtap": block, "command": args.command}, indent=2) + "\n")
    sys.stdout.write(f"{report}\nwrote {args.output}; serve it with --confidence-config {args.output}\n")
    return 0


def fit(served: Served) -> tuple[dict[str, Any], str]:
    """(``rtap`` block of the file, report). Raises ConfigError for samples from which nothing can be learned."""
    import numpy as np

    from rtap_core.artifact import LOGPROB_WEIGHTS, UNCALIBRATED, Logistic
    from rtap_core.features import LogprobFeatures
    from rtap_training.calibration import best_threshold, cross_validated, figures, fit_logistic, histogram, intervals
    from rtap_training.evaluation.statistics import within_question_auroc

    is_logprob = served.kind == LOGPROB
    names = LOGPROB_WEIGHTS if is_logprob else ("generator",)
    rows = [one for one in served.samples if (one[1].logprobs if is_logprob else one[1].confidence) is not None]
    if not rows:
        what = "log-probability features" if is_logprob else "a confidence"
        raise ConfigError(f"none of the {len(served.samples)} samples has {what}; sample a server with --confidence")
    try:
        known = [None if one.logprobs is None else LogprobFeatures.from_shown(one.logprobs) for _, one in rows]
        scores = [None if is_logprob else one.confidence for _, one in rows]
        inputs = map(Logistic.inputs, scores, known)
        features = np.array([[row[name] for name in names] for row in inputs])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the samples hold wrong features ({type(error).__name__}: {error})") from error
    labels = np.array([one.is_correct for _, one in rows], dtype=np.bool_)
    _, firsts, questions = np.unique([question for question, _ in rows], return_index=True, return_inverse=True)
    _check_contrast(labels, len(firsts))
    bias, *weights = fit_logistic(features, labels)
    logistic = Logistic(bias=round(bias, 5), **{n: round(w, 5) for n, w in zip(names, weights, strict=True)})
    if served.logistic is not None and not is_logprob:
        logistic = Logistic(**served.logistic).then(logistic)
    raw = [
        UNCALIBRATED.confidence(None, f) if one.confidence is None else one.confidence
        for (_, one), f in zip(rows, known, strict=True)
    ]
    fitted = cross_validated(features, labels, questions.tolist())
    judged = {
        name: asdict(figures(column, labels, questions.tolist()))
        | {"intervals": intervals(column, labels, questions.tolist())}
        for name, column in {"as served": np.array(raw), "fitted, cross-validated": fitted}.items()
    }
    alone = {
        name: within_question_auroc(questions.tolist(), features[:, i], labels)
        for i, name in enumerate(names if is_logprob else ())
    }
    threshold = best_threshold(fitted, labels)
    block = {
        "kind": "confidence",
        "source": served.kind,
        "threshold": threshold,
        "logistic": logistic.model_dump(exclude_defaults=True),
        "calibration": {"reference": histogram(fitted[firsts]), "held_out": judged["fitted, cross-validated"]},
    }
    aurocs = {name: found.auroc.value for name, found in alone.items() if found is not None}
    return block, _report(judged, aurocs, threshold, len(firsts))


def _check_contrast(labels: Any, questions: int) -> None:
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


def _report(
    judged: Mapping[str, Mapping[str, Any]], alone: Mapping[str, float], threshold: float, num_questions: int
) -> str:
    """Figures as a table of text."""

    def cell(row: Mapping[str, Any], figure: str) -> str:
        if figure not in row["intervals"]:
            return f"{'–':24}"
        low, high = row["intervals"][figure]
        return f"{f'{row[figure]:.3f} [{low:.3f}, {high:.3f}]':24}"

    first, shown = judged["as served"], ("within_auroc", "ece", "brier")
    lines = [
        f"{first['cycles']} samples of {num_questions} questions, {first['right_share']:.0%} right; "
        f"{first['contrast_questions']} questions with right and wrong samples",
        f"{'':28}{'within-question AUROC':24}{'ECE':24}Brier",
        *(f"{name:28}{''.join(cell(row, f) for f in shown)}" for name, row in judged.items()),
        *(f"  {name:26}{auroc:.3f}" for name, auroc in alone.items()),
        f"threshold {threshold}",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _read(paths: Sequence[Path], split: str | None) -> Served:
    """Samples of files that ``rtap eval`` or ``rtap calibrate`` wrote, without those that have no answer.

    Raises ConfigError for scores of unknown origin: their calibration could not follow that of the server."""
    from rtap_training.evaluation.samples import sample_rows

    shown = ", ".join(map(str, paths))
    samples, sources = list[tuple[str, "CycleRecord"]](), list[tuple[str | None, Mapping[str, float] | None]]()
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


def _sampled(args: argparse.Namespace) -> Served:
    """Sample the questions through a server, and keep the samples."""
    from rtap_training.evaluation.question_files import load_questions

    if not args.questions:
        raise ConfigError("no questions: give --questions FILE, or --from-samples FILE of an earlier run")
    questions = load_questions(args.questions, limit=args.limit, prompt=args.prompt, split=args.split)
    kept = _kept(args.output)
    kept.parent.mkdir(parents=True, exist_ok=True)  # before hours of sampling
    kept.open("a").close()
    asyncio.run(_ask_all(args, questions, kept))
    return _read([kept], None)


def _kept(output: Path) -> Path:
    """File of the samples."""
    return output.with_suffix(".samples.jsonl")


async def _ask_all(args: argparse.Namespace, questions: "Mapping[str, Sequence[Question]]", kept: Path) -> None:
    """Write samples to ``kept`` as they come, one scored cycle for each request."""
    from rtap_training.evaluation.client import Load, judged, open_server
    from rtap_training.evaluation.records import CONFIDENCE, RunSpec
    from rtap_training.evaluation.samples import sample_line

    flags = args.serve_flags
    if not args.confidence_model and not any(flag.split("=")[0] in _CONFIDENCE_FLAGS for flag in flags):
        flags = ["--confidence", LOGPROB, *flags]
    spec = RunSpec(CONFIDENCE, threshold=1.0)
    load = Load(args.concurrency, args.temperature, args.seed, max_cycles=1, max_tokens=args.max_tokens)
    async with open_server(args, flags, log=args.output.with_suffix(".log")) as server:
        source: Mapping[str, Any] = server.config["confidence"]
        if source["kind"] == "none":
            raise ConfigError("the server has no confidence; start it with --confidence or --confidence-model")
        with kept.open("w", encoding="utf-8", buffering=1) as file:
            for task, number in product(questions, range(args.samples)):
                rows = questions[task]

                def keep(outcome: "Outcome", rows: "Sequence[Question]" = rows, number: int = number) -> None:
                    question = rows[outcome.index]
                    found = judged(question, outcome).cycles
                    file.writelines(sample_line(question, number, cycle, source) for cycle in found)

                part = replace(load, seed=load.seed + number)
                outcomes, _ = await server.ask(rows, spec, part, on_outcome=keep)
                errors = [outcome.error for outcome in outcomes if outcome.error is not None]
                if len(errors) == len(outcomes):
                    raise ConfigError(f"every request failed: {errors[0]}")
                progress = f"{number + 1} of {args.samples} samples of each question, {len(errors)} failed"
                sys.stderr.write(f"{task}: {progress}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap calibrate",
        usage="rtap calibrate [MODEL] --questions FILE ... [flags] [-- flags of the server that is started]",
        description="Fit a server's confidence to right and wrong answers of your questions, choose the threshold, and "
        "write the file for --confidence-config. Without flags of the server: --confidence logprob.",
        epilog="Example: rtap calibrate Qwen/Qwen3-0.6B --questions questions.jsonl -- --max-model-len 4096",
        allow_abbrev=False,
    )
    add_shared_flags(parser)
    text = "file to write (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("confidence.json"), help=text)
    text = "samples of each question (default: %(default)s)"
    parser.add_argument("--samples", type=positive, default=8, metavar="N", help=text)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
