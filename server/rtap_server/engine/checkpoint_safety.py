"""Refuse checkpoints that run code when loaded: pickled weights and custom Python modules.

Local folders are checked here by file names and ``config.json``. For a Hugging Face name vLLM's load format enforces
safetensors, and ``refuse_custom_code`` runs once vLLM has read the configuration.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rtap_core.errors import ConfigError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"})
_WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def load_format(given: str, *, allows_pickles: bool) -> str:
    """``--load-format`` for vLLM: safetensors instead of auto, unless pickles are allowed."""
    return "safetensors" if given == "auto" and not allows_pickles else given


def check_folder(model: str, given_format: str, *, allows_pickles: bool, trusts_code: bool) -> None:
    """Raise ConfigError for a local checkpoint with pickled weights only, or with custom code, unless allowed."""
    folder = Path(model)
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES) and name not in _NOT_WEIGHTS]
    has_safe = any(name.endswith(".safetensors") for name in names)
    if given_format == "auto" and pickles and not has_safe and not allows_pickles:
        raise ConfigError(
            f"{model} has only pickled weights ({pickles[0]}), which can run code while they are loaded: save it as "
            "safetensors, or allow them with --allow-pickled-weights"
        )
    if trusts_code:
        return
    for name in _WITH_CODE:
        refuse_custom_code(model, _read(folder / name), name)


def refuse_custom_code(model: str, config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise ConfigError for a configuration with ``auto_map``."""
    if config.get("auto_map"):
        raise ConfigError(
            f"{model} has custom Python code (auto_map in its {where}): allow it with --trust-remote-code, or remove "
            "auto_map if vLLM supports the architecture"
        )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # vLLM reports an invalid file if it needs it
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}
