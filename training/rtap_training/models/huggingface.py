"""Typed wrappers of transformers calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rtap_training.checkpoint import replacing, write_manifest


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint."""
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(path))


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of a token that must exist."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the pad token."""
    return cast(int, tokenizer.pad_token_id)


def cast_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of all weights in place."""
    cast(Any, model).to(dtype)


def save_checkpoint(output: Path, model: PreTrainedModel, processor: Any, record: Mapping[str, Any]) -> None:
    """Write model, tokenizer or processor, and manifest to ``output`` atomically, in the model's dtype."""
    with replacing(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_manifest(folder, record)
