"""`rtap models`: models that this machine can serve without a download, bundled and in the Hub cache."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rtap_core.artifact import BUNDLED_MODELS, is_classifier
from rtap_core.errors import ConfigError
from rtap_core.format import detect_format

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint on this machine. format: trajectory format, or ``generator`` for a classifier."""

    name: str
    source: str
    bytes: int
    format: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="rtap models",
        description="List the models on this machine: bundled, and in the Hub cache (HF_HUB_CACHE or HF_HOME).",
        epilog="Serve one with `rtap serve NAME`; a generator with --confidence-model NAME.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list: name, source, bytes, format")
    args = parser.parse_args(argv)
    models = [*bundled_models(BUNDLED_MODELS), *cached_models(hub_cache())]
    if args.json:
        sys.stdout.write(json.dumps([asdict(model) for model in models], ensure_ascii=False) + "\n")
        return 0
    rows = [("MODEL", "SOURCE", "SIZE", "FORMAT"), *((m.name, m.source, size(m.bytes), m.format) for m in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, row[3]]) + "\n")
    return 0


def bundled_models(folder: Path) -> Iterator[Model]:
    """Checkpoints in the folder of bundled models."""
    for config in sorted(folder.glob("*/config.json")):
        yield _model(str(config.parent), "bundled", config.parent)


def cached_models(cache: Path) -> Iterator[Model]:
    """Models in a Hub cache whose newest snapshot has weights."""
    for repository in sorted(cache.glob("models--*")):
        snapshots = sorted(repository.glob("snapshots/*/config.json"), key=lambda file: file.lstat().st_mtime)
        if snapshots and _weights(snapshots[-1].parent):
            name = repository.name.removeprefix("models--").replace("--", "/")
            yield _model(name, "Hub cache", snapshots[-1].parent)


def hub_cache() -> Path:
    """Folder of the Hub cache, as huggingface_hub finds it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home) / "hub").expanduser()


def size(number: float) -> str:
    """Format bytes: 1.5 GB."""
    for unit in _UNITS[:-1]:
        if number < 1000:
            return f"{number:.0f} {unit}" if unit in ("B", "kB") else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} {_UNITS[-1]}"


def _model(name: str, source: str, folder: Path) -> Model:
    return Model(name, source, sum(file.stat().st_size for file in _weights(folder)), _format(folder))


def _weights(folder: Path) -> list[Path]:
    return [file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()]


def _format(folder: Path) -> str:
    config, tokenizer = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    if is_classifier(config):
        return "generator"
    if not config.get("architectures"):
        return "unknown"
    template = folder / "chat_template.jinja"
    text = template.read_text("utf-8", "replace") if template.is_file() else json.dumps(tokenizer.get("chat_template"))
    added = cast(dict[str, dict[str, Any]], tokenizer.get("added_tokens_decoder") or {})
    vocabulary = {str(token.get("content")) for token in added.values()}
    try:
        return detect_format(config.get("rtap"), template=text, vocabulary=vocabulary)[0].name
    except ConfigError:
        return "unknown"


def _json(file: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
