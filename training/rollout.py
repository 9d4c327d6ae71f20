"""Sample Think–Answer cycles from a policy with plain transformers, in large batches.

Cycles continue on token ids, as in the server. Whether a trajectory goes on is the caller's decision; the next cycle
is then forced open, because a policy that believes its own wrong answer ends the turn. No vLLM here: for the bundled
models the batched loop is as fast and starts at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM

from server.rtap.format import RTAP, parse_cycle
from training.huggingface import decode_ids, encode_text
from training.tasks.trajectory import TURN_END, Message
from training.tokenizer import render_prompt, token_id

MAX_CYCLE_TOKENS = 160
BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class SampledCycle:
    """One cycle as sampled. ``answer`` is None when it was cut; ``is_right`` is the checker's verdict."""

    ids: tuple[int, ...]
    answer: str | None
    is_right: bool


@dataclass(slots=True)
class Trajectory:
    """One sample of one question."""

    question: int
    prompt: list[int]
    cycles: list[SampledCycle] = field(default_factory=list[SampledCycle])
    is_open: bool = True

    def context(self, cycle_open: int) -> list[int]:
        """Token ids the next cycle continues."""
        ids = list(self.prompt)
        for cycle in self.cycles:
            ids += cycle.ids
        return [*ids, cycle_open] if self.cycles else ids


Check = Callable[[int, str], bool]
"""(question index, answer) -> right or not."""


def encode_question(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Prompt ids of a question alone."""
    return encode_text(tokenizer, render_prompt([Message("user", question)]))


def sample_trajectories(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    check: Check,
    *,
    samples: int,
    max_cycles: int,
    generator: torch.Generator,
) -> list[Trajectory]:
    """``samples`` trajectories a question at temperature 1, cut at the first right answer or after ``max_cycles``."""
    cycle_open = token_id(tokenizer, RTAP.cycle_open)
    stops = (token_id(tokenizer, RTAP.answer_close or ""), token_id(tokenizer, TURN_END))
    trajectories = [
        Trajectory(index, encode_question(tokenizer, question))
        for index, question in enumerate(questions)
        for _ in range(samples)
    ]
    for depth in range(max_cycles):
        live = sorted((t for t in trajectories if t.is_open), key=lambda t: len(t.context(cycle_open)))
        for start in tqdm(range(0, len(live), BATCH_ROWS), desc=f"sampling cycle {depth + 1}", unit="batch"):
            rows = live[start : start + BATCH_ROWS]
            sampled = sample_until(model, [t.context(cycle_open) for t in rows], stops, generator=generator)
            for trajectory, ids in zip(rows, sampled, strict=True):
                full = (cycle_open, *ids) if depth else tuple(ids)
                _, answer = parse_cycle(decode_ids(tokenizer, full), RTAP)
                is_right = answer is not None and check(trajectory.question, answer)
                trajectory.cycles.append(SampledCycle(full, answer, is_right))
                trajectory.is_open = not is_right and answer is not None
    return trajectories


@torch.inference_mode()
def sample_until(
    model: Qwen3ForCausalLM,
    prompts: Sequence[list[int]],
    stops: tuple[int, ...],
    *,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Continue each prompt until a stop id (kept) or the limit. Without a generator: greedy."""
    # Samples of one question share their prompt: read it once, then repeat its cache.
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    width = max(map(len, places))
    ids = torch.tensor([[stops[-1]] * (width - len(p)) + list(p) for p in places])  # (B, T), left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in places])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows: list[int] = list(range(len(prompts)))
    keep = [places[tuple(p)] for p in prompts]
    for step in range(MAX_CYCLE_TOKENS):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        if step == 0:
            logits, mask, positions = _select(keep, cache, logits, mask, positions)
        chosen = _choose(logits, generator)
        for row, token in zip(rows, cast(Any, chosen).tolist(), strict=True):
            outputs[row].append(token)
        keep = [i for i, row in enumerate(rows) if outputs[row][-1] not in stops]
        if not keep:
            break
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            chosen, mask, positions = _select(keep, cache, chosen, mask, positions)
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return outputs


def _select(keep: list[int], cache: DynamicCache, *tensors: Tensor) -> list[Tensor]:
    """The rows ``keep`` (in that order, repeats allowed) of the cache, in place, and of the tensors."""
    index = torch.tensor(keep)
    cache.batch_select_indices(index)
    return [t[index] for t in tensors]


def _choose(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> (B,)."""
    if generator is None:
        return logits.argmax(-1)
    return torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
