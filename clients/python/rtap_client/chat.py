"""`rtap chat`: converse in the terminal and watch the cycles of each answer."""

import argparse
import contextlib
import importlib
import os
import shlex
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Never

import openai
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.live import Live
from rich.text import Text
from typing_extensions import override

from rtap_client.client import RTAP
from rtap_client.commands import (
    EXIT_CODES,
    FAILED,
    UNREACHABLE,
    USAGE,
    CommandParser,
    add_connection_flags,
    add_request_flags,
    connect,
    describe_error,
    print_error,
    printable,
    refusal,
    rtap_options,
    sampling_options,
    server_url,
    usage_error,
)
from rtap_client.server_process import BUNDLED, ServerFailed, started_server
from rtap_client.streams import events
from rtap_client.types import ServerConfig
from rtap_client.view import LiveReply, count, render

HELP = """\
/set --threshold 0.9 --policy vote   set flags of `rtap chat` (see --help) for the next questions
/right, /wrong                       report whether the last answer was correct (calibration)
/think                               show the reasoning of the last answer
/new                                 start a new conversation
/help, /quit                         Ctrl-C stops an answer, Ctrl-D quits"""


class _Flags(CommandParser):
    """Parser that raises ValueError instead of ending the program."""

    @override
    def error(self, message: str) -> Never:
        raise ValueError(self.explained(message))


@dataclass(slots=True)
class Chat:
    """A conversation: current flags, messages so far, and the last reply."""

    client: RTAP
    args: argparse.Namespace
    config: ServerConfig
    console: Console
    messages: list[ChatCompletionMessageParam] = field(default_factory=list[ChatCompletionMessageParam])
    last: LiveReply | None = None

    def ask(self, question: str) -> None:
        """Ask one question and show the reply as it streams. Ctrl-C closes the connection, and the server aborts."""
        if self.args.forget:
            self.messages = []
        if not self.messages and self.args.system:
            self.messages.append({"role": "system", "content": self.args.system})
        self.messages.append({"role": "user", "content": question})
        reply, began = self._new_reply(), time.monotonic()
        try:
            with Live(
                get_renderable=lambda: render(reply, time.monotonic() - began),
                console=self.console,
                refresh_per_second=10,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live:
                try:
                    self._stream(reply)
                except KeyboardInterrupt:
                    reply.stopped = True
                except openai.OpenAIError:
                    reply.failed = True
                    raise
                live.refresh()
        finally:
            self.last = reply
            if reply.answer and reply.done is not None:
                self.messages.append({"role": "assistant", "content": reply.answer})
            else:
                self.messages.pop()  # an unanswered question is not part of the conversation

    def _stream(self, reply: LiveReply) -> None:
        stream = self.client.chat.completions.create(
            model=self.args.model,
            messages=self.messages,
            rtap={**rtap_options(self.args), "drafts": True},
            stream=True,
            stream_options={"include_usage": True},
            **sampling_options(self.args),
        )
        with contextlib.closing(events(stream)) as stream_events:
            for event in stream_events:
                reply.observe(event)

    def _new_reply(self) -> LiveReply:
        defaults, args = self.config.defaults, self.args
        policy = args.policy or defaults.policy
        threshold = defaults.threshold if args.threshold is None else args.threshold
        return LiveReply(policy, threshold if policy == "confidence" else None, args.max_cycles or defaults.max_cycles)

    @property
    def policy(self) -> str:
        """Stop policy and threshold under the current flags."""
        reply = self._new_reply()
        threshold = "" if reply.threshold is None else f", threshold {reply.threshold:.2f}"
        return f"policy {reply.policy}{threshold}"

    def command(self, line: str) -> None:
        """Run a command of HELP, given without its slash."""
        name, _, rest = line.partition(" ")
        match name:
            case "set":
                self._set(rest)
            case "right" | "wrong":
                self._send_feedback(is_correct=name == "right")
            case "think":
                reasoning = self.last.reasoning if self.last else ""
                self.console.print(Text(printable(reasoning).strip() or "no reasoning yet", style="dim italic"))
            case "new":
                self.messages, self.last = [], None
            case "help":
                self.console.print(Text(HELP))
            case _:
                self.console.print(Text(f"unknown command /{name}; /help lists the commands", style="yellow"))

    def _set(self, flags: str) -> None:
        parser = _Flags(add_help=False, argument_default=argparse.SUPPRESS)
        add_request_flags(parser)
        changed = argparse.Namespace(**vars(self.args))
        try:
            parser.parse_args(shlex.split(flags), namespace=changed)
            message = refusal(changed, self.config)
        except ValueError as error:
            message = f"{error}; for example /set --threshold 0.9"
        if message is not None:
            self.console.print(Text(message, style="yellow"))
            return
        self.args = changed
        values = {**rtap_options(self.args), **sampling_options(self.args)}
        settings = ", ".join(f"{name} {value}" for name, value in values.items()) or "all server defaults"
        self.console.print(Text(settings, style="dim"))

    def _send_feedback(self, *, is_correct: bool) -> None:
        if self.last is None or self.last.done is None:
            self.console.print(Text("there is no answer yet; ask a question first", style="yellow"))
            return
        feedback = self.client.feedback(self.last.done.id, correct=is_correct)
        brier = "" if feedback.brier is None else f", Brier score {feedback.brier:.3f}"
        self.console.print(Text(f"noted; {count(feedback.verdicts, 'verdict')} so far{brier}", style="dim"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(
        prog="rtap chat",
        description="Talk to a server and watch its cycles: confidence, threshold, and what changed. With MODEL a "
        "server is started for the time of the chat, unless one serves it at --url.",
        epilog=f"The API key is read from RTAP_API_KEY. {EXIT_CODES}",
    )
    parser.add_argument("serve", nargs="?", metavar="MODEL", help=f"model to serve; {BUNDLED}: the bundled one")
    add_connection_flags(parser)
    add_request_flags(parser)
    parser.add_argument("--forget", action="store_true", help="send each question without the conversation before it")
    args = parser.parse_args(argv)
    message = usage_error(args)
    if message is not None:
        print_error("chat", message)
        return USAGE
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(args))
        try:
            config = client.config()
        except openai.OpenAIError as error:
            failure = describe_error(error, client)
            is_named = args.url or os.environ.get("RTAP_URL")
            if args.serve is None or is_named or failure.exit_code != UNREACHABLE:
                print_error("chat", failure.message)
                return failure.exit_code
            try:
                args.url = stack.enter_context(_server(args.serve, console))
            except ServerFailed as failed:
                print_error("chat", str(failed))
                return FAILED
            client = stack.enter_context(connect(args))
            config = client.config()
        if args.serve not in (None, config.model, *config.models):
            print_error(
                "chat", f"{server_url(client)} serves {config.model}, not {args.serve}; stop it, or leave out MODEL"
            )
            return USAGE
        message = refusal(args, config)
        if message is not None:
            print_error("chat", message)
            return USAGE
        args.model = args.model or config.models[0]
        chat = Chat(client, args, config, console)
        console.print(Text(f"{args.model} at {server_url(client)} · {chat.policy} · /help for commands", style="dim"))
        _read_lines(chat)
    return 0


@contextlib.contextmanager
def _server(model: str, console: Console) -> Generator[str]:
    """Start a server and show the seconds while it loads."""
    with contextlib.ExitStack() as stack:
        with console.status(f"starting a server of {model}") as status:
            url = stack.enter_context(
                started_server(model, lambda seconds: status.update(f"starting a server of {model}, {seconds:.0f} s"))
            )
        yield url


def _read_lines(chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and history in input()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            chat.console.print()
            return
        except KeyboardInterrupt:
            chat.console.print(Text("Ctrl-D or /quit leaves", style="dim"))
            continue
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                chat.command(line[1:])
            elif line:
                chat.ask(line)
        except openai.OpenAIError as error:
            chat.console.print(Text(describe_error(error, chat.client).message, style="red"))
