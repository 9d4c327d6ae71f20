"""Length-bucketed batches of token ids with loss masks, and their loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and completion. is_trained: per token, True if it counts in the loss."""

    ids: list[int]
    is_trained: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded ids (B, T) and the loss mask (B, T) over the same positions."""

    ids: Tensor
    mask: Tensor


def pad(rows: Sequence[Encoded], padding: int) -> Batch:
    """Right-pad to the longest row."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = torch.tensor(row.is_trained)
    return Batch(ids, mask)


def bucket(rows: Sequence[Encoded], batch_tokens: int) -> list[list[Encoded]]:
    """Sort rows by length and split them so that each padded batch has at most ``batch_tokens`` tokens."""
    groups: list[list[Encoded]] = [[]]
    for row in sorted(rows, key=lambda r: len(r.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(row.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def policy_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the trained tokens. Only their logits are computed."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # (B, T, D)
    trained = batch.mask[:, 1:]
    logits: Tensor = model.lm_head(hidden[:, :-1][trained])
    return F.cross_entropy(logits, batch.ids[:, 1:][trained])
