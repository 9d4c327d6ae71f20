"""``rtap calibrate``: fit a server's confidence to right and wrong answers, and write its ``--confidence-config``.

Questions are sampled through the server, or samples of an earlier run are read. For ``confidence=logprob`` a logistic
regression on the log-probability features is fitted, for other kinds a Platt calibration of the score.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtap_core.errors import ConfigError

if TYPE_CHECKING:
    from rtap_training.evaluation.question_files import Question
    from rtap_training.evaluation.records import Outcome
    from rtap_training.evaluation.statistics import WithinQuestion

LOGPROB = "logprob"
_CONFIDENCE_FLAGS = ("--confidence", "--confidence-model")
MIN_QUESTIONS = 5
FIGURES = ("within_auroc", "ece", "brier")


@dataclass(frozen=True, slots=True)
class Sample:
    """One judged answer. confidence: as served. logprobs: features as the server shows them."""

    question: str
    is_right: bool
    confidence: float | None
    logprobs: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Served:
    """Where samples come from. kind: of confidence; None if unknown. logistic: calibration that the server applied."""

    kind: str | None
    samples: Sequence[Sample]
    logistic: Mapping[str, float] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rtap calibrate``. Returns 0; 2 for invalid arguments, servers or samples."""
    from rtap_training.evaluation.records import write_atomically

    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parser().parse_args(arguments[:at])
    shown = [text.replace(args.api_key, "…") for text in arguments] if args.api_key else arguments
    serve_flags = arguments[at + 1 :]
    try:
        _check_arguments(args, serve_flags)
        served = _read(args.from_samples, args.split) if args.from_samples else _sampled(args, serve_flags)
        block, report = fit(served)
        content = {"rtap": block, "command": shlex.join(["rtap", "calibrate", *shown])}
        with _written(args.output):
            write_atomically(args.output, json.dumps(content, indent=2) + "\n")
    except ConfigError as error:
        sys.stderr.write(f"rtap calibrate: {error}\n")
        return 2
    except KeyboardInterrupt:
        kept = _kept(args.output)
        sys.stderr.write(f"rtap calibrate: interrupted; fit the samples so far with --from-samples {kept}\n")
        return 130
    sys.stdout.write(f"{report}\nwrote {args.output}; serve it with --confidence-config {args.output}\n")
    return 0


def fit(served: Served) -> tuple[dict[str, Any], str]:
    """(``rtap`` block of the file, report). Raises ConfigError for samples from which nothing can be learned."""
    import numpy as np

    from rtap_core.artifact import LOGPROB_WEIGHTS, UNCALIBRATED, Logistic
    from rtap_core.features import LogprobFeatures
    from rtap_training.calibration import (
        best_threshold,
        cross_validated,
        figures,
        fit_logistic,
        histogram,
        intervals,
    )
    from rtap_training.evaluation.statistics import within_question_auroc

    is_logprob = served.kind == LOGPROB
    names = LOGPROB_WEIGHTS if is_logprob else ("generator",)
    rows = [one for one in served.samples if (one.logprobs if is_logprob else one.confidence) is not None]
    if not rows:
        what = "log-probability features" if is_logprob else "a confidence"
        raise ConfigError(f"none of the {len(served.samples)} samples has {what}; sample a server with --confidence")
    try:
        known = [None if one.logprobs is None else LogprobFeatures.from_shown(one.logprobs) for one in rows]
        inputs = [
            Logistic.inputs(None if is_logprob else one.confidence, f) for one, f in zip(rows, known, strict=True)
        ]
        features = np.array([[row[name] for name in names] for row in inputs])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the samples hold wrong features ({type(error).__name__}: {error})") from error
    labels = np.array([one.is_right for one in rows], dtype=np.bool_)
    numbers: dict[str, int] = {}
    questions = [numbers.setdefault(one.question, len(numbers)) for one in rows]
    _, firsts = np.unique(questions, return_index=True)
    _check_contrast(labels, questions)
    scores = cross_validated(features, labels, questions)
    bias, *weights = fit_logistic(features, labels)
    logistic = Logistic(bias=round(bias, 5), **{n: round(w, 5) for n, w in zip(names, weights, strict=True)})
    if served.logistic is not None and not is_logprob:
        logistic = Logistic(**served.logistic).then(logistic)
    raw = [
        one.confidence if one.confidence is not None else UNCALIBRATED.confidence(None, f)
        for one, f in zip(rows, known, strict=True)
    ]
    threshold = best_threshold(scores, labels)
    columns = {"as served": np.array(raw)} | {"fitted, cross-validated": scores}
    judged = {name: asdict(figures(column, labels, questions)) for name, column in columns.items()}
    ranges = {name: intervals(column, labels, questions) for name, column in columns.items()}
    alone = {name: within_question_auroc(questions, features[:, i], labels) for i, name in enumerate(names)}
    held_out = judged["fitted, cross-validated"] | {"intervals": ranges["fitted, cross-validated"]}
    block = {
        "kind": "confidence",
        "source": served.kind,
        "threshold": threshold,
        "logistic": logistic.model_dump(exclude_defaults=True),
        "calibration": {"reference": histogram(scores[firsts]), "held_out": held_out},
    }
    return block, _report(judged, ranges, alone if is_logprob else {}, threshold, len(numbers))


def _check_contrast(labels: Any, questions: Sequence[int]) -> None:
    right, wrong = int(labels.sum()), int((~labels).sum())
    if right == 0 or wrong == 0:
        raise ConfigError(
            f"all {len(labels)} samples are {'wrong' if right == 0 else 'right'}, so nothing separates them; give "
            f"{'easier' if right == 0 else 'harder'} questions"
        )
    if len(set(questions)) < 2 * MIN_QUESTIONS or min(right, wrong) < MIN_QUESTIONS:
        raise ConfigError(
            f"{right} right and {wrong} wrong samples of {len(set(questions))} questions are too few; give at least "
            f"{2 * MIN_QUESTIONS} questions and {MIN_QUESTIONS} samples of each kind (100 questions are a good start)"
        )


def _report(
    judged: Mapping[str, Mapping[str, Any]],
    ranges: Mapping[str, Mapping[str, Sequence[float]]],
    alone: "Mapping[str, WithinQuestion | None]",
    threshold: float,
    num_questions: int,
) -> str:
    """Figures as a table of text."""

    def cell(name: str, figure: str) -> str:
        value, ends = judged[name][figure], ranges[name].get(figure)
        return "–" if value is None or ends is None else f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"

    first = next(iter(judged.values()))
    lines = [
        f"{first['cycles']} samples of {num_questions} questions, {first['right_share']:.0%} right; "
        f"{first['contrast_questions']} questions with right and wrong samples",
        f"{'':28}{'within-question AUROC':24}{'ECE':24}Brier",
    ]
    lines += [f"{name:28}{''.join(f'{cell(name, f):24}' for f in FIGURES).rstrip()}" for name in judged]
    lines += [f"  {name:26}{one.auroc.value:.3f}" for name, one in alone.items() if one is not None]
    return "\n".join([*lines, f"threshold {threshold}"])


def _read(path: Path, split: str | None) -> Served:
    """Samples of a file that ``rtap eval`` or ``rtap calibrate`` wrote, without those that have no answer.

    Raises ConfigError for scores of unknown origin: their calibration could not follow that of the server."""
    from rtap_training.evaluation.samples import sample_rows

    samples, sources = list[Sample](), list[tuple[str | None, Mapping[str, float] | None]]()
    for question, cycle, row in sample_rows([path]):
        if cycle.answer is None or split not in (None, question.split):
            continue
        kind = row.get("kind") or (None if cycle.logprobs is None else LOGPROB)
        if kind is None and cycle.confidence is not None:
            raise ConfigError(
                f"{path} has confidences without kind and logistic, the server's calibration that they include; sample "
                "again with `rtap calibrate MODEL`"
            )
        source = (kind, row.get("logistic"))
        samples.append(Sample(question.text, cycle.is_correct, cycle.confidence, cycle.logprobs))
        if kind is not None and source not in sources:
            sources.append(source)
    if not samples:
        raise ConfigError(f"{path} has no samples with an answer; sample again with a larger --max-tokens")
    if len(sources) > 1:
        raise ConfigError(f"{path} has samples of {len(sources)} different confidences; give those of one server")
    samples.sort(key=lambda one: one.question)  # concurrent samples are kept as they come
    kind, logistic = sources[0] if sources else (None, None)
    return Served(kind, samples, logistic)


def _sampled(args: argparse.Namespace, serve_flags: Sequence[str]) -> Served:
    """Sample the questions through a server, and keep the samples."""
    from rtap_training.evaluation.question_files import load_questions

    if not args.questions:
        raise ConfigError("no questions: give --questions FILE, or --from-samples FILE of an earlier run")
    questions = load_questions(args.questions, limit=args.limit, prompt=args.prompt, split=args.split)
    kept = _kept(args.output)
    with _written(kept):  # before hours of sampling
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.open("a").close()
    with _address(args, serve_flags) as url:
        asyncio.run(_ask_all(args, url, questions, kept))
    return _read(kept, None)


def _kept(output: Path) -> Path:
    """File of the samples."""
    return output.with_suffix(".samples.jsonl")


def _check_arguments(args: argparse.Namespace, serve_flags: Sequence[str]) -> None:
    """Raise ConfigError for contradictory arguments."""
    if args.from_samples and (args.model or args.server or args.questions or serve_flags):
        raise ConfigError(
            "--from-samples needs no server and has its own questions; omit MODEL, --server, --questions and flags "
            "after --"
        )
    if args.server and (args.model or serve_flags):
        raise ConfigError("--server uses a running server, MODEL and flags after -- start one; give only one of them")
    if args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a folder; give the name of a file")


@contextmanager
def _address(args: argparse.Namespace, serve_flags: Sequence[str]) -> Generator[str]:
    """Address of the server; one is started unless an address is given."""
    from rtap_training.evaluation.server_process import running_server, serve_command

    if args.server is not None:
        yield args.server
        return
    flags = list(serve_flags)
    if not any(flag.split("=")[0] in _CONFIDENCE_FLAGS for flag in flags):
        flags = ["--confidence", LOGPROB, *flags]
    command, log = serve_command(args.model, None, flags), args.output.with_suffix(".log")
    sys.stderr.write(f"starting the server (its log: {log})\n")
    with running_server(command, log=log, ready_seconds=args.ready_timeout) as url:
        yield url


async def _ask_all(
    args: argparse.Namespace, url: str, questions: "Mapping[str, Sequence[Question]]", kept: Path
) -> None:
    """Append samples to ``kept`` as they come, one scored cycle for each request."""
    from rtap_training.evaluation.client import Load, RtapServer
    from rtap_training.evaluation.records import RunSpec
    from rtap_training.evaluation.rules import CONFIDENCE
    from rtap_training.evaluation.samples import sample_line

    server = RtapServer(url, api_key=args.api_key, timeout_seconds=args.timeout, concurrency=args.concurrency)
    await server.connect()
    source: Mapping[str, Any] = server.config["confidence"]
    if source["kind"] == "none":
        raise ConfigError(f"the server at {url} has no confidence; start it with --confidence or --confidence-model")
    spec = RunSpec(CONFIDENCE, threshold=1.0)
    load = Load(args.concurrency, args.temperature, args.seed, max_cycles=1, max_tokens=args.max_tokens)
    with _written(kept), kept.open("w", encoding="utf-8", buffering=1) as file:
        for task, number in product(questions, range(args.samples)):
            rows = questions[task]

            def keep(outcome: "Outcome", rows: "Sequence[Question]" = rows, number: int = number) -> None:
                file.writelines(sample_line(rows[outcome.index], number, cycle, source) for cycle in outcome.cycles)

            part = replace(load, seed=load.seed + number)
            run = await server.run(task, rows, spec, part, on_outcome=keep)
            if not run.answered:
                raise ConfigError(f"every request failed: {run.outcomes[0].error}")
            failed = len(run.outcomes) - len(run.answered)
            sys.stderr.write(f"{task}: {number + 1} of {args.samples} samples of each question, {failed} failed\n")


@contextmanager
def _written(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    from rtap_training.evaluate import positive, temperature
    from rtap_training.evaluation.question_files import SPLITS

    parser = argparse.ArgumentParser(
        prog="rtap calibrate",
        usage="rtap calibrate [MODEL] --questions FILE ... [flags] [-- flags of the server that is started]",
        description="Fit a server's confidence to right and wrong answers of your questions, choose the threshold, and "
        "write the file for --confidence-config. Without flags of the server: --confidence logprob.",
        epilog="Example: rtap calibrate Qwen/Qwen3-0.6B --questions questions.jsonl -- --max-model-len 4096",
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model to serve (default: the bundled one)")
    parser.add_argument(
        "--questions", nargs="+", metavar="FILE", help="JSONL files of question and answer, or rg:NAME of reasoning-gym"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="prompt with {question} in it (default: as `rtap eval`)")
    parser.add_argument("--split", choices=SPLITS, help="only this half of the questions (default: all)")
    parser.add_argument("--server", metavar="URL", help="address of a running rtap server, instead of MODEL")
    parser.add_argument("--from-samples", type=Path, metavar="FILE", help="samples of an earlier run, instead of both")
    parser.add_argument("--output", type=Path, default=Path("confidence.json"), help="file (default: %(default)s)")
    parser.add_argument("--samples", type=positive, default=8, metavar="N", help="of each question (default: 8)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of a sample (default: the server's)")
    parser.add_argument(
        "--temperature", type=temperature, default=1.0, metavar="T", help="as your clients use (default: 1.0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples (default: 0)")
    parser.add_argument("--concurrency", type=positive, default=32, metavar="N", help="requests at once (default: 32)")
    parser.add_argument("--timeout", type=positive, default=600, metavar="SECONDS", help="of a request (default: 600)")
    parser.add_argument(
        "--ready-timeout", type=positive, default=300, metavar="SECONDS", help="of the server's start (default: 300)"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("RTAP_API_KEY"), help="API key of the server (default: RTAP_API_KEY)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
