"""`rtap ask`: ask one question and print the answer. For scripts: only the answer goes to stdout."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam

from rtap_client.commands import (
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    USAGE,
    add_connection_flags,
    add_request_flags,
    connect,
    describe_error,
    is_terminal,
    model_names,
    print_error,
    printable,
    rtap_options,
    sampling_options,
    usage_error,
)
from rtap_client.types import ChatReply


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    message = usage_error(args)
    if message is not None:
        print_error("ask", message)
        return USAGE
    question = sys.stdin.read() if args.question == ["-"] else " ".join(args.question)
    if not question.strip():
        print_error("ask", "the question is empty; give one, or - to read it from stdin")
        return USAGE
    with connect(args) as client:
        try:
            reply = client.chat.completions.create(
                model=args.model or model_names(client)[0],
                messages=_messages(args.system, question),
                rtap=rtap_options(args),
                **sampling_options(args),
            )
        except openai.OpenAIError as error:
            failure = describe_error(error, client)
            print_error("ask", failure.message)
            return failure.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED
    return _print(reply, as_json=args.json, with_cycles=args.cycles)


def _messages(system: str | None, question: str) -> list[ChatCompletionMessageParam]:
    opening: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}]


def _json_object(reply: ChatReply) -> dict[str, Any]:
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
        description="Ask a server one question. The answer goes to stdout, everything else to stderr.",
        epilog=f"The API key is read from RTAP_API_KEY. {EXIT_CODES}",
    )
    parser.add_argument("question", nargs="+", help="the question, quoted or not; - reads it from stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answer, rtap, usage, id")
    parser.add_argument("--cycles", action="store_true", help="also list the cycles on stderr")
    add_connection_flags(parser)
    add_request_flags(parser)
    return parser


def _print(reply: ChatReply, *, as_json: bool, with_cycles: bool) -> int:
    if with_cycles and reply.rtap is not None:
        for cycle in reply.rtap.cycles:
            confidence = "  –  " if cycle.confidence is None else f"{cycle.confidence:.3f}"
            mark = "✓" if cycle.accepted else "✗"
            sys.stderr.write(f"{cycle.index + 1} {mark} {confidence} {printable(cycle.answer or '(cut)')}\n")
    answer = reply.choices[0].message.content
    if as_json:
        sys.stdout.write(json.dumps(_json_object(reply), ensure_ascii=False) + "\n")
    elif answer:
        sys.stdout.write((printable(answer) if is_terminal() else answer) + "\n")
    if answer:
        return 0
    reason = reply.choices[0].finish_reason
    print_error("ask", f"no cycle completed an answer (finish_reason {reason}); raise --max-tokens or --deadline")
    return FAILED
