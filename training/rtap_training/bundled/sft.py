"""Cold start: train a policy from random weights on synthetic Think–Answer traces (``rtap train demo-sft``)."""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_core.errors import ConfigError
from rtap_training.bundled.architecture import MAX_POSITIONS, build_policy
from rtap_training.bundled.config import SftConfig
from rtap_training.bundled.data import Batch, batches, conversation_text
from rtap_training.bundled.held_out import HeldOutTrajectories, show_held_out
from rtap_training.bundled.loop import Loop
from rtap_training.bundled.tokenizer import PAD, TAGS, TURN_START, build_tokenizer
from rtap_training.checkpoint import manifest, sha256
from rtap_training.config import run_dir
from rtap_training.huggingface import cast_to, load_policy, load_tokenizer, save_checkpoint
from rtap_training.optim import build_muon
from rtap_training.parallel import rank, run_processes
from rtap_training.questions import held_out_questions
from rtap_training.rollout import TransformersSampler, sample_trajectories
from rtap_training.run_state import States, check_resumable, plain
from rtap_training.runtime import configure_torch
from rtap_training.tasks import TASKS, parse_mix
from rtap_training.tasks.trajectory import TURN_END, sample_conversation

CORPUS_SIZE = 20_000  # conversations that train the tokenizer
DIGEST_SIZE = 1_000  # conversations that identify the endless data in manifests and states
EVAL_CYCLES = 3


def policy_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the trained tokens. Only their logits are computed."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # (B, T, D)
    trained = batch.mask[:, 1:]
    logits: Tensor = model.lm_head(hidden[:, :-1][trained])
    return F.cross_entropy(logits, batch.ids[:, 1:][trained])


def run(config: SftConfig) -> None:
    """Train in all processes; rank 0 evaluates on held-out questions, saves, and prints the metrics.

    Resumes from the run's last state.
    """
    check_resumable(config.output, config)
    run_processes(_work, config.processes, config)


def _work(config: SftConfig) -> None:
    configure_torch(config.threads, config.seed)
    model, tokenizer = _start(config)
    data = "".join(sample_texts(config, DIGEST_SIZE))
    states = States(run_dir(config.output), plain(config), data_sha256=sha256(data))
    training = train(model, tokenizer, config, states)
    if rank() != 0:
        return
    turns = write_held_out(model, tokenizer, tasks=config.tasks, count=config.eval_questions, seed=config.seed)
    show_held_out(config.output, training["steps"], turns, tokenizer)
    figures = training | {"held_out": held_out_figures(turns)}
    record = manifest("rtap train demo-sft", config, data=data, seconds=training["seconds"], figures=figures) | {
        "parameters": sum(p.numel() for p in model.parameters())
    }
    save(config.output, model, tokenizer, record)
    states.remove()
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def _start(config: SftConfig) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Initial model and tokenizer. Raises ConfigError for an unsuitable checkpoint."""
    if config.initial is not None:
        return load_policy(config.initial)
    if config.tokenizer is not None:
        tokenizer = load_complete_tokenizer(config.tokenizer)
    else:
        corpus = sample_texts(config, CORPUS_SIZE)
        tokenizer = build_tokenizer(corpus, vocab_size=config.vocab_size, max_length=MAX_POSITIONS)
    return build_policy(config, tokenizer), tokenizer


def sample_texts(config: SftConfig, count: int) -> list[str]:
    """Text of ``count`` sampled conversations."""
    weights, rng = parse_mix(config.tasks), Random(config.seed)
    return [conversation_text(sample_conversation(TASKS, weights, rng))[0] for _ in range(count)]


def load_complete_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a checkpoint. Raises ConfigError unless it has all tokens of turns and cycles."""
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path} has no tokenizer (no tokenizer.json); name a checkpoint of `rtap train demo-sft`")
    tokenizer = load_tokenizer(path)
    known = tokenizer.get_vocab()
    missing = [token for token in (PAD, TURN_START, TURN_END, *TAGS) if token not in known]
    if missing:
        raise ConfigError(
            f"the tokenizer of {path} lacks the tokens {' '.join(missing)}; name a checkpoint of `rtap train demo-sft`"
        )
    return tokenizer


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: SftConfig, states: States
) -> dict[str, Any]:
    """Train from the last state, if any. Every process has its own stream of traces."""
    optimisers = build_muon(
        model.named_parameters(),
        matrix_rate=config.matrix_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    seed = (config.seed + 1) * 1000 + rank()
    stream = batches(tokenizer, parse_mix(config.tasks), seed=seed, batch_tokens=config.batch_tokens)
    model.train()
    with Loop("sft", config, states, model=model, optimisers=optimisers, stream=stream) as loop:
        while loop.should_continue():
            batch = next(stream)
            loop.descend(policy_loss(model, batch), rows=len(batch.ids), tokens=batch.ids.numel())
    return loop.summary()


def write_held_out(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, tasks: str, count: int, seed: int
) -> dict[str, HeldOutTrajectories]:
    """One trajectory on each of ``count`` held-out questions per task. A wrong cycle is followed by another."""
    model.eval()
    turns: dict[str, HeldOutTrajectories] = {}
    for name in parse_mix(tasks):
        questions = [q.question for q in held_out_questions(TASKS[name], count)]
        trajectories = sample_trajectories(
            TransformersSampler(model).seeded(seed), tokenizer, questions,
            lambda index, answer, task=TASKS[name], asked=questions: task.check(asked[index], answer),
            samples=1, max_cycles=EVAL_CYCLES, max_positions=MAX_POSITIONS,
        )  # fmt: skip
        turns[name] = HeldOutTrajectories(questions, trajectories)
    return turns


def held_out_figures(turns: Mapping[str, HeldOutTrajectories]) -> dict[str, Any]:
    """Accuracy per task: first cycle (also by level), and each later cycle among the questions that reached it."""
    figures: dict[str, Any] = {}
    for name, part in turns.items():
        rights: defaultdict[int, list[bool]] = defaultdict(list)
        by_level: defaultdict[int, list[bool]] = defaultdict(list)
        for trajectory in part.trajectories:
            level = TASKS[name].level(part.questions[trajectory.question])
            by_level[level].append(trajectory.cycles[0].is_right)
            for depth, cycle in enumerate(trajectory.cycles):
                rights[depth].append(cycle.is_right)
        by_cycle = [_share(r) for r in rights.values()]
        figures[name] = {
            "questions": len(part.questions), "accuracy": by_cycle[0], "accuracy_by_cycle": by_cycle,
            "accuracy_by_level": {level: _share(by_level[level]) for level in sorted(by_level)},
        }  # fmt: skip
    return figures


def _share(rights: list[bool]) -> float:
    return round(sum(rights) / len(rights), 4)


def save(output: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Save a bf16 copy; the model itself stays fp32."""
    copy = deepcopy(model)
    cast_to(copy, torch.bfloat16)
    save_checkpoint(output, copy, tokenizer, record)
