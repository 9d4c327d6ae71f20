"""What a checkpoint may bring along that runs: pickled weights, and Python code of its own. Looked for before loading.

It reads names and ``config.json`` of local folders; a Hugging Face name is held to safetensors by vLLM's own flag, and
its code by ``refuse_own_code`` once vLLM has read its configuration.
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
    """vLLM's ``--load-format`` where it would choose by itself: safetensors and nothing else, unless allowed."""
    return "safetensors" if given == "auto" and not allows_pickles else given


def check_folder(model: str, given_format: str, *, allows_pickles: bool, trusts_code: bool) -> None:
    """Raise ConfigError for a local checkpoint of pickled weights or with code of its own, unless these are allowed."""
    folder = Path(model)
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES) and name not in _NOT_WEIGHTS]
    has_safe = any(name.endswith(".safetensors") for name in names)
    if given_format == "auto" and pickles and not has_safe and not allows_pickles:
        raise ConfigError(
            f"{model} has only pickled weights ({pickles[0]}), which can run code while they are loaded: save it as "
            "safetensors, or load it all the same with --allow-pickled-weights"
        )
    if trusts_code:
        return
    for name in _WITH_CODE:
        refuse_own_code(model, _read(folder / name), name)


def refuse_own_code(model: str, config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise ConfigError for a configuration that names Python code of the checkpoint's own."""
    if config.get("auto_map"):
        raise ConfigError(
            f"{model} names Python code of its own (auto_map in its {where}): --trust-remote-code runs it; where vLLM "
            "knows the architecture itself, a copy without auto_map does as well"
        )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # vLLM says what is wrong with it, where it needs it
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}
