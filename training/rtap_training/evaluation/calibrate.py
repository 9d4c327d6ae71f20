"""``rtap calibrate``: fit a server's confidence to right and wrong answers, and write its ``--confidence-config``.

This module parses arguments and defers heavy imports; ``rtap_training.evaluation.fitting`` does the work.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training.evaluation.arguments import add_flag, add_shared_flags, positive, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rtap calibrate``. Returns 0; 2 for invalid arguments, servers or samples."""
    return run_command(
        _parser(), argv, _calibrate, lambda args: f"fit the samples so far: --from-samples {_kept(args)}"
    )


def _calibrate(args: argparse.Namespace) -> int:
    if args.from_samples and (args.model or args.confidence_model):
        raise ConfigError("--from-samples needs no server; omit MODEL and --confidence-model")
    if not args.from_samples and not args.questions:
        raise ConfigError("no questions: give --questions FILE, or --from-samples FILE of an earlier run")
    if args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a folder; give the name of a file")
    from rtap_training.evaluation.fitting import fit, read, sample
    from rtap_training.evaluation.records import write_atomically

    if not args.from_samples:
        sample(args, _kept(args))
    block, report = fit(read(args.from_samples or [_kept(args)], args.split))
    write_atomically(args.output, json.dumps({"rtap": block, "command": args.command}, indent=2) + "\n")
    sys.stdout.write(f"{report}\nwrote {args.output}; serve it with --confidence-config {args.output}\n")
    return 0


def _kept(args: argparse.Namespace) -> Path:
    """File of the samples."""
    return args.output.with_suffix(".samples.jsonl")


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
    add_flag(parser, "--output", "file to write", type=Path, default="confidence.json")
    add_flag(parser, "--samples", "samples of each question", type=positive, default="8", metavar="N")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
