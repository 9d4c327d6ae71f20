"""Atomic checkpoint folders and their manifests."""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MANIFEST = "manifest.json"
KEPT = ("README.md",)  # written by hand, carried over to the new checkpoint


@contextmanager
def replacing(output: Path) -> Generator[Path]:
    """Yield a temporary folder that replaces ``output`` on success; on failure nothing changes.

    A folder cannot be replaced in one system call, so the old one is first renamed to ``.NAME.old``. If the process is
    killed at that moment, the next save restores it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    old = output.parent / f".{output.name}.old"
    if old.exists():
        if output.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, output)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, which a container user cannot read
        for name in KEPT:
            if (output / name).exists() and not (partial / name).exists():
                shutil.copy2(output / name, partial / name)
        if output.exists():
            os.rename(output, old)
        os.rename(partial, output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def manifest(
    command: str, config: "DataclassInstance", *, data: str, seconds: float, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Provenance of a checkpoint. ``data``: text that identifies the training data."""
    return {
        "command": command,
        "config": {name: str(v) if isinstance(v, Path) or v == math.inf else v for name, v in asdict(config).items()},
        "data_sha256": sha256(data),
        "training_seconds": round(seconds, 1),
        "figures": dict(figures),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} logical CPUs",
        "git_commit": git_commit(),
    }


def sha256(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine training."""
    names = ("torch", "transformers", "trl", "accelerate")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` into a checkpoint."""
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def git_commit() -> str | None:
    """Git commit of this code; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
