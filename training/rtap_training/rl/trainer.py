"""Subclass of TRL's GRPOTrainer with recursive rollouts, their rewards and the TRRD ratio.

Sampling, buffering, accumulation, distribution, checkpoints and logging are TRL's and accelerate's. ``rl/trl.py`` lists
the TRL internals in use, and a contract test checks them. Formulas are in ``losses.py`` and ``rewards.py``.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig

from rtap_training.config.rl import RlConfig
from rtap_training.events import Sample
from rtap_training.losses import advantage_shares, group_advantages, sequence_mean
from rtap_training.models.online_generator import LabelledCycle, labelled_cycles
from rtap_training.rl import figures
from rtap_training.rl.batches import distinct_rows, forward_by_length
from rtap_training.rl.checkpoints import last_checkpoint
from rtap_training.rl.components import RunComponents
from rtap_training.rl.lockstep import Completion, Request
from rtap_training.rl.messages import Messages, extend, last_text
from rtap_training.rl.objective import needs_teacher, objective
from rtap_training.rl.reward_functions import reward_functions
from rtap_training.rl.rollouts import Rollout, RolloutQuestion, roll_out
from rtap_training.rl.rounds import Rounds
from rtap_training.rl.trl import GRPOTrainer
from rtap_training.run_state import mark_complete
from rtap_training.training_errors import TeacherError, TrainingError

GENERATOR_FILE = "generator.pt"
LENGTHS = 4  # forward passes per micro batch, sorted by length
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "num_tiles", "pixel_attention_mask", "spatial_shapes",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class RecursiveTrainer(GRPOTrainer):
    """GRPO on recursive trajectories under one of the four objectives."""

    def __init__(self, *, config: RlConfig, components: RunComponents, args: GRPOConfig, **kwargs: Any) -> None:
        self.config = config
        self.components = components
        self._rewards = torch.zeros(0)
        self._inputs: list[dict[str, Any]] = []
        self.samples: list[Sample] = []  # of this process's newest generation
        super().__init__(
            args=args,
            reward_funcs=reward_functions(config, components.dialect),
            rollout_func=self._roll_out,
            **kwargs,
        )
        # Generation stops at the end of a cycle or of the turn.
        self.eos_token_ids = sorted(components.dialect.end_of_turn_ids | components.dialect.cycle_end_ids)
        if self.use_vllm:
            self.vllm_generation.generation_kwargs["stop_token_ids"] = self.eos_token_ids
        else:
            self.generation_config.eos_token_id = self.eos_token_ids

    # Rollouts. TRL passes one entry per row, grouped by question.

    def _roll_out(self, prompts: list[Messages], trainer: GRPOTrainer) -> dict[str, Any]:
        del trainer
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        asked = [self._ask(x["row"], list(ids)) for x, ids in zip(self._inputs, prompt_ids, strict=True)]
        rounds = Rounds(
            lambda requests: self._generate_batch(requests, prompts),
            self._largest,
            spare=Request(0, asked[0].prompt_ids, 1),
            same_size=self.use_vllm,
        )
        is_collective = self.accelerator.num_processes > 1 and (self.use_vllm or self._is_sharded())
        rollouts = roll_out(
            asked,
            rounds if is_collective else rounds.generate,
            self.components.dialect,
            max_cycles=self.config.max_cycles,
            max_tokens=self.config.max_tokens,
            max_cycle_tokens=self.config.max_cycle_tokens or None,
        )
        if is_collective:
            rounds.finish()
        is_trained = self.config.boundary_advantage > 0
        fields: dict[str, Any] = {
            "prompt_ids": [r.prompt_ids for r in rollouts],
            "completion_ids": [r.completion_ids for r in rollouts],
            "logprobs": [r.logps for r in rollouts] if self.use_vllm else None,
            "env_mask": [[int(is_trained or not b) for b in r.is_boundary] for r in rollouts],
            "rollout": rollouts,
            "confidences": self._confidences(rollouts),
        }
        if (
            self.components.generator is not None and self.model.training
        ):  # learns after scoring, before the policy (alg. 1)
            cycles = cast(list[LabelledCycle], gather_object(labelled_cycles(rollouts)))
            loss = self.components.generator.update(
                cycles, rank=self.accelerator.process_index, num_processes=self.accelerator.num_processes
            )
            if loss is not None:
                self._log_metric("generator/loss", loss)
        return fields

    def _ask(self, row: int, prompt_ids: list[int]) -> RolloutQuestion:
        """Identify questions by row, because several images may share a text."""
        return RolloutQuestion(str(row), prompt_ids, lambda answer: self.components.check(row, answer))

    def _is_sharded(self) -> bool:
        """True if a forward pass is a collective call. Marks FSDP2 models, which transformers does not detect."""
        if self.accelerator.is_fsdp2:
            policy: Any = self.model
            policy._is_fsdp_managed_module = True
            if isinstance(policy, PeftModel):  # generates with the model inside
                cast(Any, policy.get_base_model())._is_fsdp_managed_module = True
        return self.accelerator.distributed_type in ("FSDP", "DEEPSPEED")

    def _largest(self, values: Sequence[int]) -> list[int]:
        local = torch.tensor([values], device=self.accelerator.device)
        return self.accelerator.gather(local).amax(dim=0).tolist()

    def _generate_batch(self, requests: Sequence[Request], prompts: list[Messages]) -> list[Completion]:
        """Generate with TRL's single-turn generation; each row is truncated at its limit."""
        limit = max(r.max_tokens for r in requests)
        if self.use_vllm:
            self.vllm_generation.max_completion_length = limit
        else:
            self.generation_config.max_new_tokens = limit
        ids = [r.prompt_ids for r in requests]
        images, fields = None, cast(dict[str, Any], {})
        if self._is_vlm:  # pixels of these rows, and per-token fields padded to the current lengths
            _, images, fields = self._tokenize_prompts([prompts[r.row] for r in requests])
            fields = {name: extend(value, ids) for name, value in fields.items()}
        completions, logps = self._generate_single_turn(ids, images, fields, 1)
        return [
            Completion(list(row[: r.max_tokens]), None if logps is None else list(logps[i][: r.max_tokens]))
            for i, (r, row) in enumerate(zip(requests, completions, strict=True))
        ]

    def _confidences(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Confidence of every cycle of every row; 0 for a truncated cycle."""
        if self.components.generator is None:
            return [[] for _ in rollouts]
        rows = [(*r.prompt_ids, *c.ids) for r in rollouts for c in r.cycles if c.answer is not None]
        scores = iter(self.components.generator.score(rows))
        return [[next(scores) if c.answer is not None else 0.0 for c in r.cycles] for r in rollouts]

    # Rewards and advantages.

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards (rows of all processes, rewards); their sums are kept for the advantages."""
        result = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = result.sum(dim=1)
        shares = cast(list[float], advantage_shares(result, self._group_size).tolist())
        for name, share in zip(self.config.reward_names, shares, strict=True):
            if not math.isnan(share):
                self._log_metric(f"advantage_share/{name}", share)
        rollouts, confidences = [x["rollout"] for x in inputs], [x["confidences"] for x in inputs]
        self._log_rollouts(rollouts, confidences)
        self.samples = figures.samples_of([last_text(x["prompt"]) for x in inputs], rollouts, confidences)
        return result

    @property
    def _group_size(self) -> int:
        """Rollouts a question."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _log_rollouts(self, rollouts: Sequence[Rollout], confidences: Sequence[Sequence[float]]) -> None:
        """Log metrics of the rollouts of all processes."""
        sums = figures.sums_of(rollouts, confidences)
        totals = dict(zip(sums, self._sum_over_processes(list(sums.values())), strict=True))
        for name, value in figures.means_of(totals, has_generator=self.components.generator is not None).items():
            self._log_metric(name, value)

    def _sum_over_processes(self, values: Sequence[float | Tensor]) -> list[float]:
        local = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.accelerator.device) for v in values])
        return cast(list[float], self.accelerator.reduce(local, reduction="sum").tolist())

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with our advantages, (B, T) if boundaries are trained, and the teacher's log-probabilities."""
        self._inputs = inputs  # TRL passes only the prompts to the rollout function
        output = super()._generate_and_score_completions(inputs)
        everyone = group_advantages(self._rewards, self._group_size)
        first = self.accelerator.process_index * len(inputs)
        advantages = everyone[first : first + len(inputs)]
        if self.config.boundary_advantage > 0:
            rows = [cast(Rollout, x["rollout"]).is_boundary for x in inputs]
            is_boundary = torch.zeros(output["completion_ids"].shape, dtype=torch.bool, device=advantages.device)
            for index, row in enumerate(rows):
                is_boundary[index, : len(row)] = torch.tensor(row)
            spread = advantages[:, None].expand(is_boundary.shape)
            advantages = torch.where(is_boundary, self.config.boundary_advantage, spread)
            output["is_boundary"] = is_boundary
        output["advantages"] = advantages
        if self.components.teacher is not None:
            output["teacher_per_token_logps"] = self._teacher_logps(output)
        return output

    def _teacher_logps(self, output: dict[str, Any]) -> Tensor:
        """Teacher log-probabilities, computed once per generation; NaN in rows that do not need them.

        Rows of equal tokens are scored once.
        """
        assert self.components.teacher is not None
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        used = output["completion_mask"].bool()
        needed = needs_teacher(self.config, output["advantages"], _trained_tokens(output)).nonzero()[:, 0]
        firsts, kinds = distinct_rows(ids[needed], mask[needed])
        scored, rows = self._sum_over_processes([firsts.numel(), ids.size(0)])
        self._mode_metrics["teacher/scored"].append(scored / rows)
        result = torch.full(used.shape, math.nan, device=ids.device)
        if firsts.numel():
            distinct = needed[firsts]
            logps = self.components.teacher.logps(ids[distinct], mask[distinct], used.size(1))
            if not torch.isfinite(logps[used[distinct]]).all():
                raise TeacherError("the teacher returned log-probabilities that are not finite")
            result[needed] = torch.where(used[needed], logps[kinds], 0.0)
        return result

    def log_probs(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Log-probabilities (B, T) of the last T = ``keep`` tokens under any model with TRL's fused head."""
        return self._get_per_token_logps_and_entropies(model, ids, mask, keep, self.args.per_device_train_batch_size)[0]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's method, batched by length. Old policy, reference, teacher and update all use it."""
        rows = batch_size or input_ids.size(0)
        if any(value is not None for value in kwargs.values()):  # image tensors are not split by row
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        if self.accelerator.num_processes == 1:  # more passes would gather sharded weights more often
            rows = max(1, rows // LENGTHS)

        def forward(ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
            logps, entropies, _ = super(RecursiveTrainer, self)._get_per_token_logps_and_entropies(
                model, ids, mask, width, None, compute_entropy
            )
            return logps, entropies

        return *forward_by_length(forward, input_ids, attention_mask, logits_to_keep, rows=rows), None

    # The objective.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The method's objective: mean over sequences of token means."""
        completion_mask = inputs["completion_mask"]
        mask = _trained_tokens(inputs)
        logp, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            completion_mask.size(1),
            compute_entropy=True,
            **{name: inputs[name] for name in _MULTIMODAL if name in inputs},
        )
        per_token, metrics = objective(self.config, logp, inputs, mask, step=self.state.global_step)
        if entropies is not None:
            metrics["entropy"] = entropies
        loss = sequence_mean(per_token, mask)
        everywhere = self._record(metrics, mask, loss)
        if not math.isfinite(everywhere):  # raise in every process, so that none hangs
            raise TrainingError(
                f"the loss is {everywhere} at update {self.state.global_step + 1}; {self._last_good()}. Try a lower "
                "learning_rate"
            )
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss

    def _record(self, metrics: dict[str, Tensor], mask: Tensor, loss: Tensor) -> float:
        """Log means over the tokens of all processes that have a value (not NaN); return the sum of their losses."""
        names = sorted(metrics)
        values = [torch.where(mask.bool(), metrics[name].detach().float(), torch.nan) for name in names]
        sums, counts = [v.nansum() for v in values], [(~v.isnan()).sum() for v in values]
        losses, *totals = self._sum_over_processes([loss.detach(), *sums, *counts])
        for name, total, count in zip(names, totals[: len(names)], totals[len(names) :], strict=True):
            if count:
                self._mode_metrics[name].append(total / count)
        return losses

    @property
    def _mode_metrics(self) -> dict[str, list[float]]:
        """TRL's metrics of training or evaluation, for values that are equal in all processes."""
        return self._metrics["train" if self.model.training else "eval"]

    def _last_good(self) -> str:
        last = last_checkpoint(Path(cast(str, self.args.output_dir)))
        return f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"

    # Checkpoints: TRL's, the generator, and a file that marks the checkpoint as complete.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its random state
            if not self.is_world_process_zero():
                return
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if self.components.generator is not None:
                torch.save(self.components.generator.state_dict(), folder / GENERATOR_FILE)
            mark_complete(folder, self.components.record())
        except (OSError, RuntimeError) as error:  # torch.save and safetensors raise RuntimeError on a full disk
            raise TrainingError(f"cannot save update {self.state.global_step}: {error}; {self._last_good()}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.components.generator is not None:
            state = torch.load(Path(checkpoint) / GENERATOR_FILE, map_location="cpu", weights_only=True)
            self.components.generator.load_state_dict(state)


def _trained_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Mask (B, T) of the tokens that are trained: no padding, and no boundaries unless they have an advantage."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
