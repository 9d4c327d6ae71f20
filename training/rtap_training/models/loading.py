"""Load a policy for reinforcement learning, and derive its trajectory format in tokens."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rtap_core.artifact import read_artifact
from rtap_core.errors import ConfigError
from rtap_core.format import TrajectoryFormat, detect_format
from rtap_core.lexicon import OopsCounter, load_lexicon
from rtap_training.rl.messages import render
from rtap_training.rl.rollouts import Dialect

NO_KWARGS: Mapping[str, Any] = {}
_VISION = ("visual", "vision_tower", "vision_model", "vision_encoder")
_NOT_LANGUAGE = (*_VISION, "projector", "connector", "merger", "audio")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy. processor: the tokenizer for a text model, tokenizer and image processor for a VLM."""

    model: PreTrainedModel
    processor: Any
    tokenizer: PreTrainedTokenizerBase
    dialect: Dialect

    @property
    def sees_images(self) -> bool:
        """True for a vision-language model."""
        return self.processor is not self.tokenizer


def load_for_training(
    name: str | Path, template_kwargs: Mapping[str, Any] = NO_KWARGS, *, dtype: torch.dtype = torch.float32
) -> Loaded:
    """Load a causal language model, or a vision-language model with a frozen vision encoder (R-TAP app. A).

    name: folder or Hub name. Its trajectory format is the one that ``rtap serve`` would detect. template_kwargs:
    variables of its chat template. Raises ConfigError if it is not a checkpoint, or does not support its trajectory
    format or these variables.
    """
    processor, tokenizer, dialect = load_dialect(name, template_kwargs)
    is_vlm = processor is not tokenizer
    with loading(name):
        factory = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
        model = cast(PreTrainedModel, factory.from_pretrained(name, dtype=dtype))
    if is_vlm:
        freeze_vision(model)
    return Loaded(model, processor, tokenizer, dialect)


def freeze_vision(model: PreTrainedModel) -> None:
    """Exclude the vision encoder of a vision-language model from training."""
    for part, parameter in model.named_parameters():
        if any(tower in part for tower in _VISION):
            parameter.requires_grad_(False)


def load_dialect(
    name: str | Path, template_kwargs: Mapping[str, Any] = NO_KWARGS
) -> tuple[Any, PreTrainedTokenizerBase, Dialect]:
    """Processor (the tokenizer itself for a text model), tokenizer and dialect of a model, without its weights.

    template_kwargs: variables of its chat template. Raises ConfigError."""
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        is_vlm = hasattr(config, "vision_config")
        processor = (AutoProcessor if is_vlm else AutoTokenizer).from_pretrained(name)
    tokenizer = cast(PreTrainedTokenizerBase, processor.tokenizer if is_vlm else processor)
    template = processor.chat_template or tokenizer.chat_template  # a dict if there are several
    if not template:
        raise ConfigError(f"{name} has no chat template, so nothing says how it is asked; add one to its tokenizer")
    if unread := [variable for variable in template_kwargs if variable not in str(template)]:
        raise ConfigError(f"chat_template_kwargs: the chat template of {name} does not read {', '.join(unread)}")
    if tokenizer.pad_token_id is None:  # Llama has none; padding is masked everywhere
        tokenizer.pad_token = tokenizer.eos_token
    block = read_artifact(config.to_dict()).model_dump(exclude_none=True)
    fmt, _ = detect_format(block, template=str(template), vocabulary=tokenizer.get_vocab())
    return processor, tokenizer, dialect_of(name, tokenizer, fmt, template_kwargs)


@contextmanager
def loading(name: str | Path) -> Generator[None]:
    """Turn what transformers raises for a name or folder into ConfigError."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"{name} is not a checkpoint (no config.json)")
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"cannot load {name}: {reason}; give a checkpoint folder or a Hugging Face name") from error


def lora_config(rank: int, task_type: str = "CAUSAL_LM", *, sees_images: bool = False) -> LoraConfig:
    """Adapters on all linear layers of the language model. The scale, alpha / rank, is 2. task_type: PEFT's."""
    vision = rf".*({'|'.join(_NOT_LANGUAGE)}).*" if sees_images else None
    return LoraConfig(
        task_type=task_type, r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=vision
    )


def dialect_of(
    name: str | Path, tokenizer: PreTrainedTokenizerBase, fmt: TrajectoryFormat, template_kwargs: Mapping[str, Any]
) -> Dialect:
    """Tags and end tokens of ``fmt`` in this tokenizer, and its chat template with these variables.

    Raises ConfigError if the end of an answer is not a single token, because generation could not stop there.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode(ids: Sequence[int]) -> str:
        return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False))

    cycle_end_ids = frozenset[int]()
    if fmt.answer_close is not None:
        ids = encode(fmt.answer_close)
        if len(ids) != 1:
            raise ConfigError(
                f"{fmt.answer_close!r} is {len(ids)} tokens in this tokenizer; add the tags as single tokens "
                "(not special ones) and train them first (`rtap train sft`), or use the think format"
            )
        cycle_end_ids = frozenset(ids)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer needs an end-of-turn token (eos_token)")
    try:
        declared: Any = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # it has no generation config
        declared = None
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
        render=partial(render, tokenizer, template_kwargs=template_kwargs),
    )
