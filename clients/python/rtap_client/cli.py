"""`rtap`: dispatch `rtap NAME …` to the entry point NAME of the group `rtap.commands`.

Entry points are functions `main(argv: list[str] | None = None) -> int`. They are imported when they run, so that
`rtap --help` is fast and this package does not depend on server or training.
"""

import difflib
import importlib.util
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import cast

from rtap_client import __version__

GROUP = "rtap.commands"
CHECKOUT = Path(__file__).resolve().parents[3]  # when the package is not installed from a wheel


@dataclass(frozen=True, slots=True)
class Command:
    """Help text and requirement of a command. ``needs``: a module that ``extra`` installs."""

    summary: str
    extra: str = ""
    needs: str = ""


COMMANDS: Mapping[str, Command] = {
    "ask": Command("ask a server one question; for scripts"),
    "chat": Command("talk to a server and watch its cycles"),
    "doctor": Command("check installation, machine, models and server"),
    "models": Command("list the models on this machine: bundled and in the Hub cache"),
    "serve": Command("serve a model with recursive Think–Answer cycles; OpenAI API, on vLLM", "cpu", "vllm"),
    "train": Command("train policies and confidence generators", "train", "sklearn"),
    "calibrate": Command("make a server's confidence a probability on your questions", "train", "sklearn"),
    "eval": Command("measure stop policies: accuracy, tokens, time, calibration", "train", "matplotlib"),
}


def missing_extra(name: str) -> str | None:
    """Return the extra that must be installed before this command can run."""
    command = COMMANDS.get(name)
    if command is None or not command.needs or importlib.util.find_spec(command.needs) is not None:
        return None
    return command.extra


def install(extra: str) -> str:
    """Return the command that installs an extra: `make setup` in a checkout, else pip."""
    if not CHECKOUT.joinpath("scripts", "setup_env.py").is_file():
        return f"pip install 'rtap[{extra}]'" if extra else "pip install rtap"
    folder = "" if Path.cwd() == CHECKOUT else f" -C {shlex.quote(str(CHECKOUT))}"
    is_default = sys.prefix == sys.base_prefix or Path(sys.prefix).resolve() == CHECKOUT.joinpath(".venv").resolve()
    venv = "" if is_default else f" VENV={shlex.quote(sys.prefix)}"
    extras = shlex.quote(" ".join(extra.split(",")))
    return f"make{folder} setup{f' EXTRA={extras}' if extra else ''}{venv}"


def describe(name: str, found: Mapping[str, EntryPoint]) -> str:
    """Return the command's line in the help."""
    summary = COMMANDS[name].summary if name in COMMANDS else f"from {found[name].module}"
    extra = missing_extra(name)
    if name not in found or extra is not None:
        summary += f" (not installed: {install(extra or COMMANDS[name].extra)})"
    return f"  {name:<11}{summary}"


def help_text(found: Mapping[str, EntryPoint]) -> str:
    """Return the output of `rtap --help`."""
    names = [*COMMANDS, *sorted(found.keys() - COMMANDS.keys())]
    return "\n".join(
        [
            "usage: rtap COMMAND [ARGUMENT …]",
            "",
            "Recursive Think–Answer models: the model thinks again until a confidence generator accepts the answer.",
            "",
            "commands:",
            *(describe(name, found) for name in names),
            "",
            "options:",
            "  --help       show this text; `rtap COMMAND --help` shows the flags of a command",
            "  --version    show the installed version",
        ]
    )


def fail(message: str) -> int:
    """Print a usage error and return exit code 2."""
    sys.stderr.write(f"rtap: {message}\n")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `rtap` script. Exit code: the command's, or 2 if no command was run."""
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
        return fail(f"unknown command {name!r}; {hint}")
    extra = missing_extra(name)
    if name not in found or extra is not None:
        return fail(f"{name} is not installed: run {install(extra or COMMANDS[name].extra)}")
    command = cast(Callable[[list[str]], int], found[name].load())
    return command(rest)


if __name__ == "__main__":
    sys.exit(main())
