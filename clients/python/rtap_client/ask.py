"""`rtap ask`: ask one question and print the answer. For scripts: only the answer goes to stdout."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam

from rtap_client.client import RTAP
from rtap_client.commands import (
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    USAGE,
    CommandParser,
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
from rtap_client.streams import events
from rtap_client.types import ChatReply, Trajectory


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
            model, messages = args.model or model_names(client)[0], _messages(args.system, question)
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                reply = _watched(client, model, messages, args)
            else:
                reply = client.chat.completions.create(
                    model=model, messages=messages, rtap=rtap_options(args), **sampling_options(args)
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


def _watched(
    client: RTAP, model: str, messages: list[ChatCompletionMessageParam], args: argparse.Namespace
) -> ChatReply:
    """The reply, streamed. The terminal shows on stderr what is being written, until it is complete."""
    from rich.console import Console, Group
    from rich.live import Live

    from rtap_client.view import LiveReply, being_written

    shown = LiveReply(args.policy or "", None, 0)
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        rtap={**rtap_options(args), "drafts": True},
        stream=True,
        stream_options={"include_usage": True},
        **sampling_options(args),
    )
    console = Console(stderr=True, highlight=False)
    with (
        contextlib.closing(events(stream)) as stream_events,
        Live(get_renderable=lambda: Group(*being_written(shown)), console=console, transient=True),
    ):
        for event in stream_events:
            shown.observe(event)
    done = shown.done
    assert done is not None  # the last event
    message = {"role": "assistant", "content": done.text or None}
    choice: Any = {"index": 0, "finish_reason": done.finish_reason, "message": message}
    fields: dict[str, Any] = {"usage": done.usage, "rtap": done.rtap}
    return ChatReply.construct(id=done.id, model=model, choices=[choice], **fields)


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
    parser = CommandParser(
        prog="rtap ask",
        description="Ask a server one question. The answer goes to stdout, everything else to stderr.",
        epilog=f"The API key is read from RTAP_API_KEY. {EXIT_CODES}",
    )
    parser.add_argument("question", nargs="+", help="the question (required), quoted or not; - reads it from stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answer, rtap, usage, id")
    parser.add_argument("--cycles", action="store_true", help="also list the cycles on stderr")
    add_connection_flags(parser)
    add_request_flags(parser)
    return parser


def _print_doubt(rtap: Trajectory | None) -> None:
    if rtap is None or rtap.policy != "confidence" or rtap.confidence is None or rtap.stop_reason == "threshold":
        return
    sys.stderr.write(f"rtap ask: not sure ({rtap.confidence:.2f}, below the threshold)\n")


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
        _print_doubt(reply.rtap)
    if answer:
        return 0
    reason = reply.choices[0].finish_reason
    print_error("ask", f"no answer was completed (finish_reason {reason}); raise --max-tokens or --deadline")
    return FAILED
