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
from rtap_training.evaluation.rules import OWN_SERVER, RULES

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
        error_console.print("rtap eval: interrupted; finished runs are kept, continue with --resume")
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
    from rtap_training.evaluation.evaluation_config import EvaluationConfig, RuleSelection

    rules = args.policies
    own_servers = {rule: url for rule in OWN_SERVER if (url := getattr(args, f"{rule}_server")) is not None}
    if rules is None:  # yesno is for models trained to judge; logprob and yesno need their own server
        rules = [
            r for r in RULES if r not in OWN_SERVER or r in own_servers or (r == "logprob" and args.server is None)
        ]
    if args.model is not None and args.model_flag is not None:
        raise ConfigError(
            f"the model is given as MODEL ({args.model}) and as --model ({args.model_flag}); give it once"
        )
    selection = RuleSelection(
        frozenset(rules),
        tuple(sorted(set(args.thresholds))),
        {rule: tuple(sorted(set(getattr(args, f"{rule}_thresholds")))) for rule in OWN_SERVER},
        tuple(sorted(set(args.samples))),
    )
    return EvaluationConfig(
        rules=selection,
        load=Load(args.concurrency, args.temperature, args.seed, args.max_cycles, args.max_tokens),
        questions=tuple(args.questions or _bundled_questions()),
        limit=args.limit,
        server=args.server,
        own_servers=own_servers,
        model=args.model or args.model_flag,
        confidence_model=args.confidence_model,
        serve_flags=serve_flags,
        api_key=args.api_key,
        timeout_seconds=args.timeout,
        ready_seconds=args.ready_timeout,
        token_budget=args.token_budget,
        output=args.output,
        resume=args.resume,
        command=command,
    )


def _bundled_questions() -> list[Path]:
    """Held-out questions of the tasks that the bundled policy was trained on."""
    folder = BUNDLED_MODELS / "eval"
    files = [folder / "arithmetic.jsonl", folder / "countdown.jsonl"]
    if not all(file.is_file() for file in files):
        raise ConfigError(f"no --questions given and no bundled questions in {folder}; give a JSONL file")
    return files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap eval",
        usage="rtap eval [MODEL] [--questions FILE ...] [flags] [-- flags of the server that is started]",
        description="Measure accuracy, tokens and time of each stopping rule on question files.",
        epilog="Example: rtap eval --policies single,confidence --limit 100 -- --max-model-len 1024",
        allow_abbrev=False,
    )
    where = parser.add_argument_group("server (default: serve the bundled models)")
    where.add_argument("model", nargs="?", metavar="MODEL", help="model to serve during the evaluation")
    where.add_argument("--model", dest="model_flag", metavar="PATH", help="same as MODEL")
    where.add_argument("--server", metavar="URL", help="address of a running rtap server")
    for rule in OWN_SERVER:
        text = f"address of a server started with --confidence {rule}, for the rule {rule}"
        where.add_argument(f"--{rule}-server", metavar="URL", help=text)
    where.add_argument("--confidence-model", metavar="PATH", help="confidence generator of MODEL")
    where.add_argument(
        "--api-key", default=os.environ.get("RTAP_API_KEY"), help="API key of the server (default: RTAP_API_KEY)"
    )
    what = parser.add_argument_group("questions and rules")
    questions = "JSONL files with question and answer (default: the bundled tasks)"
    what.add_argument("--questions", type=Path, nargs="+", metavar="FILE", help=questions)
    what.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions of each task")
    policies = f"stopping rules to measure, from {','.join(RULES)} (default: all but yesno)"
    what.add_argument("--policies", type=_list(_rule), metavar="LIST", help=policies)
    thresholds = "0.2,0.4,0.6,0.8"
    _add(what, "--thresholds", _list(_share), thresholds, "thresholds of the confidence rule", "LIST")
    for rule in OWN_SERVER:
        text = f"thresholds of the {rule} rule (default: quantiles of its scores)"
        what.add_argument(f"--{rule}-thresholds", type=_list(_share), default=[], metavar="LIST", help=text)
    _add(what, "--samples", _list(_positive), "1,2,4,8", "numbers of samples to vote over", "LIST")
    what.add_argument("--max-cycles", type=_positive, metavar="N", help="maximum cycles (default: the server's)")
    what.add_argument("--max-tokens", type=_positive, metavar="N", help="maximum tokens per reply (default: no limit)")
    _add(what, "--temperature", _temperature, "1.0", "sampling temperature", "T")
    _add(what, "--seed", int, "0", "seed; every question derives its own from it", "S")
    how = parser.add_argument_group("load and output")
    _add(how, "--concurrency", _positive, "32", "concurrent requests", "N")
    _add(how, "--timeout", _positive, "600", "timeout of one request", "SECONDS")
    _add(how, "--ready-timeout", _positive, "300", "timeout of a server start", "SECONDS")
    _add(
        how, "--token-budget", _share, "0.35", "share of the vote's tokens that the chosen threshold may spend", "SHARE"
    )
    _add(how, "--output", Path, "rtap-eval", "folder for report.html, results.{json,csv,md} and the plot", "DIR")
    how.add_argument("--resume", action="store_true", help="reuse finished runs with the same settings from DIR/runs")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def _share(text: str) -> float:
    return _number(text, high=1.0)


def _temperature(text: str) -> float:
    return _number(text, high=2.0)


def _number(text: str, *, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to {high:g}")
    return value
