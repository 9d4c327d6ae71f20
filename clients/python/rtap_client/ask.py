"""`rtap ask`: one question, its answer on stdout. For scripts: nothing else is printed there, and exit codes tell."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam

from rtap_client.connection import (
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    USAGE,
    add_connection_flags,
    add_request_flags,
    connect,
    explain,
    is_terminal,
    mistake,
    models,
    rtap_options,
    safe,
    sampling_options,
    say,
)
from rtap_client.types import ChatReply


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(argv)
    wrong = mistake(args)
    if wrong is not None:
        say("ask", wrong)
        return USAGE
    question = sys.stdin.read() if args.question == ["-"] else " ".join(args.question)
    if not question.strip():
        say("ask", "the question is empty; give one, or - to read it from stdin")
        return USAGE
    client = connect(args)
    try:
        reply = client.chat.completions.create(
            model=args.model or models(client)[0],
            messages=conversation(args.system, question),
            rtap=rtap_options(args),
            **sampling_options(args),
        )
    except openai.OpenAIError as error:
        failure = explain(error, client)
        say("ask", failure.sentence)
        return failure.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        client.close()
    return _print(reply, as_json=args.json, with_cycles=args.cycles)


def conversation(system: str | None, question: str) -> list[ChatCompletionMessageParam]:
    """The messages of one question."""
    opening: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}]


def summary(reply: ChatReply) -> dict[str, Any]:
    """What `--json` prints: the answer and how it came about, without the frame of the API."""
    choice = reply.choices[0]
    return {
        "answer": choice.message.content,
        "finish_reason": choice.finish_reason,
        "id": reply.id,
        "model": reply.model,
        "usage": None if reply.usage is None else reply.usage.to_dict(),
        "rtap": None if reply.rtap is None else reply.rtap.to_dict(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap ask",
        description="Ask a server one question; the answer goes to stdout, everything else to stderr.",
        epilog=f"The key, if the server wants one, is read from RTAP_API_KEY. {EXIT_CODES}",
    )
    parser.add_argument("question", nargs="+", help="the question, in quotes or not; - reads it from stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answer, rtap, usage, id")
    parser.add_argument("--cycles", action="store_true", help="also list the cycles, on stderr")
    add_connection_flags(parser)
    add_request_flags(parser)
    return parser


def _print(reply: ChatReply, *, as_json: bool, with_cycles: bool) -> int:
    if with_cycles and reply.rtap is not None:
        for cycle in reply.rtap.cycles:
            sure = "  –  " if cycle.confidence is None else f"{cycle.confidence:.3f}"
            mark = "✓" if cycle.accepted else "✗"
            sys.stderr.write(f"{cycle.index + 1} {mark} {sure} {safe(cycle.answer or '(cut)')}\n")
    answer = reply.choices[0].message.content
    if as_json:
        sys.stdout.write(json.dumps(summary(reply), ensure_ascii=False) + "\n")
    elif answer:
        sys.stdout.write((safe(answer) if is_terminal() else answer) + "\n")
    if answer:
        return 0
    reason = reply.choices[0].finish_reason
    say("ask", f"no answer was completed (finish_reason {reason}); raise --max-tokens or --deadline")
    return FAILED
