"""Refuse checkpoints with pickled weights, which can run code while they are loaded.

Local folders are checked here by file names. For a Hugging Face name vLLM's load format enforces safetensors. A
checkpoint's own Python code (``auto_map``) is vLLM's and transformers' to refuse without ``--trust-remote-code``.
"""

from pathlib import Path

from rtap_core.errors import ConfigError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"})


def load_format(given: str, *, allows_pickles: bool) -> str:
    """``--load-format`` for vLLM: safetensors instead of auto, unless pickles are allowed."""
    return "safetensors" if given == "auto" and not allows_pickles else given


def check_folder(model: str, given_format: str, *, allows_pickles: bool) -> None:
    """Raise ConfigError for a local checkpoint with pickled weights only, unless allowed."""
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
