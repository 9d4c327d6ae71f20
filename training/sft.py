"""Cold start: train a policy from nothing on Think–Answer traces with honest arithmetic (``rtap train sft``)."""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from server.rtap.errors import ConfigError
from training.checkpoint import manifest
from training.config import SftConfig
from training.data import Batch, batches, conversation_text
from training.huggingface import cast_to, load_policy, load_tokenizer, save_checkpoint
from training.optim import Budget, build_muon, descend, schedule
from training.parallel import rank, run_processes
from training.policy import MAX_POSITIONS, build_policy
from training.progress import Progress
from training.questions import held_out_questions
from training.rollout import sample_trajectories
from training.runtime import configure_torch
from training.tasks import TASKS, parse_mix
from training.tasks.trajectory import TURN_END, sample_conversation
from training.tokenizer import PAD, TAGS, TURN_START, build_tokenizer

CORPUS_SIZE = 20_000
EVAL_CYCLES = 3


def policy_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the trained tokens; logits are computed for those only."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # (B, T, D)
    trained = batch.mask[:, 1:]
    logits: Tensor = model.lm_head(hidden[:, :-1][trained])
    return F.cross_entropy(logits, batch.ids[:, 1:][trained])


def run(config: SftConfig) -> None:
    """Train in all processes; the first evaluates on held-out questions, saves and prints the figures."""
    run_processes(_work, config.processes, config)


def _work(config: SftConfig) -> None:
    configure_torch(config.threads, config.seed)
    weights = parse_mix(config.tasks)
    rng = Random(config.seed)
    corpus = [conversation_text(sample_conversation(TASKS, weights, rng))[0] for _ in range(CORPUS_SIZE)]
    model, tokenizer = _start(config, corpus)
    training = train(model, tokenizer, config)
    if rank() != 0:
        return
    figures = training | {"held_out": evaluate(model, tokenizer, config)}
    record = manifest("rtap train sft", config, data="".join(corpus), seconds=training["seconds"], figures=figures) | {
        "parameters": sum(p.numel() for p in model.parameters())
    }
    save(config.output, model, tokenizer, record)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def _start(config: SftConfig, corpus: Sequence[str]) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The model that training starts from. Raises ConfigError when a checkpoint cannot give what is asked of it."""
    if config.initial is not None:
        return load_policy(config.initial)
    if config.tokenizer is not None:
        tokenizer = load_complete_tokenizer(config.tokenizer)
    else:
        tokenizer = build_tokenizer(corpus, vocab_size=config.vocab_size, max_length=MAX_POSITIONS)
    return build_policy(config, tokenizer), tokenizer


def load_complete_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint. Raises ConfigError unless turns and cycles are written in tokens that it has."""
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path} has no tokenizer (no tokenizer.json); name a checkpoint of `rtap train sft`")
    tokenizer = load_tokenizer(path)
    known = tokenizer.get_vocab()
    missing = [token for token in (PAD, TURN_START, TURN_END, *TAGS) if token not in known]
    if missing:
        raise ConfigError(f"the tokenizer of {path} has no tokens {' '.join(missing)}, which every trace is written in")
    return tokenizer


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: SftConfig) -> dict[str, Any]:
    """The loop. Snapshots go to ``.NAME.snapshot`` beside the output: a kill costs minutes, never the published model.

    Counts in the result are of the first process; the others do as many.
    """
    optimisers = build_muon(
        model.named_parameters(),
        matrix_rate=config.matrix_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    seed = (config.seed + 1) * 1000 + rank()
    stream = batches(tokenizer, parse_mix(config.tasks), seed=seed, batch_tokens=config.batch_tokens)
    budget = Budget(config.minutes, config.max_steps)
    saved = monotonic()
    model.train()
    with Progress("sft", config.output, budget, is_shown=rank() == 0) as progress:
        while (done := budget.shared_progress()) < 1:
            batch = next(stream)
            loss = policy_loss(model, batch)
            descend(loss, optimisers, factor=schedule(done, warmup_share=config.warmup_share))
            budget.steps += 1
            progress.record(loss.item(), rows=len(batch.ids), tokens=batch.ids.numel())
            if rank() == 0 and monotonic() - saved > config.save_minutes * 60:
                save(config.output.with_name(f".{config.output.name}.snapshot"), model, tokenizer, {"partial": True})
                saved = monotonic()
    return progress.summary()


def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: SftConfig) -> dict[str, Any]:
    """Held-out accuracy of each task in the mix: the first cycle, by level too, and each later cycle forced open
    after a wrong one."""
    model.eval()
    figures: dict[str, Any] = {}
    for name in parse_mix(config.tasks):
        task = TASKS[name]
        questions = held_out_questions(task, config.eval_questions)
        trajectories = sample_trajectories(
            model, tokenizer, [q.question for q in questions],
            lambda index, answer, task=task, asked=questions: task.check(asked[index].question, answer),
            samples=1, max_cycles=EVAL_CYCLES, generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
        rights: defaultdict[int, list[bool]] = defaultdict(list)
        by_level: defaultdict[int, list[bool]] = defaultdict(list)
        for trajectory in trajectories:
            by_level[task.level(questions[trajectory.question].question)].append(trajectory.cycles[0].is_right)
            for depth, cycle in enumerate(trajectory.cycles):
                rights[depth].append(cycle.is_right)
        by_cycle = [_share(r) for r in rights.values()]
        figures[name] = {
            "questions": len(questions), "accuracy": by_cycle[0], "accuracy_by_cycle": by_cycle,
            "accuracy_by_level": {level: _share(by_level[level]) for level in sorted(by_level)},
        }  # fmt: skip
    return figures


def _share(rights: list[bool]) -> float:
    return round(sum(rights) / len(rights), 4)


def save(output: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Write a bf16 checkpoint; the live model stays fp32."""
    copy = deepcopy(model)
    cast_to(copy, torch.bfloat16)
    save_checkpoint(output, copy, tokenizer, record)
