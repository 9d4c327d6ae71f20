"""The `rtap` command: hands `rtap NAME …` to the function that the installation registers under NAME.

The functions are entry points of the group `rtap.commands` (`def main(argv: list[str] | None = None) -> int`), so that
this package imports neither server nor training, and nothing heavy is imported before it is needed: help and errors
come at once. It parses no flag that belongs to a command.
"""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from rtap_client import __version__

GROUP = "rtap.commands"


@dataclass(frozen=True, slots=True)
class Command:
    """What help says of a command without importing it. ``needs``: a module that only ``extra`` installs; the empty
    extra is the base install."""

    summary: str
    extra: str
    needs: str


COMMANDS: Mapping[str, Command] = {
    "ask": Command("ask a server one question; for scripts", "", "openai"),
    "chat": Command("talk to a server and watch its cycles", "", "openai"),
    "doctor": Command("check installation, machine, models and server; say what to do", "", "sys"),
    "serve": Command("serve a model in Think–Answer cycles, OpenAI-compatible, on vLLM", "cpu", "vllm"),
    "train": Command("train policies and confidence generators, stage by stage", "train", "sklearn"),
    "eval": Command("measure stop policies: accuracy, tokens, time, calibration", "train", "matplotlib"),
}


def missing_extra(name: str) -> str | None:
    """The extra to install before this command can run; None if it can."""
    command = COMMANDS.get(name)
    if command is None or importlib.util.find_spec(command.needs) is not None:
        return None
    return command.extra


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'rtap[{extra}]'" if extra else "pip install rtap"


def describe(name: str, found: Mapping[str, EntryPoint]) -> str:
    """The command's line in the help."""
    summary = COMMANDS[name].summary if name in COMMANDS else f"from {found[name].module}"
    extra = missing_extra(name)
    if name not in found or extra is not None:
        summary += f" (not installed: {install(extra or COMMANDS[name].extra)})"
    return f"  {name:<8}{summary}"


def help_text(found: Mapping[str, EntryPoint]) -> str:
    """All of `rtap --help`."""
    names = [*COMMANDS, *sorted(found.keys() - COMMANDS.keys())]
    return "\n".join(
        [
            "usage: rtap COMMAND [ARGUMENT …]",
            "",
            "Recursive Think–Answer models: think again until a trained confidence generator says the answer is good.",
            "",
            "commands:",
            *(describe(name, found) for name in names),
            "",
            "options:",
            "  --help     this text; `rtap COMMAND --help` for a command's own flags",
            "  --version  the installed version",
        ]
    )


def fail(sentence: str) -> int:
    """A usage error: the sentence on stderr, exit status 2."""
    sys.stderr.write(f"rtap: {sentence}\n")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `rtap` script. Exit status: the command's, or 2 when no command could be run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = {point.name: point for point in entry_points(group=GROUP)}
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        sys.stdout.write(help_text(found) + "\n")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        sys.stdout.write(f"rtap {__version__}\n")
        return 0
    if name not in found and name not in COMMANDS:
        close = difflib.get_close_matches(name, found.keys() | COMMANDS.keys(), n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else "`rtap --help` lists the commands."
        return fail(f"no command {name!r}; {hint}")
    extra = missing_extra(name)
    if name not in found or extra is not None:
        return fail(f"{name} is not installed here: {install(extra or COMMANDS[name].extra)}")
    command = cast(Callable[[list[str]], int], found[name].load())
    return command(rest)


if __name__ == "__main__":
    sys.exit(main())
