"""``rtap eval``: measure accuracy and cost of stopping rules against a running server.

This module parses arguments and defers heavy imports; ``rtap_training.evaluation`` does the work.
"""

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from rtap_core.artifact import BUNDLED_MODELS
from rtap_core.errors import ConfigError
from rtap_core.voting import COUNT_THRESHOLD
from rtap_training.evaluation.rules import RULES

if TYPE_CHECKING:
    from rtap_training.evaluation.evaluation_config import EvaluationConfig

Value = TypeVar("Value")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rtap eval``. Returns 0; 1 if requests failed; 2 for invalid arguments or servers."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parser().parse_args(arguments[:at])
    console, error_console = Console(), Console(stderr=True)
    shown = [text.replace(args.api_key, "…") for text in arguments] if args.api_key else arguments
    command = shlex.join(["rtap", "eval", *shown])
    try:
        return _evaluate(_settings(args, serve_flags=tuple(arguments[at + 1 :]), command=command), console)
    except ConfigError as error:
        error_console.print(f"rtap eval: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        error_console.print("rtap eval: interrupted; answers are kept, continue with --resume")
        return 130


def _evaluate(config: "EvaluationConfig", console: Console) -> int:
    from rtap_training.evaluation.report import show, write_results
    from rtap_training.evaluation.runner import run_evaluation

    results = asyncio.run(run_evaluation(config, console))
    show(results, console)
    for path in write_results(results, config.output):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if results.errors:
        console.print(f"{results.errors} requests failed; only `errors` counts them", style="bold red")
    return 1 if results.errors else 0


def _settings(args: argparse.Namespace, *, serve_flags: tuple[str, ...], command: str) -> "EvaluationConfig":
    from rtap_training.evaluation.client import Load
    from rtap_training.evaluation.evaluation_config import EvaluationConfig
    from rtap_training.evaluation.results import RuleParameters

    if args.model is not None and args.model_flag is not None:
        raise ConfigError(
            f"the model is given as MODEL ({args.model}) and as --model ({args.model_flag}); give it once"
        )
    live, curve = args.vote_thresholds[0], args.vote_thresholds[1:]
    parameters = RuleParameters(
        samples=tuple(sorted(set(args.samples))),
        vote_thresholds=tuple(dict.fromkeys([live, *curve])),
        thresholds=tuple(sorted(set(args.thresholds))),
        budget=args.token_budget,
    )
    kept = tuple(args.from_samples or ())
    if kept and (args.policies or args.prompt or args.resume):
        raise ConfigError("--from-samples asks no server; omit --policies, --prompt and --resume")
    return EvaluationConfig(
        rules=None if args.policies is None else frozenset(args.policies),
        parameters=parameters,
        load=Load(
            args.concurrency,
            args.temperature,
            args.seed,
            args.max_cycles,
            args.max_tokens,
            recursion=args.recursion,
        ),
        sources=tuple(args.questions or (() if kept else _bundled_questions())),
        prompt=args.prompt,
        limit=args.limit,
        split=args.split,
        kept=kept,
        confidence_config=args.confidence_config,
        server=args.server,
        model=args.model or args.model_flag,
        confidence_model=args.confidence_model,
        serve_flags=serve_flags,
        api_key=args.api_key,
        timeout_seconds=args.timeout,
        ready_seconds=args.ready_timeout,
        rounds=args.rounds,
        output=args.output,
        resume=args.resume,
        command=command,
    )


def _bundled_questions() -> list[str]:
    """Held-out questions of the tasks that the bundled policy was trained on."""
    folder = BUNDLED_MODELS / "eval"
    files = [folder / "arithmetic.jsonl", folder / "countdown.jsonl"]
    if not all(file.is_file() for file in files):
        raise ConfigError(f"no --questions given and no bundled questions in {folder}; give a JSONL file or rg:NAME")
    return [str(file) for file in files]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap eval",
        usage="rtap eval [MODEL] [--questions SOURCE ...] [flags] [-- flags of the server that is started]",
        description="Measure accuracy, tokens and time of each stopping rule.",
        epilog="Example: rtap eval MODEL --questions rg:gsm_symbolic --limit 100 -- --max-model-len 2048",
        allow_abbrev=False,
    )
    where = parser.add_argument_group("server (default: serve the bundled models)")
    where.add_argument("model", nargs="?", metavar="MODEL", help="model to serve during the evaluation")
    where.add_argument("--model", dest="model_flag", metavar="PATH", help="same as MODEL")
    where.add_argument("--server", metavar="URL", help="address of a running rtap server")
    where.add_argument("--confidence-model", metavar="PATH", help="confidence generator of MODEL")
    where.add_argument(
        "--api-key", default=os.environ.get("RTAP_API_KEY"), help="API key of the server (default: RTAP_API_KEY)"
    )
    what = parser.add_argument_group("questions and rules")
    text = "JSONL files with question and answer, or rg:NAME?option=value (default: the bundled tasks)"
    what.add_argument("--questions", nargs="+", metavar="SOURCE", help=text)
    text = (
        "samples.jsonl of earlier evaluations: replay rules on them, without a server; with MODEL and "
        "--confidence-model, score them again first"
    )
    what.add_argument("--from-samples", type=Path, nargs="+", metavar="FILE", help=text)
    text = "file of `rtap calibrate` that computes the confidences of kept samples from their log-probabilities"
    what.add_argument("--confidence-config", type=Path, metavar="FILE", help=text)
    text = "message with {question} in it (default: the question; for rg: also to answer in \\boxed{})"
    what.add_argument("--prompt", metavar="TEMPLATE", help=text)
    what.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    text = "only this half of the questions (default: both)"
    what.add_argument("--split", choices=("calibration", "test"), help=text)
    policies = f"stopping rules to measure, from {','.join(RULES)} (default: all that the server can)"
    what.add_argument("--policies", type=_list(_rule), metavar="LIST", help=policies)
    _add(what, "--thresholds", _list(_share), "0.2,0.4,0.6,0.8", "thresholds of the confidence rule", "LIST")
    thresholds = f"{COUNT_THRESHOLD},0.8,0.9,0.95,0.98"
    text = "thresholds of the adaptive vote; the server is asked with the first"
    _add(what, "--vote-thresholds", _list(_share), thresholds, text, "LIST")
    _add(what, "--samples", _list(positive), "1,2,4,8,16", "numbers of samples to vote over", "LIST")
    what.add_argument("--max-cycles", type=positive, metavar="N", help="maximum cycles (default: the server's)")
    text = "how further cycles start (default: the server's)"
    what.add_argument("--recursion", choices=("continue", "fresh"), help=text)
    what.add_argument("--max-tokens", type=positive, metavar="N", help="maximum tokens per reply (default: no limit)")
    _add(what, "--temperature", temperature, "1.0", "sampling temperature", "T")
    _add(what, "--seed", int, "0", "seed; every question derives its own from it", "S")
    how = parser.add_argument_group("load and output")
    _add(how, "--concurrency", positive, "32", "concurrent requests", "N")
    text = "parts into which questions are split; rules alternate part by part, for ratios of seconds with an interval"
    _add(how, "--rounds", positive, "1", text, "N")
    _add(how, "--timeout", positive, "600", "timeout of one request", "SECONDS")
    _add(how, "--ready-timeout", positive, "300", "timeout of a server start", "SECONDS")
    _add(
        how,
        "--token-budget",
        _share,
        "0.35",
        "share of the majority's tokens that the chosen threshold may spend",
        "SHARE",
    )
    _add(
        how,
        "--output",
        Path,
        "rtap-eval",
        "folder for report.html, results.{json,csv,md}, samples.jsonl and the plot",
        "DIR",
    )
    how.add_argument("--resume", action="store_true", help="reuse answers under the same settings from DIR/runs")
    return parser


def _add(
    group: "argparse._ArgumentGroup",  # pyright: ignore[reportPrivateUsage]  # argparse names no public type for it
    flag: str,
    kind: Callable[[str], object],
    default: str,
    meaning: str,
    metavar: str,
) -> None:
    """Add a flag whose help shows the default as typed."""
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{meaning} (default: {default})")


def _list(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Parser of a comma-separated list."""

    def parse(text: str) -> list[Value]:
        items = [item.strip() for item in text.split(",")]
        if not all(items):
            raise argparse.ArgumentTypeError(f"{text!r} must be a comma-separated list, like 1,2,4")
        return [kind(item) for item in items]

    return parse


def _rule(text: str) -> str:
    if text not in RULES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a policy; choose from {', '.join(RULES)}")
    return text


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def _share(text: str) -> float:
    return _number(text, high=1.0)


def temperature(text: str) -> float:
    """Parse a sampling temperature."""
    return _number(text, high=2.0)


def _number(text: str, *, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to {high:g}")
    return value
