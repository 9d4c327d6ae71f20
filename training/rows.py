"""Train a policy on rows of token ids, a fresh draw an epoch: what ``correct`` and ``imitate`` have in common."""

from collections.abc import Callable
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from training.config import SampledTurnsConfig
from training.data import Batch, Encoded, bucket, pad
from training.loop import Loop
from training.optim import build_muon
from training.runs import States
from training.runtime import configure_torch
from training.sft import policy_loss
from training.streams import Stream
from training.tokenizer import pad_id


def train_on_rows(
    name: str,
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: SampledTurnsConfig,
    states: States,
    draw: Callable[[Random], list[Encoded]],
) -> dict[str, Any]:
    """Epochs of what ``draw`` gives, in random order; from the last state where there is one. Result: the figures."""
    padding = pad_id(tokenizer)
    optimisers = build_muon(
        policy.named_parameters(),
        matrix_rate=config.matrix_rate,
        learning_rate=config.learning_rate,
        weight_decay=0.0,
    )

    def epoch(rng: Random) -> list[Batch]:
        drawn = draw(rng)
        rng.shuffle(drawn)
        groups = bucket(drawn, config.batch_tokens)
        rng.shuffle(groups)
        return [pad(group, padding) for group in groups]

    stream = Stream(epoch, seed=config.seed)
    configure_torch(config.threads, config.seed)  # however much was sampled before
    policy.train()
    with Loop(name, config, states, model=policy, optimisers=optimisers, stream=stream) as loop:
        while loop.goes_on():
            batch = next(stream)
            loop.descend(policy_loss(policy, batch), rows=len(batch.ids), tokens=batch.ids.numel())
    return loop.summary()
