"""Resumable file of sampled trajectories.

JSON lines: a header that identifies policy and sampling settings, then one line per question. Lines are written in
chunks, each with its own seed. A file with another header is refused.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import sha256
from rtap_training.training_errors import TrainingError

CHUNK_ROWS = 512  # samples lost by a kill, at most
_FORMAT = 3

Make = Callable[[Sequence[int], int], list[str]]
"""(question indices, seed) -> a line of JSON for each question."""


def header(
    policy_sha256: str, questions: Sequence[str], *, sampler: str, samples: int, max_cycles: int, seed: int
) -> dict[str, Any]:
    """Everything the samples depend on. policy_sha256: see ``weights_sha256``."""
    return {
        "format": _FORMAT,
        "policy_sha256": policy_sha256,
        "sampler": sampler,
        "samples": samples,
        "max_cycles": max_cycles,
        "seed": seed,
        "questions": len(questions),
        "questions_sha256": sha256("\n".join(questions)),
    }


def weights_sha256(name: str | Path) -> str:
    """Digest of all weight files, read in parts; of the name for a model of the Hub."""
    policy = Path(name)
    digest = hashlib.sha256(b"" if policy.is_dir() else str(name).encode())
    for file in sorted(policy.glob("*.safetensors")) or sorted(policy.glob("*.bin")):
        with file.open("rb") as weights:
            while part := weights.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def read_or_make(file: Path, first: dict[str, Any], make: Make) -> list[str]:
    """One line per question of the header ``first``: read from ``file``, then made and appended chunk by chunk.

    A chunk has CHUNK_ROWS samples. Raises TrainingError when the file cannot be written; earlier lines are kept.
    """
    count, chunk = first["questions"], max(1, CHUNK_ROWS // first["samples"])
    done = _read(file, first)
    whole = len(done) if len(done) == count else len(done) - len(done) % chunk  # a kill may have cut a chunk
    kept = done[:whole]
    if whole == count:
        return kept
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in (json.dumps(first), *kept)), "utf-8")
        partial.replace(file)
        for start in tqdm(range(whole, count, chunk), desc=f"sampling {file.stem}", unit="chunk"):
            indices = range(start, min(count, start + chunk))
            fresh = make(indices, Random(f"{first['seed']}:{start}").getrandbits(40))
            with file.open("a", encoding="utf-8") as appended:
                appended.write("".join(f"{line}\n" for line in fresh))
            kept += fresh
    except OSError as error:
        raise TrainingError(f"cannot write samples to {file}: {error}; earlier samples are kept") from error
    return kept


def _read(file: Path, expected: dict[str, Any]) -> list[str]:
    """The complete lines after the header; an empty list without a file."""
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []  # text after the last newline was cut
    if not lines:
        return []
    found: dict[str, Any] = json.loads(lines[0])
    names = expected | found
    differing = [f"{name}: {found.get(name)!r}" for name in names if found.get(name) != expected.get(name)]
    if differing:
        raise ConfigError(
            f"{file} holds samples of another policy or setting ({', '.join(differing)}); remove it or name another"
        )
    return lines[1:]
