"""Cold start: train a policy from nothing on Think–Answer traces with honest arithmetic (``rtap train sft``)."""

import json
from collections import defaultdict
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from training.checkpoint import manifest, replacing, write_manifest
from training.config import SftConfig
from training.data import Batch, batches, conversation_text
from training.optim import Budget, build_adamw, schedule
from training.policy import MAX_POSITIONS, build_policy
from training.questions import held_out_questions
from training.rollout import sample_trajectories
from training.runtime import configure_torch
from training.tasks import TASKS
from training.tasks.trajectory import sample_conversation
from training.tokenizer import build_tokenizer

CORPUS_SIZE = 20_000
EVAL_CYCLES = 3


def task_weights(countdown_share: float) -> dict[str, float]:
    """Share of each task in the data."""
    return {"countdown": countdown_share, "arithmetic": 1 - countdown_share}


def policy_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the trained tokens; logits are computed for those only."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # (B, T, D)
    trained = batch.mask[:, 1:]
    logits: Tensor = model.lm_head(hidden[:, :-1][trained])
    return F.cross_entropy(logits, batch.ids[:, 1:][trained])


def run(config: SftConfig) -> dict[str, Any]:
    """Train, evaluate on held-out questions, save. Returns the figures of the manifest."""
    configure_torch(config.threads, config.seed)
    weights = task_weights(config.countdown_share)
    rng = Random(config.seed)
    corpus = [conversation_text(sample_conversation(TASKS, weights, rng))[0] for _ in range(CORPUS_SIZE)]
    tokenizer = build_tokenizer(corpus, vocab_size=config.vocab_size, max_length=MAX_POSITIONS)
    model = build_policy(config, tokenizer)
    log_path = config.output.parent / f"{config.output.name}.train.jsonl"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8", buffering=1) as log:
        training = train(model, tokenizer, config, log)
    figures = training | {"held_out": evaluate(model, tokenizer, config)}
    record = manifest(
        "rtap train sft", config, data="".join(corpus), seconds=training["seconds"], figures=figures
    ) | {"parameters": sum(p.numel() for p in model.parameters())}
    save(config.output, model, tokenizer, record)
    return figures


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: SftConfig, log: TextIO
) -> dict[str, Any]:
    """The loop. Snapshots go to ``OUTPUT.snapshot`` so that a kill costs minutes, never the published model."""
    optimiser = build_adamw(
        model.parameters(), learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    stream = batches(
        tokenizer, task_weights(config.countdown_share), seed=config.seed + 1, batch_tokens=config.batch_tokens
    )
    budget = Budget(config.minutes, config.max_steps)
    saved, num_tokens, num_rows, smooth = monotonic(), 0, 0, 0.0
    model.train()
    with tqdm(total=100, desc="sft", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while budget.progress < 1:
            batch = next(stream)
            factor = schedule(budget.progress, warmup_share=config.warmup_share)
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * factor
            loss = policy_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            budget.steps += 1
            num_tokens += batch.ids.numel()
            num_rows += len(batch.ids)
            smooth = loss.item() if budget.steps == 1 else 0.97 * smooth + 0.03 * loss.item()
            bar.set_postfix_str(f"loss {smooth:.4f}, step {budget.steps}, {num_tokens / budget.seconds:.0f} tok/s")
            bar.update(min(100.0, budget.progress * 100) - bar.n)
            if budget.steps % 20 == 0:
                row = {"step": budget.steps, "loss": smooth, "tokens": num_tokens, "seconds": round(budget.seconds, 1)}
                log.write(json.dumps(row) + "\n")
            if monotonic() - saved > config.save_minutes * 60:
                save(config.output.with_name(f".{config.output.name}.snapshot"), model, tokenizer, {"partial": True})
                saved = monotonic()
    return {
        "seconds": round(budget.seconds, 1), "steps": budget.steps, "tokens": num_tokens,
        "traces": num_rows, "loss": round(smooth, 4),
    }  # fmt: skip


def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: SftConfig) -> dict[str, Any]:
    """Held-out accuracy a task: the first cycle, and of each later cycle forced open after a wrong one."""
    model.eval()
    figures: dict[str, Any] = {}
    for name, task in TASKS.items():
        questions = held_out_questions(task, config.eval_questions)
        trajectories = sample_trajectories(
            model, tokenizer, [q.question for q in questions],
            lambda index, answer, task=task, asked=questions: task.check(asked[index].question, answer),
            samples=1, max_cycles=EVAL_CYCLES, generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
        rights: defaultdict[int, list[bool]] = defaultdict(list)
        for trajectory in trajectories:
            for depth, cycle in enumerate(trajectory.cycles):
                rights[depth].append(cycle.is_right)
        by_cycle = [round(sum(r) / len(r), 4) for r in rights.values()]
        figures[name] = {"questions": len(questions), "accuracy": by_cycle[0], "accuracy_by_cycle": by_cycle}
    return figures


def save(output: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Write a bf16 checkpoint; the live model stays fp32."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    with replacing(output) as folder:
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_manifest(folder, record)
