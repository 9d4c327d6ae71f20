"""vLLM logits processor: the shortest JSON that a grammar allows.

The bundled model never learned JSON. Where a schema allows white space, further properties or further tool calls, it
writes them without end."""

from collections.abc import Callable

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

BIAS = 100.0  # finite, so what the grammar demands stays possible


class ShortJson(AdapterLogitsProcessor):
    """Avoid white space and prefer closing brackets while a grammar holds; thoughts are not touched."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        texts = [tokenizer.decode([token_id]) for token_id in range(tokenizer.vocab_size)]
        self._blank = [token_id for token_id, text in enumerate(texts) if text.isspace()]
        self._closing = [token_id for token_id, text in enumerate(texts) if text in ("}", "]")]

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        return self._biased if params.structured_outputs is not None else None

    def _biased(self, _: list[int], logits: torch.Tensor) -> torch.Tensor:
        if torch.isneginf(logits).any():  # the grammar has excluded tokens
            logits[self._blank] -= BIAS
            logits[self._closing] += BIAS
        return logits
