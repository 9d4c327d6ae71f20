"""Completions of many prompts at temperature 1, by transformers or by vLLM in this process."""

import gc
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from rtap_core.errors import ConfigError
from rtap_training.config.settings import SamplerKind
from rtap_training.rl.lockstep import Completion, Request

_CPU_CACHE_BYTES = 2**30


class Sampler(Protocol):
    """A sampling backend."""

    def seed(self, seed: int) -> None:
        """Begin a sequence of calls that is reproducible for ``seed``."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Each request up to and including an end token, or to its limit, with log-probabilities."""
        ...

    def close(self) -> None:
        """Free its resources."""
        ...


def sampler_kind(wanted: SamplerKind) -> SamplerKind:
    """Resolve ``auto`` without importing vLLM. Raises ConfigError if vLLM is requested but cannot be used."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted is SamplerKind.VLLM and not has_vllm:
        raise ConfigError("sampler=vllm needs vLLM: install rtap[cpu] or rtap[cuda], or use sampler=transformers")
    kind = wanted
    if wanted is SamplerKind.AUTO:
        kind = SamplerKind.VLLM if has_vllm and torch.cuda.is_available() else SamplerKind.TRANSFORMERS
    if kind is SamplerKind.VLLM and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "vLLM samples in a single process: sample with `rtap eval --policies single --samples N` first, and give "
            "its samples.jsonl as samples_file"
        )
    return kind


class TransformersSampler:
    """Batches of ``batch_rows`` prompts of similar length. Equal prompts are read once, and rows that end leave.

    load: returns the model; called at first use, because all samples may be kept already."""

    def __init__(self, load: Callable[[], PreTrainedModel], end_ids: frozenset[int], *, batch_rows: int) -> None:
        self._load, self._end_ids, self._batch_rows = load, end_ids, batch_rows
        self._model: PreTrainedModel | None = None
        self._seed = 0
        self._random: torch.Generator | None = None

    def seed(self, seed: int) -> None:
        """One random state over all batches."""
        self._seed, self._random = seed, None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See ``Sampler``."""
        if self._model is None:
            self._model = self._load().eval()
        if self._random is None:
            self._random = torch.Generator(self._model.device).manual_seed(self._seed)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        written: dict[int, Completion] = {}
        for start in tqdm(range(0, len(order), self._batch_rows), desc="sampling", unit="batch", leave=False):
            rows = order[start : start + self._batch_rows]
            sampled = sample_until(self._model, [requests[i] for i in rows], self._end_ids, random=self._random)
            written |= dict(zip(rows, sampled, strict=True))
        return [written[i] for i in range(len(requests))]

    def close(self) -> None:
        """Free the model."""
        self._model = None
        gc.collect()


@torch.inference_mode()
def sample_until(
    model: PreTrainedModel, requests: Sequence[Request], end_ids: frozenset[int], *, random: torch.Generator | None
) -> list[Completion]:
    """Complete each request up to and including an end token, or to its limit. Greedy without ``random``."""
    device, run = model.device, cast(Any, model)
    places = {ids: place for place, ids in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in requests))}
    width = max(map(len, places))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in places], device=device)  # (B, T), left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in places], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    written = [Completion([], []) for _ in requests]
    rows = list(range(len(requests)))
    keep = [places[tuple(r.prompt_ids)] for r in requests]
    for step in range(max(r.max_tokens for r in requests)):
        logits = run(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        if step == 0:
            logits, mask, positions = _select(keep, cache, logits, mask, positions)
        logps = logits.float().log_softmax(-1)  # (B, V)
        chosen = logps.argmax(-1) if random is None else torch.multinomial(logps.exp(), 1, generator=random)[:, 0]
        values = logps.gather(-1, chosen[:, None])[:, 0]
        for row, token, value in zip(rows, chosen.tolist(), values.tolist(), strict=True):
            completion = written[row]
            completion.ids.append(token)
            assert completion.logps is not None
            completion.logps.append(value)
        keep = [
            place
            for place, row in enumerate(rows)
            if written[row].ids[-1] not in end_ids and len(written[row].ids) < requests[row].max_tokens
        ]
        if not keep:
            break
        if len(keep) < len(rows):
            rows = [rows[place] for place in keep]
            chosen, mask, positions = _select(keep, cache, chosen, mask, positions)
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return written


def _select(keep: list[int], cache: DynamicCache, *tensors: Tensor) -> list[Tensor]:
    """Select the rows ``keep`` (in order, repeats allowed) of the tensors and, in place, of the cache."""
    index = torch.tensor(keep, device=tensors[0].device)
    cache.batch_select_indices(index)
    return [t[index] for t in tensors]


class VllmSampler:
    """Offline vLLM engine in this process, started at first use. Killing the process ends the engine too.

    max_length: tokens of the longest prompt with its completion."""

    def __init__(self, model: str, end_ids: frozenset[int], *, max_length: int, threads: int) -> None:
        self._model, self._end_ids = model, end_ids
        self._max_length, self._threads = max_length, threads
        self._random = Random(0)
        self._llm: Any = None

    def seed(self, seed: int) -> None:
        """One seed per sample."""
        self._random = Random(seed)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See ``Sampler``; requests of equal prompts and limits are one with several samples."""
        if self._llm is None:
            self._llm = self._start()
        from vllm import SamplingParams

        counts = Counter((tuple(r.prompt_ids), r.max_tokens) for r in requests)
        seed = self._random.getrandbits(40)
        parameters: list[Any] = []
        for (_, max_tokens), count in counts.items():
            limits: dict[str, Any] = {"stop_token_ids": sorted(self._end_ids), "detokenize": False, "logprobs": 0}
            parameters.append(SamplingParams(n=count, seed=seed, temperature=1.0, max_tokens=max_tokens, **limits))
            seed += count  # vLLM gives sample i of a request the seed + i
        prompts = [{"prompt_token_ids": list(ids)} for ids, _ in counts]
        outputs: list[Any] = self._llm.generate(prompts, parameters, use_tqdm=False)
        found = {key: list(output.outputs) for key, output in zip(counts, outputs, strict=True)}
        return [_completion(found[tuple(r.prompt_ids), r.max_tokens].pop()) for r in requests]

    def _start(self) -> Any:
        """Start vLLM with the server's CPU settings (``rtap_server/engine/loading.py``)."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        defaults = {
            "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self._threads),
        }  # fmt: skip
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.platforms import current_platform

        options: dict[str, Any] = {"max_model_len": self._max_length}
        if current_platform.is_cpu():
            options |= {
                "enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False,
                "kv_cache_memory_bytes": _CPU_CACHE_BYTES,
            }  # fmt: skip
        return LLM(self._model, **options)

    def close(self) -> None:
        """Free the engine's memory and its process group."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def _completion(sample: Any) -> Completion:
    ids = list(sample.token_ids)
    return Completion(ids, [entry[token].logprob for token, entry in zip(ids, sample.logprobs, strict=True)])
