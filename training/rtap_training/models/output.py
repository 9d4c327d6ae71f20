"""Write what was trained: a checkpoint in bf16, or an adapter."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rtap_training.checkpoint import replacing, write_manifest
from rtap_training.models.huggingface import cast_to, save_checkpoint
from rtap_training.models.loading import Loaded, load_for_training


def save_policy(
    output: Path,
    model: Any,
    weights: dict[str, Tensor],
    loaded: Loaded,
    record: dict[str, Any],
    *,
    merge_into: str | None,
    continues: bool,
) -> None:
    """Write ``weights`` of ``model``, which is ``loaded``'s model or adapters on it, with tokenizer and manifest.

    merge_into: folder or name of the model to merge an adapter into; None: the adapter alone is written. continues:
    the policy was trained to continue its own answers, so a server lets it."""
    block = cast(dict[str, Any], getattr(loaded.model.config, "rtap", None) or {})
    block = block | {"format": loaded.dialect.format.name} | ({"recursion": "continue"} if continues else {})
    if not isinstance(model, PeftModel):
        write_model(output, loaded.model, weights, loaded.processor, record, block=block)
        return
    if merge_into is None:
        with replacing(output) as folder:
            model.save_pretrained(str(folder), state_dict=weights)
            (folder / "README.md").unlink()  # PEFT's template of a model card
            loaded.processor.save_pretrained(folder)
            write_manifest(folder, record)
        return
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=weights)
        merged = PeftModel.from_pretrained(load_for_training(merge_into).model, folder).merge_and_unload()
    write_model(output, merged, merged.state_dict(), loaded.processor, record, block=block)


def save_generator_adapter(output: Path, adapter: Any, config: Any, record: Mapping[str, Any]) -> None:
    """Write a generator's adapter with its head in bf16, the classifier's config and the manifest, atomically."""
    config.architectures = [type(adapter.get_base_model()).__name__]
    settings = adapter.peft_config["default"]
    if Path(settings.base_model_name_or_path).is_dir():
        settings.base_model_name_or_path = str(Path(settings.base_model_name_or_path).resolve())
    weights = {name: weight.bfloat16() for name, weight in adapter.state_dict().items()}
    with replacing(output) as folder:
        adapter.save_pretrained(folder, state_dict=weights)
        (folder / "README.md").unlink()  # PEFT's template of a model card
        config.save_pretrained(folder)
        write_manifest(folder, record)


def write_model(
    output: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    processor: Any,
    record: dict[str, Any],
    *,
    block: dict[str, Any] | None = None,
) -> None:
    """Save ``weights`` in bf16 as a checkpoint of ``model``'s class, with tokenizer or processor and manifest.

    The model itself is not changed; it may hold only a shard of the weights. block: ``rtap`` block of the config.
    """
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config))
    if block is not None:
        copy.config.rtap = block
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    cast_to(copy, torch.bfloat16)
    if hasattr(model, "generation_config"):  # a classifier has no generation config
        copy.generation_config = model.generation_config
    save_checkpoint(output, copy, processor, record)
