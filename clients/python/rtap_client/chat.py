"""`rtap chat`: a conversation in the terminal, with each answer's cycles as they happen (``view.py`` shows them)."""

import argparse
import contextlib
import importlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Never

import openai
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rtap_client.client import RTAP
from rtap_client.connection import (
    EXIT_CODES,
    USAGE,
    add_connection_flags,
    add_request_flags,
    connect,
    explain,
    mistake,
    root,
    rtap_options,
    safe,
    sampling_options,
    say,
)
from rtap_client.streams import events
from rtap_client.types import ServerConfig
from rtap_client.view import Turn, count, render

HELP = """\
/set --threshold 0.9 --policy vote   change flags of `rtap chat` (see --help) for what comes
/right, /wrong                       say whether the last answer was right (calibration)
/think                               all reasoning of the last answer
/new                                 forget the conversation
/help, /quit                         Ctrl-C stops an answer, Ctrl-D leaves"""


class _Flags(argparse.ArgumentParser):
    """A parser whose mistakes do not end the program."""

    def error(self, message: str) -> Never:
        raise ValueError(message)


@dataclass(slots=True)
class Chat:
    """A conversation: flags in force, the messages so far, and the last turn."""

    client: RTAP
    args: argparse.Namespace
    config: ServerConfig
    console: Console
    messages: list[ChatCompletionMessageParam] = field(default_factory=list[ChatCompletionMessageParam])
    last: Turn | None = None

    def ask(self, question: str) -> None:
        """One turn, shown live. Raises what the SDK raises; Ctrl-C closes the connection, which stops the server."""
        if self.args.forget:
            self.messages = []
        if not self.messages and self.args.system:
            self.messages.append({"role": "system", "content": self.args.system})
        self.messages.append({"role": "user", "content": question})
        turn, began = self._turn(), time.monotonic()
        try:
            with Live(
                get_renderable=lambda: render(turn, time.monotonic() - began),
                console=self.console,
                refresh_per_second=10,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live:
                try:
                    self._stream(turn)
                except KeyboardInterrupt:
                    turn.stopped = True
                except openai.OpenAIError:
                    turn.failed = True
                    raise
                live.refresh()
        finally:
            self.last = turn
            if turn.answer and turn.done is not None:
                self.messages.append({"role": "assistant", "content": turn.answer})
            else:
                self.messages.pop()  # a question without an answer is not part of the conversation

    def _stream(self, turn: Turn) -> None:
        stream = self.client.chat.completions.create(
            model=self.args.model,
            messages=self.messages,
            rtap=rtap_options(self.args),
            stream=True,
            stream_options={"include_usage": True},
            **sampling_options(self.args),
        )
        with contextlib.closing(events(stream)) as happening:
            for event in happening:
                turn.observe(event)

    def _turn(self) -> Turn:
        defaults, args = self.config.defaults, self.args
        policy = args.policy or defaults.policy
        threshold = defaults.threshold if args.threshold is None else args.threshold
        return Turn(policy, threshold if policy == "confidence" else None, args.max_cycles or defaults.max_cycles)

    @property
    def how(self) -> str:
        """Who decides when to stop, by the flags in force."""
        turn = self._turn()
        threshold = "" if turn.threshold is None else f", threshold {turn.threshold:.2f}"
        return f"policy {turn.policy}{threshold}"

    def command(self, line: str) -> None:
        """One of HELP's, without its slash."""
        name, _, rest = line.partition(" ")
        match name:
            case "set":
                self._set(rest)
            case "right" | "wrong":
                self._judge(is_right=name == "right")
            case "think":
                reasoning = self.last.reasoning if self.last else ""
                self.console.print(Text(safe(reasoning).strip() or "nothing was thought yet", style="dim italic"))
            case "new":
                self.messages, self.last = [], None
            case "help":
                self.console.print(Text(HELP))
            case _:
                self.console.print(Text(f"no command /{name}; /help lists them", style="yellow"))

    def _set(self, flags: str) -> None:
        parser = _Flags(add_help=False, argument_default=argparse.SUPPRESS)
        add_request_flags(parser)
        try:
            parser.parse_args(shlex.split(flags), namespace=self.args)
        except ValueError as error:
            self.console.print(Text(f"{error}; for example /set --threshold 0.9", style="yellow"))
            return
        shown = {**rtap_options(self.args), **sampling_options(self.args)}
        told = ", ".join(f"{name} {value}" for name, value in shown.items()) or "all by the server's defaults"
        self.console.print(Text(told, style="dim"))

    def _judge(self, *, is_right: bool) -> None:
        if self.last is None or self.last.done is None:
            self.console.print(Text("there is no answer yet to judge; ask something first", style="yellow"))
            return
        known = self.client.feedback(self.last.done.id, correct=is_right)
        brier = "" if known.brier is None else f", Brier score {known.brier:.3f}"
        self.console.print(Text(f"noted; {count(known.verdicts, 'verdict')} so far{brier}", style="dim"))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when the user leaves."""
    parser = argparse.ArgumentParser(
        prog="rtap chat",
        description="Talk to a server and watch it think: cycles, confidence against the threshold, what changed.",
        epilog=f"The key, if the server wants one, is read from RTAP_API_KEY. {EXIT_CODES}",
    )
    add_connection_flags(parser)
    add_request_flags(parser)
    parser.add_argument("--forget", action="store_true", help="ask every question by itself, without those before it")
    args = parser.parse_args(argv)
    wrong = mistake(args)
    if wrong is not None:
        say("chat", wrong)
        return USAGE
    console = Console(highlight=False)
    with connect(args) as client:
        try:
            config = client.config()
        except openai.OpenAIError as error:
            failure = explain(error, client)
            say("chat", failure.sentence)
            return failure.exit_code
        args.model = args.model or config.models[0]
        chat = Chat(client, args, config, console)
        console.print(Text(f"{args.model} at {root(client)} · {chat.how} · /help for commands", style="dim"))
        _talk(chat)
    return 0


def _talk(chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and history in input(), where Python was built with it
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
            chat.console.print(Text(explain(error, chat.client).sentence, style="red"))
