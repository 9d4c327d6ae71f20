"""Write deploy/requirements-cpu.lock: one wheel and its hash for each package of serving and tests.

pip resolves (`--dry-run --report`) on a machine that the lock is for; nothing is installed. Versions of the old lock
stay where pyproject.toml allows them; --upgrade takes the newest.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setup_env import FOR_TESTS, LOCK, ROOT, lock_applies, locked_pins, read_pyproject, torch_pin
from setup_pip import COMPANIONS, listed, torch_source

HEAD = """\
# What `make serve` and `make test` install on Linux, x86_64, with Python 3.11 and EXTRA=cpu: wheels and their hashes.
# `make setup LOCKED=1` installs exactly this; without LOCKED the versions hold and the hashes are not asked for.
# Made by `make lock`; not edited by hand. torch is PyTorch's CPU build, not on PyPI: see docs/security.md.
"""


def project_requires(pyproject: Mapping[str, Any]) -> list[str]:
    """Requirements of the project, those of extras with a marker as in a wheel's metadata."""
    project = pyproject["project"]
    extras: Mapping[str, Sequence[str]] = project["optional-dependencies"]
    of_extras: list[str] = []
    for extra, lines in extras.items():
        for line in lines:
            requirement, _, marker = line.partition(";")
            also = f"({marker}) and " if marker else ""
            of_extras.append(f'{requirement}; {also}extra == "{extra}"')
    return [*project["dependencies"], *of_extras]


def closure(roots: Iterable[str], requires: Mapping[str, Sequence[str]]) -> set[str]:
    """Names of all packages that these requirements need on this machine, themselves included."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in found if known == name}:
            found.add((name, extra))
            further = map(Requirement, requires.get(name, ()))
            waiting += [r for r in further if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def still_allowed(pins: Iterable[str], pyproject: Mapping[str, Any]) -> list[str]:
    """Pins `name==version` that the project's requirements allow."""
    versions = dict(pin.split()[0].split("==") for pin in pins)
    direct = [Requirement(line) for line in project_requires(pyproject)]
    excluded = {
        name
        for requirement in direct
        if (name := canonicalize_name(requirement.name)) in versions
        and not requirement.specifier.contains(versions[name], prereleases=True)
    }
    return [f"{name}=={version}" for name, version in versions.items() if name not in excluded]


def resolve(roots: Sequence[str], keep: Sequence[str], source: Sequence[str]) -> list[dict[str, Any]]:
    """pip's report of an install into an empty environment, wheels only."""
    with tempfile.TemporaryDirectory() as folder, listed(keep) as constraints:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--report", str(report), *source, "--constraint", str(constraints)]
        subprocess.run([*command, *roots], check=True)
        return json.loads(report.read_text(encoding="utf-8"))["install"]


def pin(entry: Mapping[str, Any]) -> str:
    """One entry of pip's report as a line of the lock."""
    metadata = entry["metadata"]
    digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{canonicalize_name(metadata['name'])}=={metadata['version']} --hash=sha256:{digest}"


def lock_text(entries: Sequence[Mapping[str, Any]], pyproject: Mapping[str, Any]) -> str:
    """The lock: first the packages of serving, then the rest, without the project and what setup removes."""
    by_name = {str(canonicalize_name(entry["metadata"]["name"])): entry for entry in entries}
    requires: dict[str, list[str]] = {
        name: entry["metadata"].get("requires_dist", []) for name, entry in by_name.items()
    }
    requires["rtap"] = project_requires(pyproject)
    left_out = {"rtap", *COMPANIONS}
    serving = closure(["rtap[cpu]", *pyproject["build-system"]["requires"]], requires)
    lines = {name: pin(entry) for name, entry in sorted(by_name.items()) if name not in left_out}
    first = [line for name, line in lines.items() if name in serving]
    second = [line for name, line in lines.items() if name not in serving]
    return "\n".join([HEAD, *first, "", FOR_TESTS, *second, ""])


def main(argv: list[str] | None = None) -> int:
    """Command line: `lock.py [--upgrade]`."""
    parser = argparse.ArgumentParser(prog="lock.py", description="Write deploy/requirements-cpu.lock.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    arguments = parser.parse_args(argv)
    if not lock_applies({"cpu"}, platform.system(), platform.machine(), sys.version_info[:2]):
        print("The lock is for Linux, x86_64 and Python 3.11: make it on such a machine.", file=sys.stderr)
        return 1
    pyproject = read_pyproject(ROOT)
    old = "" if arguments.upgrade or not LOCK.exists() else LOCK.read_text(encoding="utf-8")
    keep = still_allowed(locked_pins(old, {"dev"}), pyproject)
    source = torch_source(Path(sys.executable), {"cpu"}, torch_pin(pyproject), os.environ)
    try:
        entries = resolve([f"{ROOT}[cpu,dev]", *pyproject["build-system"]["requires"]], keep, source)
    except subprocess.CalledProcessError:
        print("pip found no set of versions: see above; --upgrade forgets the old lock's.", file=sys.stderr)
        return 1
    LOCK.write_text(lock_text(entries, pyproject), encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(locked_pins(LOCK.read_text(encoding='utf-8'), {'dev'}))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
