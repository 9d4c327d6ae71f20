"""Confidence generator model: the policy's body and a one-label head on a cycle's last token.

Input: the prompt and **one** cycle, ending at ``</answer>``, as in the paper. Earlier cycles are not part of it.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP
from rtap_training.examples import Example, read_once
from rtap_training.huggingface import load_tokenizer, token_id
from rtap_training.tasks.trajectory import TURN_END


def build_generator(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_layers: int | None = None
) -> Qwen3ForSequenceClassification:
    """Build a generator from the policy's body (R-TAP app. A) or its first ``num_layers``.

    The head is the policy's logit difference between ending the turn and opening another cycle. Untrained it has a
    within-question AUROC of 0.92 on held-out Countdown; a random head would first have to learn this.
    """
    model = build_scratch(policy, num_layers)
    body = body_of(model)
    known = policy.model.state_dict()
    body.load_state_dict({name: known[name] for name in body.state_dict()})
    outputs = policy.lm_head.weight.detach()
    with torch.no_grad():
        model.score.weight[0] = outputs[token_id(tokenizer, TURN_END)] - outputs[token_id(tokenizer, RTAP.cycle_open)]
    return model


def build_scratch(policy: Qwen3ForCausalLM, num_layers: int | None = None) -> Qwen3ForSequenceClassification:
    """Random weights from torch's global generator, in the policy's shape, ``num_layers`` deep.

    Raises ConfigError for more layers than the policy has.
    """
    settings = deepcopy(policy.config)
    settings.num_labels = 1
    if num_layers is not None:
        if num_layers > settings.num_hidden_layers:
            raise ConfigError(f"num_layers={num_layers} is more than the policy's {settings.num_hidden_layers}")
        settings.num_hidden_layers = num_layers
        settings.layer_types = list(settings.layer_types or ())[:num_layers]
    return Qwen3ForSequenceClassification(settings)


def load_generator(path: Path) -> tuple[Qwen3ForSequenceClassification, PreTrainedTokenizerFast]:
    """A trained generator in fp32, and its tokenizer."""
    model = Qwen3ForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return model.eval(), load_tokenizer(path)


def body_of(model: Qwen3ForSequenceClassification) -> Qwen3Model:
    """The transformer below the head."""
    return cast(Qwen3Model, model.model)


def pooled(model: Qwen3ForSequenceClassification, examples: Sequence[Example]) -> Tensor:
    """Hidden state (B, D) of each example's last token."""
    pad_id = cast(int, model.config.pad_token_id)
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([[*e.ids, *[pad_id] * (width - len(e.ids))] for e in examples])
    hidden = cast(Tensor, body_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    last = torch.tensor([len(e.ids) - 1 for e in examples])
    return hidden[torch.arange(len(examples)), last]


def logits_of(model: Qwen3ForSequenceClassification, examples: Sequence[Example]) -> Tensor:
    """Logits (B,)."""
    return model.score(pooled(model, examples))[:, 0]


@torch.inference_mode()
def confidences(
    model: Qwen3ForSequenceClassification, rows: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[float]:
    """Confidence in [0, 1] of each row of prompt and cycle ids; equal rows are read once."""
    model.eval()

    def read(batch: Sequence[Example]) -> list[float]:
        return logits_of(model, batch).sigmoid().tolist()

    return read_once(rows, batch_tokens, read)
