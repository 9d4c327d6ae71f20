"""Sampled cycles on disk, so that a generator can be trained again without sampling again.

JSON lines: a header that identifies policy and sampling, then one row a cycle. A file made by anything else is refused.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.rtap.errors import ConfigError
from training.config import ConfidenceConfig
from training.examples import Row

_SAMPLING = ("seed", "questions", "samples", "max_cycles", "tasks")


def header(config: ConfidenceConfig) -> dict[str, Any]:
    """What the samples depend on."""
    weights = (config.policy / "model.safetensors").read_bytes()
    return {"policy_sha256": hashlib.sha256(weights).hexdigest()} | {k: getattr(config, k) for k in _SAMPLING}


def read_or_sample(config: ConfidenceConfig, sample: Callable[[], list[Row]]) -> list[Row]:
    """The rows of ``config.samples_file``; when it is absent they are sampled and written there."""
    file = config.samples_file
    if file is None:
        return sample()
    expected = header(config)
    if file.exists():
        first, *lines = file.read_text("utf-8").splitlines()
        if json.loads(first) != expected:
            raise ConfigError(f"{file} holds samples of another policy or setting; remove it or name another file")
        return [(question, tuple(ids), is_right) for question, ids, is_right in map(json.loads, lines)]
    rows = sample()
    _write(file, expected, rows)
    return rows


def _write(file: Path, first: dict[str, Any], rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in (first, *rows)), "utf-8")
    partial.replace(file)
