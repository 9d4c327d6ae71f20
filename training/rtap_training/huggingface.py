"""Typed wrappers of transformers calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import replacing, write_manifest


def load_policy(path: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Policy in fp32 and evaluation mode, and its tokenizer. Raises ConfigError if ``path`` is not a checkpoint."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a checkpoint (no config.json); train one with `rtap train sft`")
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint."""
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(path))


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def decode_ids(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens included."""
    return cast(str, tokenizer.decode(list(ids)))


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
