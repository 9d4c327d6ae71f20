"""Flags, exit codes and error messages shared by `rtap ask` and `rtap chat`."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict, cast, get_args

import openai
from typing_extensions import override

from rtap_client.client import DEFAULT_URL, RTAP
from rtap_client.types import Continuation, Policy, RtapOptions, Select, ServerConfig

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130  # exit codes; 0 is success
EXIT_CODES = (
    "Exit codes: 0 answered, 1 request refused or failed, 2 wrong arguments, 3 server not reached, "
    "130 stopped with Ctrl-C."
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error message that ends in the next step, and the exit code."""

    message: str
    exit_code: int


class Sampling(TypedDict, total=False):
    """Arguments of ``chat.completions.create`` that have a flag of the same name."""

    max_tokens: int
    temperature: float
    seed: int


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors suggest the flag that was meant and name the command to run next."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {self.explained(message)}; `{self.prog} --help` lists the flags\n")

    def explained(self, message: str) -> str:
        """Add the closest flag to the message about an unknown one."""
        found = re.match(r"unrecognized arguments: (-[\w-]+)", message)
        flags = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(found[1], flags, n=1) if found else []
        return f"{message} (did you mean {close[0]}?)" if close else message


def number(kind: Callable[[str], float], low: float, high: float, text: str) -> Callable[[str], float]:
    """Return a parser of numbers from ``low`` to ``high``. text: these bounds in words."""

    def parse(given: str) -> float:
        try:
            value = kind(given)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{given!r} must be {text}")
        return value

    return parse


_COUNT = number(int, 1, math.inf, "a whole number of at least 1")
_SHARE = number(float, 0, 1, "a number from 0 to 1")
_SECONDS = number(float, 1e-9, 1e9, "a number of seconds above 0")
_TEMPERATURE = number(float, 0, 2, "a number from 0 to 2")


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add --url, --timeout and --retries. There is no flag for the key: other users can read command lines."""
    parser.add_argument("--url", metavar="URL", help=f"address of the server [RTAP_URL, else {DEFAULT_URL}]")
    parser.add_argument("--timeout", type=_SECONDS, default=600.0, metavar="SECONDS", help="timeout of a request [600]")
    retries = "retries when the server is not reached, full, or limits this key; honours Retry-After [0]"
    parser.add_argument("--retries", type=int, default=0, metavar="N", help=retries)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the ``rtap`` object and of sampling."""
    parser.add_argument("--model", metavar="NAME", help="model name [the first that the server lists]")
    rtap = parser.add_argument_group("recursion", "Defaults are the server's.")
    rtap.add_argument("--policy", choices=get_args(Policy), help="stop policy")
    rtap.add_argument("--threshold", type=_SHARE, metavar="0..1", help="stop at this confidence")
    rtap.add_argument("--max-cycles", type=_COUNT, metavar="N", help="maximum number of cycles")
    rtap.add_argument("--samples", type=_COUNT, metavar="N", help="number of samples in a vote")
    rtap.add_argument("--select", choices=get_args(Select), help="return the best or the last complete answer")
    rtap.add_argument("--recursion", choices=get_args(Continuation), help="start of further cycles")
    rtap.add_argument("--patience", type=_COUNT, metavar="N", help="stop after N cycles without a higher confidence")
    rtap.add_argument(
        "--deadline", type=_SECONDS, metavar="SECONDS", help="return the best answer so far after this time"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--system", metavar="TEXT", help="system message")
    sampling.add_argument("--max-tokens", type=_COUNT, metavar="N", help="token limit over all cycles")
    sampling.add_argument("--temperature", type=_TEMPERATURE, metavar="T", help="sampling temperature")
    sampling.add_argument("--seed", type=int, metavar="N", help="seed of the whole trajectory")


def rtap_options(args: argparse.Namespace) -> RtapOptions:
    """Return the ``rtap`` object of the flags that were given."""
    names = ("policy", "threshold", "max_cycles", "samples", "select", "recursion", "patience")
    given: dict[str, Any] = {name: getattr(args, name) for name in names} | {"deadline_seconds": args.deadline}
    return cast(RtapOptions, {name: value for name, value in given.items() if value is not None})


def sampling_options(args: argparse.Namespace) -> Sampling:
    """Return the sampling arguments that were given."""
    given = {name: getattr(args, name) for name in Sampling.__annotations__}
    return cast(Sampling, {name: value for name, value in given.items() if value is not None})


def usage_error(args: argparse.Namespace) -> str | None:
    """Check the address and the key, for which the SDK's own errors would be misleading."""
    url, key = args.url or os.environ.get("RTAP_URL"), os.environ.get("RTAP_API_KEY", "")
    if url and not url.startswith(("http://", "https://")):
        return f"the address {url} does not begin with http:// or https://; try --url http://{url.rpartition('://')[2]}"
    if not (key.isascii() and key.isprintable()):
        return "RTAP_API_KEY contains a line break or a character that is not ASCII; copy the key again"
    return None


def refusal(args: argparse.Namespace, config: ServerConfig) -> str | None:
    """Return why this server would refuse the flags, or None."""
    if args.model is not None and args.model not in config.models:
        return f"this server has no model {args.model}; it has {', '.join(config.models)}"
    if args.policy == "confidence" and config.confidence.kind == "none":
        return "--policy confidence needs a confidence generator, and this server has none; use vote, model or single"
    ceilings = config.limits
    for flag, value, limit in (
        ("--max-cycles", args.max_cycles, ceilings.max_cycles),
        ("--samples", args.samples, ceilings.samples),
        ("--deadline", args.deadline, ceilings.deadline_seconds),
    ):
        if value is not None and value > limit:
            return f"{flag} {value:g} is above this server's limit of {limit:g}"
    return None


def connect(args: argparse.Namespace) -> RTAP:
    """Return a client for the parsed flags."""
    return RTAP(args.url, timeout=args.timeout, max_retries=args.retries)


def model_names(client: RTAP) -> list[str]:
    """List the names that the server accepts as ``model``."""
    return [model.id for model in client.models.list().data]


def server_url(client: RTAP) -> str:
    """Return the server's address without ``/v1``."""
    return str(client.base_url).rstrip("/").removesuffix("/v1")


def describe_error(error: openai.OpenAIError, client: RTAP) -> Failure:
    """Turn an SDK error into one sentence and an exit code."""
    url = server_url(client)
    if isinstance(error, openai.APITimeoutError):
        return Failure(
            f"{url} did not answer in time; raise --timeout, or set --deadline to get the best answer so far", FAILED
        )
    if isinstance(error, openai.APIConnectionError):
        return Failure(
            f"no server answers at {url}; start one with `rtap serve`, or name yours with --url or RTAP_URL",
            UNREACHABLE,
        )
    if isinstance(error, openai.APIStatusError):
        return Failure(_describe_status(error, client, url), FAILED)
    return Failure(f"{error}; run `rtap doctor --url {url}` to look for the cause", FAILED)


def _describe_status(error: openai.APIStatusError, client: RTAP, url: str) -> str:
    message = _server_message(error).rstrip(".")
    if isinstance(error, openai.AuthenticationError):
        return f"{url} refused the API key ({message}); set RTAP_API_KEY to a key of this server"
    if isinstance(error, openai.NotFoundError):
        return f"{message}; {_model_hint(client, url)}"
    if isinstance(error, openai.RateLimitError) or error.status_code == 503:
        wait = error.response.headers.get("retry-after")
        return f"{message}; try again {f'in {wait} s' if wait else 'later'}"
    if error.status_code >= 500:
        request_id = error.response.headers.get("x-request-id")
        return f"{url} failed ({error.status_code}: {message}); see its log{f' for {request_id}' if request_id else ''}"
    return f"{message}; change the request (`--help` lists the flags)"


def _model_hint(client: RTAP, url: str) -> str:
    try:
        return f"name one of its models with --model: {', '.join(model_names(client))}"
    except openai.OpenAIError:
        return f"{url} may not be an rtap server: name yours with --url or RTAP_URL"


def _server_message(error: openai.APIStatusError) -> str:
    """Return the ``message`` of the server's error object on one line."""
    body: Any = error.body
    message: Any = cast(dict[str, Any], body).get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.message).split())


def print_error(command: str, message: str) -> None:
    """Print a message to stderr."""
    sys.stderr.write(f"rtap {command}: {message}\n")


def printable(text: str) -> str:
    """Remove control characters, so that model text cannot send escape sequences to the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def is_terminal() -> bool:
    """Return True when stdout is an interactive terminal."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
