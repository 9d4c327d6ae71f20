"""Load a policy for reinforcement learning, and derive its trajectory format in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rtap_core.artifact import read_artifact
from rtap_core.errors import ConfigError
from rtap_core.format import TrajectoryFormat, format_from_config
from rtap_core.lexicon import OopsCounter, load_lexicon
from rtap_training.rl.rollouts import Dialect

_VISION = ("visual", "vision_tower", "vision_model", "vision_encoder")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy in fp32. processor: the tokenizer for a text model, tokenizer and image processor for a VLM."""

    model: PreTrainedModel
    processor: Any
    tokenizer: PreTrainedTokenizerBase
    dialect: Dialect

    @property
    def sees_images(self) -> bool:
        """True for a vision-language model."""
        return self.processor is not self.tokenizer


def load_for_training(path: Path) -> Loaded:
    """Load a causal language model, or a vision-language model with a frozen vision encoder (R-TAP app. A).

    Raises ConfigError if ``path`` is not a checkpoint or its tokenizer does not support its trajectory format.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a checkpoint (no config.json); train one with `rtap train sft`")
    config = cast(Any, AutoConfig).from_pretrained(path)
    is_vlm = hasattr(config, "vision_config")
    factory = cast(Any, AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM)
    model = cast(PreTrainedModel, factory.from_pretrained(path, dtype=torch.float32))
    if is_vlm:
        for name, parameter in model.named_parameters():
            if any(part in name for part in _VISION):
                parameter.requires_grad_(False)
    processor = cast(Any, AutoProcessor if is_vlm else AutoTokenizer).from_pretrained(path)
    tokenizer = cast(PreTrainedTokenizerBase, processor.tokenizer if is_vlm else processor)
    fmt = format_from_config(read_artifact(config.to_dict()).model_dump(exclude_none=True))
    return Loaded(model, processor, tokenizer, dialect_of(model, tokenizer, fmt))


def dialect_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fmt: TrajectoryFormat) -> Dialect:
    """Tags and end tokens of ``fmt`` in this tokenizer.

    Raises ConfigError if the end of an answer is not a single token, because generation could not stop there.
    """

    def encode(text: str) -> list[int]:
        return cast(list[int], cast(Any, tokenizer).encode(text, add_special_tokens=False))

    def decode(ids: Sequence[int]) -> str:
        return cast(str, cast(Any, tokenizer).decode(list(ids), skip_special_tokens=False))

    cycle_end_ids = frozenset[int]()
    if fmt.answer_close is not None:
        ids = encode(fmt.answer_close)
        if len(ids) != 1:
            raise ConfigError(
                f"{fmt.answer_close!r} is {len(ids)} tokens in this tokenizer; add the tags as single tokens "
                "(not special ones) and train them first (`rtap train sft`), or use the think format"
            )
        cycle_end_ids = frozenset(ids)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer needs an end-of-turn token (eos_token) and a pad token")
    declared: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {declared} if isinstance(declared, int) else set(cast(list[int], declared or []))
    end_of_turn_id = cast(int, tokenizer.eos_token_id)
    return Dialect(
        format=fmt,
        end_of_turn_id=end_of_turn_id,
        end_of_turn_ids=frozenset(ends | {end_of_turn_id}),
        cycle_end_ids=cycle_end_ids,
        decode=decode,
        encode=encode,
        count_oops=OopsCounter(load_lexicon(), encode).count,
    )
