"""Command lines of ``rtap eval`` and ``rtap calibrate``: shared flags, their values, exit status. Cheap to import."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rtap_core.errors import ConfigError, closest_match

Value = TypeVar("Value")


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    act: Callable[[argparse.Namespace], int],
    hint: Callable[[argparse.Namespace], str],
) -> int:
    """Parse the command line and return the exit status: that of ``act``, 2 for wrong input, 130 if interrupted.

    ``serve_flags``: what follows ``--``. ``command``: the line, without the key. hint: how to go on when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    args, unknown = parser.parse_known_args(arguments[:at])
    if unknown:
        refuse_unknown(parser, unknown, [flag for action in parser._actions for flag in action.option_strings])  # pyright: ignore[reportPrivateUsage]
    shown = [text.replace(args.api_key, "…") for text in arguments] if args.api_key else arguments
    args.serve_flags, args.command = arguments[at + 1 :], shlex.join([*parser.prog.split(), *shown])
    try:
        _check(args)
        return act(args)
    except ConfigError as error:
        message, status = str(error), 2
    except OSError as error:
        if error.filename is None:
            raise
        message, status = f"cannot write {error.filename}: {error.strerror}", 2
    except KeyboardInterrupt:
        message, status = f"interrupted; {hint(args)}", 130
    sys.stderr.write(f"{parser.prog}: {message}\n")
    return status


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for contradictory sources of answers."""
    if args.server is not None and (args.model or args.confidence_model or args.serve_flags):
        raise ConfigError(
            "--server uses a running server; MODEL, --confidence-model and flags after -- start one; give only one of "
            "them"
        )
    if args.from_samples and (args.server or args.questions or args.serve_flags):
        raise ConfigError(
            "--from-samples needs no server and has its own questions; omit --server, --questions and flags after --"
        )


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str], known: Sequence[str]) -> NoReturn:
    """End the command with the unknown arguments and the flag that was probably meant."""
    hint = closest_match(unknown[0].partition("=")[0], known)
    parser.error(f"unknown arguments: {' '.join(unknown)}{hint}; `{parser.prog} --help` lists the flags")


def add_flag(parser: argparse.ArgumentParser, name: str, text: str, **more: Any) -> None:
    """Add a flag whose help ends with the default as typed."""
    parser.add_argument(name, help=f"{text} (default: %(default)s)" if "default" in more else text, **more)


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for server, questions and load."""
    add, of_file = partial(add_flag, parser), "JSONL files with question and answer, or rg:NAME?option=value"
    add("model", "model to serve (default: the bundled one)", nargs="?", metavar="MODEL")
    add("--confidence-model", "confidence generator of MODEL", metavar="PATH")
    add("--server", "address of a running rtap server, instead of MODEL", metavar="URL")
    add("--api-key", "API key of the server (default: RTAP_API_KEY)")
    add("--questions", f"{of_file} (required without --from-samples)", nargs="+", metavar="SOURCE")
    add("--from-samples", "samples.jsonl of earlier runs, in place of both", type=Path, nargs="+", metavar="FILE")
    add("--prompt", "message with {question} in it (default: the question; for rg: also to box it)", metavar="TEMPLATE")
    add("--limit", "only the first N questions of each task", type=positive, metavar="N")
    add("--split", "only this half of the questions (default: both)", choices=("calibration", "test"))
    add("--max-tokens", "maximum tokens per reply (default: no limit)", type=positive, metavar="N")
    add("--temperature", "as your clients use", type=temperature, default="1.0", metavar="T")
    add("--seed", "every question derives its own from it", type=int, default="0", metavar="S")
    add("--concurrency", "concurrent requests", type=positive, default="32", metavar="N")
    add("--timeout", "timeout of one request", type=positive, default="600", metavar="SECONDS")
    add("--ready-timeout", "timeout of a server start", type=positive, default="300", metavar="SECONDS")
    parser.set_defaults(api_key=os.environ.get("RTAP_API_KEY"), questions=[], from_samples=[])


def list_of(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Parser of a comma-separated list."""

    def parse(text: str) -> list[Value]:
        items = [item.strip() for item in text.split(",")]
        if not all(items):
            raise argparse.ArgumentTypeError(f"{text!r} must be a comma-separated list, like 1,2,4")
        return [kind(item) for item in items]

    return parse


def number(kind: Callable[[str], Value], low: float, high: float, text: str) -> Callable[[str], Value]:
    """Parser of a number from ``low`` to ``high``; text: these bounds in words."""

    def parse(given: str) -> Value:
        try:
            value = kind(given)
        except ValueError:
            value = None
        if not isinstance(value, int | float) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{given!r} must be {text}")
        return value

    return parse


positive = number(int, 1, math.inf, "an integer of at least 1")
share = number(float, 0, 1, "a number from 0 to 1")
temperature = number(float, 0, 2, "a number from 0 to 2")
