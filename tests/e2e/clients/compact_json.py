"""vLLM logits processor: JSON under a grammar without free white space.

A grammar allows any amount of it, and the bundled model, which never learned JSON, writes it without end. vLLM's
``disable_any_whitespace`` does not reach the grammars of tool calls."""

from collections.abc import Callable

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

BIAS = -100.0  # a space that the grammar demands stays possible


class CompactJson(AdapterLogitsProcessor):
    """Lower the logits of white space in requests with a grammar."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self._ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isspace()]

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        return self._lowered if params.structured_outputs is not None else None

    def _lowered(self, _: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[self._ids] += BIAS
        return logits
