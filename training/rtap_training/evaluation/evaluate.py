"""``rtap eval``: measure accuracy and cost of stopping rules against a running server.

This module parses arguments and defers heavy imports; ``rtap_training.evaluation`` does the work.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rtap_core.artifact import BUNDLED_MODELS
from rtap_core.errors import ConfigError
from rtap_core.voting import COUNT_THRESHOLD
from rtap_training.evaluation.arguments import add_flag, add_shared_flags, list_of, positive, run_command, share
from rtap_training.evaluation.rules import RULES


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rtap eval``. Returns 0; 1 if requests failed; 2 for invalid arguments or servers."""
    return run_command(_parser(), argv, _evaluate, lambda _: "answers are kept, continue with --resume")


def _evaluate(args: argparse.Namespace) -> int:
    _check(args)
    if not args.questions and not args.from_samples:
        args.questions = [str(BUNDLED_MODELS / "eval" / f"{task}.jsonl") for task in ("arithmetic", "countdown")]
    from rtap_training.evaluation.report import show, write_results
    from rtap_training.evaluation.runner import run_evaluation

    results = asyncio.run(run_evaluation(args))
    show(results)
    for path in write_results(results, args.output):
        sys.stdout.write(f"wrote {path}\n")
    if results.errors:
        sys.stdout.write(f"{results.errors} requests failed; only `errors` counts them\n")
    return 1 if results.errors else 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for contradictory arguments."""
    if args.confidence_config and not args.from_samples:
        raise ConfigError("--confidence-config needs --from-samples; a server takes it among the flags after --")
    if args.from_samples and (args.policies or args.prompt or args.resume):
        raise ConfigError("--from-samples asks no server; omit --policies, --prompt and --resume")
    if args.from_samples and (args.model is None) != (args.confidence_model is None):
        raise ConfigError(
            "--from-samples needs no MODEL, or with --confidence-model the one that wrote the samples: give both, "
            "to score the samples, or neither"
        )
    if args.confidence_config and args.confidence_model:
        raise ConfigError("kept samples are scored by --confidence-model or --confidence-config; give one of them")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap eval",
        usage="rtap eval [MODEL] [--questions SOURCE ...] [flags] [-- flags of the server that is started]",
        description="Measure accuracy, tokens and time of each stopping rule. Without --questions: of the bundled "
        "tasks. --from-samples replays rules on kept samples; with MODEL and --confidence-model, it scores them first.",
        epilog="Example: rtap eval MODEL --questions rg:gsm_symbolic --limit 100 -- --max-model-len 2048",
        allow_abbrev=False,
    )
    add_shared_flags(parser)
    add, thresholds = partial(add_flag, parser), f"{COUNT_THRESHOLD},0.8,0.9,0.95,0.98"
    text = "file of `rtap calibrate` that computes the confidences of kept samples from their log-probabilities"
    add("--confidence-config", text, type=Path, metavar="FILE")
    text = f"stopping rules to measure, from {','.join(RULES)} (default: all that the server can)"
    add("--policies", text, type=list_of(_rule), metavar="LIST")
    text = "thresholds of the confidence rule"
    add("--thresholds", text, type=list_of(share), default="0.2,0.4,0.6,0.8", metavar="LIST")
    text = "thresholds of the adaptive vote; the server is asked with the first"
    add("--vote-thresholds", text, type=list_of(share), default=thresholds, metavar="LIST")
    add("--samples", "numbers of samples to vote over", type=list_of(positive), default="1,2,4,8,16", metavar="LIST")
    add("--max-cycles", "maximum cycles (default: the server's)", type=positive, metavar="N")
    add("--recursion", "how further cycles start (default: the server's)", choices=("continue", "fresh"))
    text = "parts into which questions are split; rules alternate part by part, for ratios of seconds with an interval"
    add("--rounds", text, type=positive, default="1", metavar="N")
    text = "share of the majority's tokens that the chosen threshold may spend"
    add("--token-budget", text, type=share, default="0.35", metavar="SHARE")
    text = "folder for report.html, results.{json,csv,md}, samples.jsonl and the plot"
    add("--output", text, type=Path, default="rtap-eval", metavar="DIR")
    add("--resume", "reuse answers under the same settings from DIR/runs", action="store_true")
    return parser


def _rule(text: str) -> str:
    if text not in RULES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a policy; choose from {', '.join(RULES)}")
    return text
