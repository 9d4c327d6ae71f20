"""Typed subset of TRL's GRPOTrainer that we use; at run time it is TRL's class.

Most of these names are private. tests/training/test_trl_contract.py checks each signature against the installed TRL
(pinned to 1.16).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import (
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
        TrainerState,
    )
    from trl.trainer.grpo_config import GRPOConfig

    class GRPOTrainer:
        """The members of TRL 1.16's trainer that we use."""

        # Attributes set by __init__. The types of accelerator are unknown.
        model: PreTrainedModel
        model_wrapped: Any
        args: GRPOConfig
        accelerator: Any
        state: TrainerState
        eos_token_ids: list[int]
        generation_config: GenerationConfig
        num_generations: int
        num_generations_eval: int
        current_gradient_accumulation_steps: int
        use_vllm: bool
        vllm_generation: Any
        _is_vlm: bool
        _metrics: dict[str, dict[str, list[float]]]

        def __init__(
            self,
            *,
            model: PreTrainedModel,
            reward_funcs: Sequence[Callable[..., list[float]]],
            args: GRPOConfig,
            train_dataset: Any,
            processing_class: PreTrainedTokenizerBase | ProcessorMixin,
            rollout_func: Callable[[list[list[dict[str, Any]]], Any], dict[str, Any]],
            callbacks: list[TrainerCallback] | None = None,
            peft_config: Any = None,
        ) -> None: ...

        # Called by us.
        def train(self, resume_from_checkpoint: str | None = None) -> Any: ...
        def add_callback(self, callback: TrainerCallback) -> None: ...
        def is_world_process_zero(self) -> bool: ...
        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]: ...
        def _generate_single_turn(
            self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], num_generations: int
        ) -> tuple[list[list[int]], list[list[float]] | None]: ...
        def _log_metric(self, name: str, value: float) -> None: ...
        def _get_output_dir(self, trial: Any) -> str: ...

        # Overridden by us.
        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Tensor,
            attention_mask: Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
        def _calculate_rewards(
            self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
        ) -> Tensor: ...
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]: ...
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor: ...
        def _save_checkpoint(self, model: Any, trial: Any) -> None: ...
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None: ...

else:
    from trl import GRPOTrainer

__all__ = ["GRPOTrainer"]
