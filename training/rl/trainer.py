"""TRL's GRPOTrainer with what the two papers add: recursive rollouts, their rewards, and the TRRD ratio.

Everything else (sampling, buffering, accumulation, distribution, checkpoints, logging) is TRL's and accelerate's. The
internals relied on are named in ``training/rl/trl.py``, which a contract test holds against the installed TRL. The
maths is in ``training/losses.py`` and ``training/rewards.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig

from training import rewards
from training.errors import TeacherError, TrainingError
from training.losses import (
    clipped_surrogate,
    group_advantages,
    is_clipped,
    kdrl_weight,
    kl_k2,
    kl_k3,
    sequence_mean,
    trrd_log_ratio,
)
from training.rl.config import Method, RlConfig
from training.rl.generator import OnlineGenerator
from training.rl.lockstep import Request, Written
from training.rl.rollouts import Asked, Dialect, Rollout, roll_out
from training.rl.teacher import Teacher
from training.rl.trl import GRPOTrainer

GENERATOR_FILE = "generator.pt"
COMPLETE_FILE = "complete.json"
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "num_tiles", "pixel_attention_mask", "spatial_shapes",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip

Messages = list[dict[str, Any]]


@dataclass(slots=True)
class Parts:
    """What a run has beside TRL. generator, teacher: None where the objective needs none.

    check: whether an answer to a question (its last user text) is right. record: text of ``complete.json``, which
    marks a checkpoint as whole.
    """

    dialect: Dialect
    check: Callable[[str, str], bool]
    generator: OnlineGenerator | None
    teacher: Teacher | None
    record: Callable[[], str]


class RecursiveTrainer(GRPOTrainer):
    """GRPO on recursive trajectories under one of the four objectives."""

    def __init__(self, *, config: RlConfig, parts: Parts, args: GRPOConfig, **kwargs: Any) -> None:
        self.config = config
        self.parts = parts
        self._rewards = torch.zeros(0)
        super().__init__(
            args=args,
            reward_funcs=reward_functions(config, parts.dialect),
            rollout_func=self._roll_out,
            **kwargs,
        )
        # Generation stops at the end of a cycle as well as at the end of the turn.
        self.eos_token_ids = sorted(parts.dialect.end_of_turn_ids | parts.dialect.cycle_end_ids)
        if self.use_vllm:
            self.vllm_generation.generation_kwargs["stop_token_ids"] = self.eos_token_ids
        else:
            self.generation_config.eos_token_id = self.eos_token_ids

    # Rollouts: called by TRL with one entry a row, rows of a question side by side.

    def _roll_out(self, prompts: list[Messages], trainer: GRPOTrainer) -> dict[str, Any]:
        del trainer
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        asked = [self._ask(messages, list(ids)) for messages, ids in zip(prompts, prompt_ids, strict=True)]
        rollouts = roll_out(
            asked,
            lambda requests: self._generate_batch(requests, prompts),
            self.parts.dialect,
            max_cycles=self.config.max_cycles,
            max_tokens=self.config.max_tokens,
            max_cycle_tokens=self.config.max_cycle_tokens or None,
        )
        is_trained = self.config.boundary_advantage > 0
        fields: dict[str, Any] = {
            "prompt_ids": [r.prompt_ids for r in rollouts],
            "completion_ids": [r.completion_ids for r in rollouts],
            "logprobs": [r.logps for r in rollouts] if self.use_vllm else None,
            "env_mask": [[int(is_trained or not b) for b in r.is_boundary] for r in rollouts],
            "rollout": rollouts,
            "confidences": self._confidences(rollouts),
        }
        if self.parts.generator is not None and self.model.training:  # learns after scoring, before the policy (alg. 1)
            loss = self.parts.generator.update(rollouts)
            if loss is not None:
                self._log_metric("generator/loss", loss)
        return fields

    def _ask(self, messages: Messages, prompt_ids: list[int]) -> Asked:
        question = last_user_text(messages)
        return Asked(question, prompt_ids, lambda answer: self.parts.check(question, answer))

    def _generate_batch(self, requests: Sequence[Request], prompts: list[Messages]) -> list[Written]:
        """TRL's own single-turn generation, whatever it runs on; each row cut at its own limit."""
        limit = max(r.max_tokens for r in requests)
        if self.use_vllm:
            self.vllm_generation.max_completion_length = limit
        else:
            self.generation_config.max_new_tokens = limit
        ids = [r.prompt_ids for r in requests]
        images, fields = None, cast(dict[str, Any], {})
        if self._is_vlm:  # pixels of just these rows, and per-token fields as long as what the rows hold by now
            _, images, fields = self._tokenize_prompts([prompts[r.row] for r in requests])
            fields = {name: _extend(value, ids) for name, value in fields.items()}
        completions, logps = self._generate_single_turn(ids, images, fields, 1)
        return [
            Written(list(row[: r.max_tokens]), None if logps is None else list(logps[i][: r.max_tokens]))
            for i, (r, row) in enumerate(zip(requests, completions, strict=True))
        ]

    def _confidences(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Of every cycle of every row; a cycle cut before its answer has none and counts as 0."""
        if self.parts.generator is None:
            return [[] for _ in rollouts]
        rows = [(*r.prompt_ids, *c.ids) for r in rollouts for c in r.cycles if c.answer is not None]
        scores = iter(self.parts.generator.score(rows))
        return [[next(scores) if c.answer is not None else 0.0 for c in r.cycles] for r in rollouts]

    # Rewards and advantages.

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """(rows of all processes, rewards), as TRL computes them; kept for the papers' advantages."""
        result = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = result.sum(dim=1)
        self._log_rollouts([x["rollout"] for x in inputs], [x["confidences"] for x in inputs])
        return result

    def _log_rollouts(self, rollouts: Sequence[Rollout], confidences: Sequence[Sequence[float]]) -> None:
        """Figures of a generation that no reward shows."""
        cycles = [c for r in rollouts for c in r.cycles]
        tokens = sum(len(c.ids) for c in cycles)
        self._log_metric("cycles/mean", len(cycles) / len(rollouts))
        self._log_metric("cycles/first_right", sum(r.cycles[0].is_right for r in rollouts) / len(rollouts))
        self._log_metric("cycles/right", sum(r.is_right for r in rollouts) / len(rollouts))
        self._log_metric("oops/per_rollout", sum(c.oops_tokens for c in cycles) / len(rollouts))
        self._log_metric("oops/per_1000_tokens", 1000 * sum(c.oops_tokens for c in cycles) / max(1, tokens))
        if self.parts.generator is not None:
            pairs = [
                (confidence, c.is_right)
                for r, row in zip(rollouts, confidences, strict=True)
                for confidence, c in zip(row, r.cycles, strict=True)
            ]
            self._log_metric("confidence/mean", sum(p for p, _ in pairs) / len(pairs))
            self._log_metric("confidence/brier", sum((p - y) ** 2 for p, y in pairs) / len(pairs))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with the papers' advantages, (B, T) where boundaries are trained, and the teacher's scores."""
        output = super()._generate_and_score_completions(inputs)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        everyone = group_advantages(self._rewards, group_size)
        first = self.accelerator.process_index * len(inputs)
        advantages = everyone[first : first + len(inputs)]
        if self.config.boundary_advantage > 0:
            rows = [cast(Rollout, x["rollout"]).is_boundary for x in inputs]
            is_boundary = torch.zeros(output["completion_ids"].shape, dtype=torch.bool, device=advantages.device)
            for index, row in enumerate(rows):
                is_boundary[index, : len(row)] = torch.tensor(row)
            spread = advantages[:, None].expand(is_boundary.shape)
            advantages = torch.where(is_boundary, self.config.boundary_advantage, spread)
        output["advantages"] = advantages
        if self.parts.teacher is not None:
            output["teacher_per_token_logps"] = self._teacher_logps(output)
        return output

    def _teacher_logps(self, output: dict[str, Any]) -> Tensor:
        """Once a generation, however often it is used."""
        assert self.parts.teacher is not None
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        keep = output["completion_ids"].size(1)
        size = self.args.per_device_train_batch_size
        starts = range(0, ids.size(0), size)
        logps = torch.cat([self.parts.teacher.logps(ids[i : i + size], mask[i : i + size], keep) for i in starts])
        used = output["completion_mask"].bool()
        if not torch.isfinite(logps[used]).all():
            raise TeacherError("the teacher gave log-probabilities that are not finite")
        return torch.where(used, logps, 0.0)

    def log_probs(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Log-probabilities (B, T) of the last T = ``keep`` tokens under any model with TRL's fused head."""
        return self._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]

    # The objective.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The clipped surrogate on the method's ratio plus its KL terms, sequence mean of token means."""
        completion_mask = inputs["completion_mask"]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        logp, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            completion_mask.size(1),
            compute_entropy=True,
            **{name: inputs[name] for name in _MULTIMODAL if name in inputs},
        )
        old = inputs.get("old_per_token_logps")
        old = logp.detach() if old is None else old
        log_ratio = self._log_ratio(logp, old, inputs)
        clip = {"clip_low": self.config.clip_low, "clip_high": self.config.clip_high}
        per_token = clipped_surrogate(log_ratio, inputs["advantages"], **clip)
        if "importance_sampling_ratio" in inputs:
            per_token = per_token * inputs["importance_sampling_ratio"]
        metrics = {"clip_ratio/region_mean": is_clipped(log_ratio, inputs["advantages"], **clip)}
        if entropies is not None:
            metrics["entropy"] = entropies
        if self.config.method is Method.KDRL:
            distance = kl_k2(logp, inputs["teacher_per_token_logps"])
            per_token = per_token + self._kdrl_weight() * distance
            metrics["kl_teacher"] = distance
        if self.config.beta > 0:
            distance = kl_k3(logp, inputs["ref_per_token_logps"])
            per_token = per_token + self.config.beta * distance
            metrics["kl"] = distance
        if self.parts.teacher is not None:
            gap = logp - inputs["teacher_per_token_logps"]
            metrics |= {"teacher/log_ratio": gap, "teacher/clamped": gap.abs() > self.config.teacher_clamp}
        loss = sequence_mean(per_token, mask)
        self._record(metrics, mask)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at update {self.state.global_step + 1}; {self._last_good()}. A lower "
                "learning_rate usually helps"
            )
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss

    def _log_ratio(self, logp: Tensor, old: Tensor, inputs: dict[str, Any]) -> Tensor:
        if self.config.method is not Method.RLAD:
            return logp - old
        return trrd_log_ratio(
            logp,
            old,
            inputs["teacher_per_token_logps"],
            alpha=self.config.alpha,
            teacher_clamp=self.config.teacher_clamp,
            clamp_gradient=self.config.clamp_gradient.value,
        )

    def _kdrl_weight(self) -> float:
        c = self.config
        return kdrl_weight(self.state.global_step, start=c.kdrl_start, end=c.kdrl_end, decay=c.kdrl_decay)

    def _record(self, metrics: dict[str, Tensor], mask: Tensor) -> None:
        """Token means over all processes."""
        names = sorted(metrics)
        sums = [(metrics[n].detach().float() * mask).sum() for n in names]
        stacked = torch.stack([*sums, mask.sum().float()])
        totals: list[float] = self.accelerator.reduce(stacked, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        for name, total in zip(names, totals, strict=False):
            self._metrics[mode][name].append(total / max(1.0, totals[-1]))

    def _last_good(self) -> str:
        last = last_checkpoint(Path(cast(str, self.args.output_dir)))
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    # Checkpoints: TRL's own, plus the generator, plus a file that says the rest is whole.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
            if not self.is_world_process_zero():
                return
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if self.parts.generator is not None:
                torch.save(self.parts.generator.state_dict(), folder / GENERATOR_FILE)
            partial = folder / f".{COMPLETE_FILE}"
            partial.write_text(self.parts.record(), "utf-8")
            partial.replace(folder / COMPLETE_FILE)
        except (OSError, RuntimeError) as error:  # torch.save and safetensors raise RuntimeError on a full disk
            raise TrainingError(f"cannot save update {self.state.global_step}: {error}; {self._last_good()}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.parts.generator is not None:
            state = torch.load(Path(checkpoint) / GENERATOR_FILE, map_location="cpu", weights_only=True)
            self.parts.generator.load_state_dict(state)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [p.parent for p in run_dir.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def last_user_text(messages: Messages) -> str:
    """The question of a conversation: text of its last user message."""
    content: Any = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    if isinstance(content, str):
        return content
    parts = cast(list[dict[str, Any]], content)
    return "".join(cast(str, part["text"]) for part in parts if part["type"] == "text")


RewardFunction = Callable[..., list[float]]


def reward_functions(config: RlConfig, dialect: Dialect) -> list[RewardFunction]:
    """The configured rewards in TRL's form: keyword columns in, one figure a row out."""

    def increase(*, confidences: list[list[float]], **_: Any) -> list[float]:
        return [rewards.confidence_increase(row) for row in confidences]

    def final(*, confidences: list[list[float]], **_: Any) -> list[float]:
        return [rewards.confidence_final(row, config.threshold) for row in confidences]

    def format(*, rollout: list[Rollout], **_: Any) -> list[float]:
        return [rewards.well_formed([c.text for c in r.cycles], dialect.format) for r in rollout]

    def answer(*, rollout: list[Rollout], **_: Any) -> list[float]:
        return [rewards.answer_reward(r.is_right) for r in rollout]

    def length(*, rollout: list[Rollout], **_: Any) -> list[float]:
        limits = {"max_tokens": config.max_tokens, "cache_tokens": config.length_cache}
        return [rewards.length_penalty(len(r.completion_ids), **limits) for r in rollout]

    known: dict[str, RewardFunction] = {f.__name__: f for f in (increase, final, format, answer, length)}
    return [known[name] for name in config.reward_names]


def _extend(value: Any, ids: Sequence[Sequence[int]]) -> Any:
    """Per-token fields of a processor, lengthened with 0 (text) over what has been written since."""
    rows: list[Any] = cast(list[Any], value) if isinstance(value, list) else []
    if not rows or not isinstance(rows[0], list):
        return cast(Any, value)
    return [[*row, *[0] * (len(i) - len(row))] for row, i in zip(rows, ids, strict=True)]
