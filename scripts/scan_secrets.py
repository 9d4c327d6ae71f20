"""Look for keys and passwords in what git has or would take, with detect-secrets. Exit code 1 if there may be one.

A line that only looks like one is told so where it stands: `# pragma: allowlist secret`. Whether a key that is found
works is not tried, and git's past is not read.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Hashes and commits, written by programs: nothing else in them could be told from a key.
NOT_READ = ("deploy/requirements-cpu.lock", "deploy/models/*/manifest.json", "docs/results/*.json", "*.safetensors")
# What the SDKs are given where a server wants no key.
NO_KEY = "^none$"
# Tests make keys up all the time: there, only what looks like a real one counts, not what it is called.
IN_TESTS = ("--disable-plugin", "KeywordDetector")


def files(root: Path) -> list[str]:
    """What git tracks or would add; every file where git cannot be asked. Relative to root."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        names = listed.stdout.split("\0")
    else:
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if ".venv" not in path.parts]
    return sorted(name for name in names if (root / name).is_file() and not any(fnmatch(name, p) for p in NOT_READ))


def commands(names: list[str]) -> Iterator[list[str]]:
    """What to run in the root: once for the tests, once for the rest."""
    hook = [str(Path(sys.executable).with_name("detect-secrets-hook")), "--exclude-secrets", NO_KEY]
    tests = [name for name in names if name.startswith("tests/")]
    others = [name for name in names if not name.startswith("tests/")]
    if tests:
        yield [*hook, *IN_TESTS, *tests]
    if others:
        yield [*hook, *others]


def main(argv: list[str] | None = None) -> int:
    """Command line: `scan_secrets.py [FOLDER]`."""
    parser = argparse.ArgumentParser(
        prog="scan_secrets.py", description="Look for keys and passwords in this checkout."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help="another checkout (default: this one)")
    root: Path = parser.parse_args(argv).folder
    names = files(root)
    codes = [subprocess.run(command, cwd=root, check=False).returncode for command in commands(names)]
    if any(codes):
        return 1
    print(f"no keys in {len(names)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
