"""Batched sampling of Think–Answer cycles, on transformers or vLLM.

Cycles continue on token ids, as in the server. After a wrong cycle the next one is forced open, because a policy that
believes its wrong answer ends the turn. For the bundled models on a CPU the transformers loop is faster and starts at
once; vLLM is for GPUs and larger policies.
"""

import gc
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP, parse_cycle
from rtap_training.bundled.tokenizer import render_prompt
from rtap_training.config import SamplerKind
from rtap_training.huggingface import decode_ids, encode_text, token_id
from rtap_training.tasks.trajectory import TURN_END, Message

MAX_CYCLE_TOKENS = 160
BATCH_ROWS = 512
_CPU_CACHE_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class SampledCycle:
    """One sampled cycle. answer: None if truncated. is_right: verdict of the answer checker."""

    ids: tuple[int, ...]
    answer: str | None
    is_right: bool


@dataclass(slots=True)
class Trajectory:
    """One sample of one question."""

    question: int
    prompt: list[int]
    cycles: list[SampledCycle] = field(default_factory=list[SampledCycle])
    is_open: bool = True

    def context(self, cycle_open: int) -> list[int]:
        """Prompt token ids of the next cycle."""
        ids = list(self.prompt)
        for cycle in self.cycles:
            ids += cycle.ids
        return [*ids, cycle_open] if self.cycles else ids


Check = Callable[[int, str], bool]
"""(question index, answer) -> True if right."""

Continue = Callable[[Sequence[list[int]], tuple[int, ...]], list[list[int]]]
"""(prompts, stop ids) -> completions, each up to and including a stop id, or MAX_CYCLE_TOKENS long."""


def encode_question(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Prompt ids of a single question."""
    return encode_text(tokenizer, render_prompt([Message("user", question)]))


def sample_trajectories(
    write: Continue,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    check: Check,
    *,
    samples: int,
    max_cycles: int,
    max_positions: int,
) -> list[Trajectory]:
    """Sample ``samples`` trajectories per question at temperature 1.

    A trajectory ends at the first right answer, after ``max_cycles``, or where another cycle may exceed the model's
    positions.
    """
    cycle_open = token_id(tokenizer, RTAP.cycle_open)
    stops = (token_id(tokenizer, RTAP.answer_close or ""), token_id(tokenizer, TURN_END))
    trajectories = [
        Trajectory(index, encode_question(tokenizer, question))
        for index, question in enumerate(questions)
        for _ in range(samples)
    ]
    for depth in range(max_cycles):
        live = [t for t in trajectories if t.is_open]
        written = write([t.context(cycle_open) for t in live], stops) if live else []
        for trajectory, ids in zip(live, written, strict=True):
            full = (cycle_open, *ids) if depth else tuple(ids)
            _, answer = parse_cycle(decode_ids(tokenizer, full), RTAP)
            is_right = answer is not None and check(trajectory.question, answer)
            trajectory.cycles.append(SampledCycle(full, answer, is_right))
            has_room = len(trajectory.context(cycle_open)) + MAX_CYCLE_TOKENS <= max_positions
            trajectory.is_open = answer is not None and not is_right and has_room
    return trajectories


class Sampler(Protocol):
    """A sampling backend."""

    def seeded(self, seed: int) -> Continue:
        """Function that generates completions, reproducible for ``seed``."""
        ...

    def close(self) -> None:
        """Free its resources."""
        ...


def sampler_kind(wanted: SamplerKind) -> SamplerKind:
    """Resolve ``auto`` without importing vLLM. Raises ConfigError if vLLM is requested but not installed."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted is SamplerKind.VLLM and not has_vllm:
        raise ConfigError("sampler=vllm needs vLLM: install rtap[cpu] or rtap[cuda], or use sampler=transformers")
    if wanted is not SamplerKind.AUTO:
        return wanted
    return SamplerKind.VLLM if has_vllm and torch.cuda.is_available() else SamplerKind.TRANSFORMERS


class TransformersSampler:
    """Batched sampling with transformers, in this process."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._model = model

    def seeded(self, seed: int) -> Continue:
        """Completions that share one random state over all batches."""
        generator = torch.Generator().manual_seed(seed)

        def write(prompts: Sequence[list[int]], stops: tuple[int, ...]) -> list[list[int]]:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            written: dict[int, list[int]] = {}
            for start in range(0, len(order), BATCH_ROWS):
                rows = order[start : start + BATCH_ROWS]
                sampled = sample_until(self._model, [prompts[i] for i in rows], stops, generator=generator)
                written |= dict(zip(rows, sampled, strict=True))
            return [written[i] for i in range(len(prompts))]

        return write

    def close(self) -> None:
        """No resources to free."""


class VllmSampler:
    """Offline vLLM engine in this process, started at first use. Killing the process ends the engine too."""

    def __init__(self, path: Path, *, threads: int) -> None:
        self._path = path
        self._threads = threads
        self._llm: Any = None

    def seeded(self, seed: int) -> Continue:
        """Completions with one seed per sample; equal prompts share a request."""
        random = Random(seed)

        def write(prompts: Sequence[list[int]], stops: tuple[int, ...]) -> list[list[int]]:
            counts = Counter(map(tuple, prompts))
            outputs = self._generate(counts, stops, first_seed=random.getrandbits(40))
            return [outputs[tuple(prompt)].pop() for prompt in prompts]

        return write

    def _generate(
        self, counts: Counter[tuple[int, ...]], stops: tuple[int, ...], *, first_seed: int
    ) -> dict[tuple[int, ...], list[list[int]]]:
        """``counts[prompt]`` completions of each prompt."""
        if self._llm is None:
            self._llm = self._start()
        from vllm import SamplingParams

        parameters: list[Any] = []
        for count in counts.values():
            limits: dict[str, Any] = {
                "max_tokens": MAX_CYCLE_TOKENS,
                "stop_token_ids": list(stops),
                "detokenize": False,
            }
            parameters.append(SamplingParams(n=count, seed=first_seed, temperature=1.0, **limits))
            first_seed += count  # vLLM gives sample i of a request the seed + i
        requests = [{"prompt_token_ids": list(prompt)} for prompt in counts]
        outputs: list[Any] = self._llm.generate(requests, parameters, use_tqdm=False)
        return {
            prompt: [list(sample.token_ids) for sample in output.outputs]
            for prompt, output in zip(counts, outputs, strict=True)
        }

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

        options: dict[str, Any] = {}
        if current_platform.is_cpu():
            options = {
                "enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False,
                "kv_cache_memory_bytes": _CPU_CACHE_BYTES,
            }  # fmt: skip
        return LLM(str(self._path), **options)

    def close(self) -> None:
        """Free the engine's memory and its process group."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.inference_mode()
def sample_until(
    model: Qwen3ForCausalLM,
    prompts: Sequence[list[int]],
    stops: tuple[int, ...],
    *,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Generate each prompt up to and including a stop id, or to the limit. Greedy without ``generator``."""
    # Samples of one question share a prompt: prefill it once, then repeat its KV cache.
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    width = max(map(len, places))
    ids = torch.tensor([[stops[-1]] * (width - len(p)) + list(p) for p in places])  # (B, T), left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in places])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows: list[int] = list(range(len(prompts)))
    keep = [places[tuple(p)] for p in prompts]
    for step in range(MAX_CYCLE_TOKENS):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        if step == 0:
            logits, mask, positions = _select(keep, cache, logits, mask, positions)
        chosen = _choose(logits, generator)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            outputs[row].append(token)
        keep = [i for i, row in enumerate(rows) if outputs[row][-1] not in stops]
        if not keep:
            break
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            chosen, mask, positions = _select(keep, cache, chosen, mask, positions)
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return outputs


def _select(keep: list[int], cache: DynamicCache, *tensors: Tensor) -> list[Tensor]:
    """Select the rows ``keep`` (in order, repeats allowed) of the tensors and, in place, of the cache."""
    index = torch.tensor(keep)
    cache.batch_select_indices(index)
    return [t[index] for t in tensors]


def _choose(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Next tokens: logits (B, V) -> (B,)."""
    if generator is None:
        return logits.argmax(-1)
    return torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
