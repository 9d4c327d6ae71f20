"""Expected peak memory of a training run (``rtap train COMMAND --estimate``), from the configs of its models.

Parameters are counted on torch's meta device: no weights and no questions are read. Parts with ``*`` are formulas:

- activations: elements that autograd saves for each token in a decoder's layer, all rows at the largest length;
- head: tiles of TRL's head (trl/kernels/chunked_logprob.py), and the gradient of its weight;
- gathered: FSDP holds what is in no layer and two layers, with their gradients;
- sampling: key-value cache of all rows of a generation at the largest length, and logits of their last tokens.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from rtap_core.adapters import is_adapter
from rtap_core.errors import ConfigError
from rtap_training.config.generator import GeneratorConfig
from rtap_training.config.rl import RlConfig
from rtap_training.config.sft import SftConfig
from rtap_training.generator import classifier_shape
from rtap_training.models.loading import freeze_vision, loading, lora_config
from rtap_training.models.online_generator import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, train_in_fp32
from rtap_training.rl.command import rows_of_a_process
from rtap_training.rl.trainer import LENGTHS
from rtap_training.supervised import accumulation_steps

PROMPT_TOKENS = 256  # assumed where a setting limits the answer alone
TILE_TOKENS, TILE_WIDTH, CPU_TILE_COPIES = 4096, 32768, 7
LOGIT_COPIES = 7  # transformers' penalty, top-k and nucleus
AUTOCAST_BYTES = 2.75  # an element on average: norms and rotations stay in fp32
Parts = dict[str, float]  # bytes by name


@dataclass(frozen=True, slots=True)
class Launch:
    """Device, number of processes, and number of those that FSDP shards the policy over."""

    is_gpu: bool = False
    processes: int = 1
    shards: int = 1


@dataclass(frozen=True, slots=True)
class MetaModel:
    """A model on the meta device, with its adapters. bf16: it computes in bfloat16."""

    model: Any
    bf16: bool

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def kept(self, name: str, shards: int = 1) -> Parts:
        """Bytes of the weights, and of AdamW's two fp32 states of what is trained."""
        weights = sum(p.nbytes for p in self.model.parameters())
        return {f"{name}: weights": weights / shards, f"{name}: AdamW": 8 * self.trained / shards}

    def gathered(self) -> float:
        """Bytes that FSDP gathers at most."""
        names = self.model._no_split_modules or ()  # accelerate's TRANSFORMER_BASED_WRAP wraps these
        layers = [sum(p.numel() for p in m.parameters()) for m in self.model.modules() if type(m).__name__ in names]
        held = self.total - sum(layers) + 2 * max(layers, default=0)
        return (2 if self.bf16 else 4) * held * (1 + self.trained / self.total)

    def activations(self, tokens: int, *, checkpointing: bool = False, is_sharded: bool = False) -> float:
        """Bytes saved for the backward pass of ``tokens``; checkpointing: one layer, and the inputs of all."""
        text, size = self.model.config.get_text_config(), AUTOCAST_BYTES if self.bf16 else 4
        hidden, (queries, pairs) = text.hidden_size, _attention_widths(text)
        experts = getattr(text, "num_experts_per_tok", None) or 0
        width = experts * getattr(text, "moe_intermediate_size", 0) or getattr(text, "intermediate_size", 4 * hidden)
        norms = [(name, p.requires_grad) for name, p in self.model.named_parameters() if "norm" in name]
        normed = 2 * hidden + (queries + pairs // 2) * any("q_norm" in name for name, _ in norms)
        per_norm = 3 if any(is_trained for _, is_trained in norms) else 2  # the gradient of its weight needs one more
        layer = per_norm * normed + 4 * queries + pairs + 4 * width + 2 * hidden * experts
        if checkpointing:
            return size * tokens * (layer + text.num_hidden_layers * hidden)
        casts = 2 * self.trained if self.bf16 and not is_sharded else 0  # autocast's copies; FSDP gathers bfloat16
        return size * tokens * text.num_hidden_layers * layer + casts

    def head(self, tokens: int, *, is_gpu: bool) -> float:
        """Bytes of TRL's head in its backward pass."""
        weight = self.model.get_output_embeddings().weight
        copies = 0 if is_gpu else CPU_TILE_COPIES * min(len(weight), TILE_WIDTH)
        return 4 * (min(tokens, TILE_TOKENS) * (TILE_WIDTH + copies) + weight.numel() * weight.requires_grad)

    def sampling(self, rows: int, length: int) -> float:
        """Bytes of the key-value cache and of the logits of the last tokens."""
        text = self.model.config.get_text_config()
        cache = (2 if self.bf16 else 4) * _attention_widths(text)[1] * text.num_hidden_layers * length
        return rows * (cache + LOGIT_COPIES * 4 * self.model.get_input_embeddings().num_embeddings)


def _attention_widths(text: Any) -> tuple[int, int]:
    """Elements of all query heads, and of all key and value heads, for one token in one layer."""
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * width, 2 * (getattr(text, "num_key_value_heads", None) or heads) * width


def run(config: SftConfig | GeneratorConfig | RlConfig, ranks: int) -> None:
    """Print the parts of the phase with the peak, and the sums of the other phases.

    ranks: processes that FSDP shards the policy over; 0: as launched. Raises ConfigError."""
    if ranks < 0:
        raise ConfigError(f"estimate={ranks} must be a number of processes, at least 1; without a number as launched")
    processes = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    is_fsdp = ranks > 0 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    launch = Launch(torch.cuda.is_available(), processes, processes if is_fsdp else 1)
    phases = estimate(config, launch)
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(sums, key=lambda name: sums[name])
    rows = [*phases[peak].items(), (f"peak, while {peak}", sums.pop(peak))]
    rows += [(f"(while {name})", size) for name, size in sums.items()]
    sys.stdout.write(f"{'part (* by formula)':<36}GiB a process\n")
    sys.stdout.writelines(f"{name:<36}{size / 2**30:>13.2f}\n" for name, size in rows)
    device = "GPU" if launch.is_gpu else "CPU"
    sys.stdout.write(f"{processes} processes on a {device}, policy sharded over {launch.shards}\n")


def estimate(config: SftConfig | GeneratorConfig | RlConfig, launch: Launch) -> dict[str, Parts]:
    """Parts of each phase of a run, in bytes of one process. Raises ConfigError."""
    if isinstance(config, RlConfig):
        return _rl_phases(config, launch)
    accumulation_steps(config, launch.processes)  # refuses what the run refuses
    if isinstance(config, GeneratorConfig):
        return _generator_phases(config, launch)
    model = _policy(config.policy, config.lora_rank, bf16=config.bf16)
    tokens = config.micro_batch * config.max_length
    return _policy_phases(config, launch, model, model.kept("policy", launch.shards), tokens, tokens)


def _generator_phases(config: GeneratorConfig, launch: Launch) -> dict[str, Parts]:
    if launch.shards > 1:
        raise ConfigError(f"estimate={launch.shards}: `rtap train generator` is not sharded; leave out the number")
    name = config.backbone or config.policy
    with loading(name):
        shape = classifier_shape(name, config.num_layers)
    adapters = lora_config(config.lora_rank, "SEQ_CLS") if config.lora_rank else None
    model = _on_meta(AutoModelForSequenceClassification, name, shape, adapters, bf16=config.bf16)
    kept = model.kept("generator")
    tokens = config.micro_batch * (PROMPT_TOKENS + config.max_cycle_tokens)
    active = model.activations(tokens, checkpointing=config.gradient_checkpointing)
    phases = {"updating": kept | _gradients("generator", model, launch) | {"generator: activations *": active}}
    if config.lora_rank:  # it is evaluated with the adapter in its weights
        phases["evaluating"] = kept | {"generator: merged": 4 * model.total}
    return phases


def _rl_phases(config: RlConfig, launch: Launch) -> dict[str, Parts]:
    rows, length = rows_of_a_process(config, launch.processes), PROMPT_TOKENS + config.max_tokens
    micro_batch = min(config.micro_batch, rows)
    model = _policy(config.policy, config.lora_rank, bf16=config.bf16)
    kept = model.kept("policy", launch.shards)
    if config.beta > 0 and not config.lora_rank:
        kept["reference: weights"] = kept["policy: weights"]
    if config.teacher is not None and not config.teacher.startswith(("http://", "https://")):
        kept["teacher: weights"] = 4 * _policy(config.teacher).total
    phases: dict[str, Parts] = {}
    if config.confidence is not None:
        generator = _online_generator(config.confidence, bf16=config.bf16)
        kept |= generator.kept("generator") | {"generator: gradients": 4 * generator.trained}
        tokens = max(GPU_BATCH_TOKENS if launch.is_gpu else CPU_BATCH_TOKENS, length)
        phases["updating the generator"] = kept | {"generator: activations *": generator.activations(tokens)}
    head_rows = max(1, micro_batch // LENGTHS) if launch.processes == 1 else micro_batch
    phases |= _policy_phases(config, launch, model, kept, micro_batch * length, head_rows * length)
    if config.vllm == "none":
        phases["sampling"] = kept | {"policy: sampling *": model.sampling(rows, length)}
    return phases


def _policy_phases(
    config: SftConfig | RlConfig, launch: Launch, model: MetaModel, kept: Parts, tokens: int, head_tokens: int
) -> dict[str, Parts]:
    """tokens: of a micro batch; head_tokens: of one forward pass."""
    updating = kept | _gradients("policy", model, launch)
    updating["policy: activations *"] = model.activations(
        tokens, checkpointing=config.gradient_checkpointing, is_sharded=launch.shards > 1
    )
    updating["policy: head *"] = model.head(head_tokens, is_gpu=launch.is_gpu)
    if launch.shards > 1:
        updating["policy: gathered *"] = model.gathered()
    if config.merge and not launch.is_gpu:  # it is merged on the CPU
        return {"updating": updating, "merging": kept | {"policy: merged": 4 * model.total}}
    return {"updating": updating}


def _gradients(name: str, model: MetaModel, launch: Launch) -> Parts:
    copies = 2 if launch.processes > launch.shards else 1  # with the buckets of DistributedDataParallel
    return {f"{name}: gradients": copies * 4 * model.trained / launch.shards}


def _policy(name: str, lora_rank: int = 0, *, bf16: bool = False) -> MetaModel:
    with loading(name):
        shape: Any = AutoConfig.from_pretrained(name)
    sees_images = hasattr(shape, "vision_config")
    factory = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    adapters = lora_config(lora_rank, sees_images=sees_images) if lora_rank else None
    return _on_meta(factory, name, shape, adapters, bf16=bf16)


def _online_generator(path: Path, *, bf16: bool) -> MetaModel:
    with loading(path):
        shape: Any = AutoConfig.from_pretrained(path)
        adapters = PeftConfig.from_pretrained(str(path)) if is_adapter(path) else None
    return _on_meta(AutoModelForSequenceClassification, path, shape, adapters, bf16=bf16)


def _on_meta(factory: Any, name: str | Path, shape: Any, adapters: PeftConfig | None, *, bf16: bool) -> MetaModel:
    if not hasattr(shape.get_text_config(), "num_attention_heads"):
        raise ConfigError(f"there is no estimate for {name}, a {shape.model_type}: it has no attention")
    with torch.device("meta"), loading(name):
        model = factory.from_config(shape, dtype=torch.bfloat16 if adapters and bf16 else torch.float32)
        if hasattr(shape, "vision_config"):
            freeze_vision(model)
        if adapters is not None:
            adapters.base_model_name_or_path = None  # PEFT warns of another name
            adapters.inference_mode = False  # as a saved adapter says
            model = get_peft_model(model, adapters)
            train_in_fp32(model)
    return MetaModel(model, bf16)
