"""What the commands that talk to a server share: their flags, the model they ask, and sentences for what goes wrong."""

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any, TypedDict, cast, get_args

import openai

from rtap_client.client import DEFAULT_URL, RTAP
from rtap_client.types import Policy, RtapOptions, Select

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130  # exit codes beside 0
EXIT_CODES = "exit codes: 0 answered, 1 refused or failed, 2 wrong arguments, 3 no server, 130 stopped by Ctrl-C"


@dataclass(frozen=True, slots=True)
class Failure:
    """What to tell the user, ending in what to do, and the exit code."""

    sentence: str
    exit_code: int


class Sampling(TypedDict, total=False):
    """Arguments of ``chat.completions.create`` that have a flag of the same name."""

    max_tokens: int
    temperature: float
    seed: int


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Where the server is. A key comes only from the environment: others can read a command line."""
    parser.add_argument("--url", metavar="URL", help=f"the server's address [RTAP_URL, else {DEFAULT_URL}]")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="give up after this long [600]")
    retries = "tries more when the server cannot be reached, is full or limits this key; it waits as it is told [0]"
    parser.add_argument("--retries", type=int, default=0, metavar="N", help=retries)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """What may be asked for; what is left out takes the server's default."""
    parser.add_argument("--model", metavar="NAME", help="[the server's first]")
    rtap = parser.add_argument_group("recursion", "each one the server's default unless given")
    rtap.add_argument("--policy", choices=get_args(Policy), help="who decides to stop")
    rtap.add_argument("--threshold", type=float, metavar="0..1", help="confidence that is good enough")
    rtap.add_argument("--max-cycles", type=int, metavar="N", help="cycles at most")
    rtap.add_argument("--samples", type=int, metavar="N", help="samples of a vote")
    rtap.add_argument("--select", choices=get_args(Select), help="return the best or the last complete answer")
    rtap.add_argument("--patience", type=int, metavar="N", help="stop after N cycles without a new highest confidence")
    rtap.add_argument("--deadline", type=float, metavar="SECONDS", help="answer with the best so far after this long")
    rtap.add_argument("--probe-every", type=int, metavar="TOKENS", help="ask for the answer inside a thought")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--system", metavar="TEXT", help="a system message")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="one budget over all cycles")
    sampling.add_argument("--temperature", type=float, metavar="T")
    sampling.add_argument("--seed", type=int, metavar="N", help="fixes the whole trajectory")


def rtap_options(args: argparse.Namespace) -> RtapOptions:
    """The ``rtap`` object of the flags that were given."""
    names = ("policy", "threshold", "max_cycles", "samples", "select", "patience", "probe_every")
    given: dict[str, Any] = {name: getattr(args, name) for name in names} | {"deadline_seconds": args.deadline}
    return cast(RtapOptions, {name: value for name, value in given.items() if value is not None})


def sampling_options(args: argparse.Namespace) -> Sampling:
    """Those that were given."""
    given = {name: getattr(args, name) for name in Sampling.__annotations__}
    return cast(Sampling, {name: value for name, value in given.items() if value is not None})


def mistake(args: argparse.Namespace) -> str | None:
    """What no request could be made with: an address without its scheme, a key that no header can carry."""
    url, key = args.url or os.environ.get("RTAP_URL"), os.environ.get("RTAP_API_KEY", "")
    if url and not url.startswith(("http://", "https://")):
        return f"the address {url} does not begin with http:// or https://; try --url http://{url.rpartition('://')[2]}"
    if not (key.isascii() and key.isprintable()):
        return "the key in RTAP_API_KEY has a line break or a letter that no key has; copy it again"
    return None


def connect(args: argparse.Namespace) -> RTAP:
    """A client for the parsed flags."""
    return RTAP(args.url, timeout=args.timeout, max_retries=args.retries)


def models(client: RTAP) -> list[str]:
    """Names that the server answers to."""
    return [model.id for model in client.models.list().data]


def root(client: RTAP) -> str:
    """The server's address, as a user gives it."""
    return str(client.base_url).rstrip("/").removesuffix("/v1")


def explain(error: openai.OpenAIError, client: RTAP) -> Failure:
    """One sentence for what the SDK has raised."""
    url = root(client)
    if isinstance(error, openai.APITimeoutError):
        return Failure(f"no answer from {url} in time; raise --timeout, or set --deadline for the best so far", FAILED)
    if isinstance(error, openai.APIConnectionError):
        return Failure(
            f"no server answers at {url}; start one with `rtap serve`, or name yours with --url or RTAP_URL",
            UNREACHABLE,
        )
    if isinstance(error, openai.APIStatusError):
        return Failure(_explain_status(error, client, url), FAILED)
    return Failure(f"{error}; `rtap doctor --url {url}` looks for the cause", FAILED)


def _explain_status(error: openai.APIStatusError, client: RTAP, url: str) -> str:
    told = message_of(error)
    if isinstance(error, openai.AuthenticationError):
        return f"{url} takes another API key ({told}); put yours into the variable RTAP_API_KEY"
    if isinstance(error, openai.NotFoundError):
        return f"{told.rstrip('.')}; {_known_models(client, url)}"
    if isinstance(error, openai.RateLimitError) or error.status_code == 503:
        again = error.response.headers.get("retry-after")
        return f"{told.rstrip('.')}; ask again{f' in {again} s' if again else ' later'}"
    if error.status_code >= 500:
        request_id = error.response.headers.get("x-request-id")
        named = f" for request {request_id}" if request_id else ""
        return f"{url} failed ({error.status_code}: {told}); look into its log{named}"
    return f"{told.rstrip('.')}; change the request (`--help` lists the flags)"


def _known_models(client: RTAP, url: str) -> str:
    try:
        return f"name one of its models with --model: {', '.join(models(client))}"
    except openai.OpenAIError:
        return f"is {url} an rtap server? name yours with --url or RTAP_URL"


def message_of(error: openai.APIStatusError) -> str:
    """The server's own sentence, in one line."""
    body: Any = error.body
    told: Any = cast(dict[str, Any], body).get("message") if isinstance(body, dict) else None
    return " ".join(str(told or error.message).split())


def say(command: str, sentence: str) -> None:
    """A message of the command's own, on stderr."""
    sys.stderr.write(f"rtap {command}: {sentence}\n")


def safe(text: str) -> str:
    """Model text for a terminal: without the control characters that would command it."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def is_terminal() -> bool:
    """Whether stdout is read by a person."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
