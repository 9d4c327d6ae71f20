"""Confidence generator model: the policy's body and a one-label head on a cycle's last token.

Input: the prompt and **one** cycle, ending at ``</answer>``, as in the paper. Earlier cycles are not part of it.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP
from rtap_training.calibration import Bools, Floats, constant_direction, fit_platt
from rtap_training.examples import Example, group, read_once
from rtap_training.huggingface import load_tokenizer, token_id
from rtap_training.tasks.trajectory import TURN_END


@dataclass(frozen=True, slots=True)
class Scored:
    """Pooled features (N, D), logits (N,), labels and question indices of cycles."""

    hidden: Floats
    logits: Floats
    labels: Bools
    questions: list[int]


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
    loaded = cast(Any, Qwen3ForSequenceClassification).from_pretrained(path, dtype=torch.float32)
    return cast(Qwen3ForSequenceClassification, loaded).eval(), load_tokenizer(path)


def body_of(model: Qwen3ForSequenceClassification) -> Qwen3Model:
    """The transformer below the head."""
    return cast(Qwen3Model, cast(Any, model).model)


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
def score(model: Qwen3ForSequenceClassification, examples: Sequence[Example], batch_tokens: int) -> Scored:
    """Score each distinct cycle once; repeat the result ``count`` times."""
    model.eval()
    groups = group(examples, batch_tokens)
    ordered = [e for g in groups for e in g]
    hidden = torch.cat([pooled(model, g) for g in groups])
    logits = model.score(hidden)[:, 0]
    times = np.array([e.count for e in ordered])
    return Scored(
        np.repeat(hidden.double().numpy(), times, axis=0),
        np.repeat(logits.double().numpy(), times),
        np.repeat(np.array([e.is_right for e in ordered]), times),
        [e.question for e in ordered for _ in range(e.count)],
    )


@torch.inference_mode()
def confidences(
    model: Qwen3ForSequenceClassification, rows: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[float]:
    """Confidence in [0, 1] of each row of prompt and cycle ids; equal rows are read once."""
    model.eval()
    return read_once(rows, batch_tokens, lambda batch: cast(Any, logits_of(model, batch).sigmoid()).tolist())


def calibrate(model: Qwen3ForSequenceClassification, scored: Scored) -> dict[str, float]:
    """Fold a Platt fit into the head, so that any engine returns calibrated scores."""
    slope, offset = fit_platt(scored.logits, scored.labels)
    direction = constant_direction(scored.hidden)
    residual = float(np.std(scored.hidden @ direction))
    with torch.no_grad():
        weight = slope * model.score.weight[0].double().numpy() + offset * direction
        model.score.weight[0] = torch.tensor(weight, dtype=torch.float32)
    return {"slope": round(slope, 4), "offset": round(offset, 4), "offset_spread": round(residual, 5)}
