"""Generators saved as a LoRA adapter (PEFT), which are merged into their backbone before they are used.

The folder has the adapter with its head, and the classifier's ``config.json``. vLLM loads no head from an adapter.
"""

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from rtap_core.errors import ConfigError

_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (_ADAPTER, _WEIGHTS, "config.json")


def is_adapter(model: str | Path) -> bool:
    """True for the folder of an adapter."""
    return (Path(model) / _ADAPTER).is_file()


def is_path(model: str) -> bool:
    """True for a path, False for a Hugging Face name."""
    return model.startswith(("/", "./", "../", "~")) or Path(model).exists()


def check_model_path(model: str) -> None:
    """Raise ConfigError for a path without a checkpoint."""
    if not is_path(model) or (Path(model) / "config.json").is_file():
        return
    if is_adapter(model):
        raise ConfigError(
            f"{model} is an adapter: serve its base with --enable-lora --lora-modules NAME={model}, or a "
            "generator's with --confidence-model"
        )
    raise ConfigError(f"no model at {model}: give a folder with a config.json, or a Hugging Face name")


def read_backbone(folder: Path) -> str:
    """Folder or Hub name of the model that the adapter was trained on. Raises ConfigError."""
    if any(not (folder / name).is_file() for name in ADAPTER_FILES):
        raise ConfigError(
            f"{folder} is no generator's adapter: it needs {_WEIGHTS} and the classifier's config.json, as "
            "`rtap train generator --lora-rank` writes them; a policy's adapter is served with --lora-modules"
        )
    try:
        return str(json.loads((folder / _ADAPTER).read_text("utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {folder / _ADAPTER}: {type(error).__name__}: {error}") from error


def merge_adapter(folder: Path, backbone: str) -> Any:
    """The classifier in fp32, with the adapter in its weights. Raises ConfigError."""
    import torch

    return load_adapter(folder, backbone, torch.float32).merge_and_unload()


def load_adapter(folder: Path, backbone: str, dtype: Any, *, is_trainable: bool = False) -> Any:
    """The adapter on its backbone, which is in torch's ``dtype``. Raises ConfigError."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the new head, which the adapter has, and of layers that are left out
    try:
        config = cast(Any, AutoConfig).from_pretrained(folder)
        model = cast(Any, AutoModelForSequenceClassification).from_pretrained(
            backbone, config=config, dtype=dtype, use_safetensors=True
        )
        return cast(Any, PeftModel).from_pretrained(model, folder, is_trainable=is_trainable)
    except Exception as error:  # transformers, PEFT, safetensors and the hub raise many classes
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"cannot load the adapter {folder} on {backbone}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def merge_to_checkpoint(folder: Path, backbone: str, cache: Path) -> Path:
    """A checkpoint in bf16 below ``cache`` with the adapter in its weights, made if it is not there.

    Raises ConfigError."""
    import torch
    from transformers import AutoTokenizer

    target = cache / _digest(folder, backbone)
    if (target / "config.json").is_file():
        return target
    model = merge_adapter(folder, backbone).to(torch.bfloat16)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as fresh:
            checkpoint = Path(fresh) / "checkpoint"
            model.save_pretrained(checkpoint)
            cast(Any, AutoTokenizer).from_pretrained(backbone).save_pretrained(checkpoint)
            try:
                os.rename(checkpoint, target)
            except OSError:
                if not (target / "config.json").is_file():  # another process was first
                    raise
    except OSError as error:
        raise ConfigError(f"cannot write the merged generator to {cache} (XDG_CACHE_HOME moves it): {error}") from error
    return target


def _digest(folder: Path, backbone: str) -> str:
    """Identifies what is merged: the adapter's files, and the backbone's name or the size and time of its weights."""
    digest = hashlib.sha256(backbone.encode())
    for name in ADAPTER_FILES:
        digest.update((folder / name).read_bytes())
    for file in sorted(Path(backbone).glob("*.safetensors")) if Path(backbone).is_dir() else []:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
