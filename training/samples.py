"""Sampled trajectories on disk: sampling goes on where it was stopped, and a generator is trained again without it.

JSON lines: a header that identifies policy and sampling, then one line a question, written in chunks of questions that
have their own seed. A file made by anything else is refused.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from server.rtap.errors import ConfigError
from training.checkpoint import sha256
from training.errors import TrainingError
from training.rollout import SampledCycle, Trajectory

CHUNK_ROWS = 2048
_FORMAT = 2

Sample = Callable[[Sequence[int], int], list[Trajectory]]
"""(question indices, seed) -> their trajectories, those of one question side by side."""


def header(
    policy: Path, questions: Sequence[str], *, sampler: str, samples: int, max_cycles: int, seed: int
) -> dict[str, Any]:
    """What the samples depend on."""
    weights = (policy / "model.safetensors").read_bytes()
    return {
        "format": _FORMAT,
        "policy_sha256": hashlib.sha256(weights).hexdigest(),
        "sampler": sampler,
        "samples": samples,
        "max_cycles": max_cycles,
        "seed": seed,
        "questions": len(questions),
        "questions_sha256": sha256("\n".join(questions)),
    }


def read_or_sample(file: Path, first: dict[str, Any], sample: Sample) -> list[Trajectory]:
    """All trajectories that ``first``, the header, tells of: those in ``file``, then the others, sampled and appended.

    Raises TrainingError when the file cannot be written; what was sampled before stays there.
    """
    count, chunk = first["questions"], max(1, CHUNK_ROWS // first["samples"])
    done = _read(file, first)
    whole = len(done) if len(done) == count else len(done) - len(done) % chunk  # a kill may have cut a chunk
    trajectories = [t for line in done[:whole] for t in _parse(line)]
    if whole == count:
        return trajectories
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in (json.dumps(first), *done[:whole])), "utf-8")
        partial.replace(file)
        for start in tqdm(range(whole, count, chunk), desc=f"sampling {file.stem}", unit="chunk"):
            indices = range(start, min(count, start + chunk))
            fresh = sample(indices, Random(f"{first['seed']}:{start}").getrandbits(40))
            with file.open("a", encoding="utf-8") as appended:
                appended.write("".join(_render(i, [t for t in fresh if t.question == i]) for i in indices))
            trajectories += fresh
    except OSError as error:
        raise TrainingError(f"cannot write samples to {file}: {error}; those before are kept") from error
    return trajectories


def _read(file: Path, expected: dict[str, Any]) -> list[str]:
    """The whole lines after the header; none where there is no file yet."""
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []  # what follows the last newline was cut
    if not lines:
        return []
    found: dict[str, Any] = json.loads(lines[0])
    differing = [f"{name}: {found.get(name)!r}" for name in expected if found.get(name) != expected[name]]
    if differing:
        raise ConfigError(
            f"{file} holds samples of another policy or setting ({', '.join(differing)}); remove it or name another"
        )
    return lines[1:]


def _render(question: int, trajectories: Sequence[Trajectory]) -> str:
    cycles = [[[c.ids, c.answer, c.is_right] for c in t.cycles] for t in trajectories]
    return json.dumps({"question": question, "prompt": trajectories[0].prompt, "samples": cycles}) + "\n"


def _parse(line: str) -> list[Trajectory]:
    content = json.loads(line)
    return [
        Trajectory(
            content["question"],
            content["prompt"],
            [SampledCycle(tuple(ids), answer, is_right) for ids, answer, is_right in cycles],
            is_open=False,
        )
        for cycles in content["samples"]
    ]
