"""Start the engines of policy and generator, and build the state that requests share."""

import asyncio
import os
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import REGISTRY
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from rtap_core.adapters import is_adapter, merge_to_checkpoint, read_backbone
from rtap_core.artifact import UNCALIBRATED, Artifact, read_artifact_file
from rtap_core.errors import ConfigError
from rtap_core.format import TrajectoryFormat, default_recursion
from rtap_core.lexicon import DEFAULT_PATH, Lexicon, OopsCounter, load_lexicon
from rtap_core.types import Confidence, Judged
from rtap_server import __version__
from rtap_server.engine.checkpoint_safety import check_folder
from rtap_server.engine.confidence.inputs import ChatInput, Input, LocalChatTokenizer, read_token_ids
from rtap_server.engine.confidence.logprob import LogisticConfidence, check_logistic
from rtap_server.engine.confidence.pooling import PoolingConfidence
from rtap_server.engine.confidence.remote import PROBE, RemoteConfidence, RemoteTokenizer
from rtap_server.engine.confidence.yesno import YesNoConfidence, yes_no_ids
from rtap_server.engine.engine_config import (
    check_classifier,
    check_policy,
    encode,
    end_of_turn_ids,
    engine_config,
    generator_args,
    have_same_tokenizer,
    policy_format,
    reads_chat,
    rtap_block,
)
from rtap_server.engine.grammars import use_guidance
from rtap_server.engine.request_state import current_request
from rtap_server.engine.server_state import Drain, ServerState
from rtap_server.engine.supervisor import SupervisedEngine
from rtap_server.engine.vllm_compat import (
    disable_envs_cache,
    enable_envs_cache,
    isolate_engines,
    on_chat,
    tokenizer_of,
)
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.logs import announce, captured_stderr
from rtap_server.telemetry.metrics import Metrics

_TAG_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Engines:
    """The running policy engine, the state that requests share, and all engines for the supervisor."""

    policy: AsyncLLM
    server: ServerState
    supervised: Sequence[SupervisedEngine]


@asynccontextmanager
async def start_engines(args: Namespace, settings: Settings) -> AsyncGenerator[Engines]:
    """Both engines, loaded in parallel and stopped together at the end. Raises ConfigError."""
    with captured_stderr(is_verbose=settings.verbose):
        async with _started_engines(args, settings) as engines:
            yield engines


@asynccontextmanager
async def _started_engines(args: Namespace, settings: Settings) -> AsyncGenerator[Engines]:
    policy_args = AsyncEngineArgs.from_cli_args(args)
    allows_pickles = settings.allow_pickled_weights
    for adapter in args.lora_modules or ():
        check_folder(adapter.path, "auto", allows_pickles=allows_pickles)
    policy_config = engine_config(policy_args, args.model, allows_pickles=allows_pickles)
    use_guidance(policy_config)
    check_policy(policy_config)
    lexicon = load_lexicon(settings.oops_lexicon or DEFAULT_PATH)
    generator_config = _generator_config(args, settings)
    own = Artifact() if generator_config is None else check_classifier(generator_config)
    artifact = _artifact(settings, own)
    logistic = (
        UNCALIBRATED if artifact.logistic is None and settings.confidence_kind == "logprob" else artifact.logistic
    )
    if logistic is not None and logistic.reads_logprobs and policy_args.logprobs_mode != "raw_logprobs":
        raise ConfigError(
            f"--logprobs-mode {policy_args.logprobs_mode}: this server's confidence needs raw log-probabilities; leave "
            "the flag out"
        )
    fmt, format_source = policy_format(policy_config, args.chat_template, settings)
    if settings.recursion is None:
        settings = settings.model_copy(update={"recursion": default_recursion(rtap_block(policy_config))})
    policy: AsyncLLM | None = None
    generator: SupervisedEngine | None = None
    loading: asyncio.Task[AsyncLLM] | None = None
    client = httpx.AsyncClient()
    isolate_engines()
    try:
        # A file of `rtap calibrate` may be about any generator.
        made = artifact if artifact.source is None else own
        input_of, max_read = await _input(settings, policy_config, generator_config, client, made)
        remote = await _remote(settings, policy_config, client, input_of, max_read)
        # Only loading is parallel: vLLM keeps the current config in a global while one is made.
        if generator_config is not None:
            loading = asyncio.create_task(asyncio.to_thread(_load, generator_config, log_stats=False))
        policy = await asyncio.to_thread(_load, policy_config, log_stats=not policy_args.disable_log_stats)
        await policy.reset_mm_cache()  # dummy inputs of start-up
        if input_of is not read_token_ids:
            on_chat(policy, _keep_messages)
        if loading is not None and generator_config is not None:
            generator = SupervisedEngine("confidence", await loading, partial(_reload, generator_config))
        confidence = _confidence(settings, policy, generator, remote, input_of)
        if logistic is not None:
            confidence = LogisticConfidence(logistic, policy, settings.confidence_timeout_seconds, confidence)
        supervised = [SupervisedEngine("policy", policy), *([] if generator is None else [generator])]
        needs_logprobs = logistic is not None and logistic.reads_logprobs
        server = _server_state(
            settings, policy, fmt, format_source, confidence, artifact, lexicon, logprobs=0 if needs_logprobs else None
        )
        enable_envs_cache()  # vLLM reads its variables for every token; its engine processes cache them already
        yield Engines(policy, server, supervised)
    finally:
        disable_envs_cache()
        for engine in (policy, await _result(loading) if generator is None else generator.engine):
            if engine is not None:
                engine.shutdown(timeout=engine.vllm_config.shutdown_timeout)
        await client.aclose()


def _generator_config(args: Namespace, settings: Settings) -> VllmConfig | None:
    if settings.confidence_kind != "pooling":
        return None
    if settings.confidence_model is not None and is_adapter(settings.confidence_model):
        checkpoint = _merge(Path(settings.confidence_model), settings.confidence_backbone)
        settings = settings.model_copy(update={"confidence_model": str(checkpoint)})
    elif settings.confidence_backbone is not None:
        raise ConfigError(
            f"--confidence-backbone {settings.confidence_backbone} is for an adapter, and {settings.confidence_model} "
            "is none: leave it out"
        )
    engine_args = generator_args(args, settings)
    return engine_config(engine_args, engine_args.model, allows_pickles=settings.allow_pickled_weights)


def _merge(adapter: Path, backbone: str | None) -> Path:
    """Checkpoint of a generator that is an adapter. Raises ConfigError."""
    backbone = backbone or read_backbone(adapter)
    announce(f"the generator is the adapter {adapter} on {backbone}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rtap" / "generators"
    return merge_to_checkpoint(adapter, backbone, cache)


def _load(config: VllmConfig, *, log_stats: bool) -> AsyncLLM:
    try:
        return AsyncLLM.from_vllm_config(
            config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=not log_stats
        )
    except Exception as error:  # any class; the engine process has printed the cause
        model = config.model_config.model
        raise ConfigError(
            f"{model} could not be loaded: the last error above has the cause; run `rtap doctor {model}` to check its "
            "files and the memory"
        ) from error


def _reload(config: VllmConfig) -> AsyncLLM:
    """Load again while serving, with uncached variables: vLLM sets some for the process that it starts."""
    disable_envs_cache()
    try:
        return _load(config, log_stats=False)
    finally:
        enable_envs_cache()


async def _result(loading: "asyncio.Task[AsyncLLM] | None") -> AsyncLLM | None:
    """The engine of a load that may have failed or still run; its failure was raised where it was awaited."""
    if loading is None:
        return None
    (result,) = await asyncio.gather(loading, return_exceptions=True)
    return result if isinstance(result, AsyncLLM) else None


def _artifact(settings: Settings, own: Artifact) -> Artifact:
    """The artifact of --confidence-config, else the generator's own, which is empty when unknown."""
    artifact = own
    if settings.confidence_config is not None:
        artifact = read_artifact_file(settings.confidence_config)
        if artifact.logistic is None and settings.confidence_kind in ("logprob", "yesno"):
            raise ConfigError(
                f"{settings.confidence_config} has no calibration for confidence={settings.confidence_kind}: fit one "
                "with `rtap calibrate`"
            )
    check_logistic(artifact, settings.confidence_kind)
    return artifact


async def _input(
    settings: Settings,
    policy: VllmConfig,
    generator: VllmConfig | None,
    client: httpx.AsyncClient,
    artifact: Artifact,
) -> tuple[Input, int]:
    """Input of a generator, announced when it is a chat, and its context length. artifact: the generator's own.

    Raises ConfigError."""
    address, tokenizer = str(settings.confidence_model), tokenizer_of(policy)
    if generator is not None:
        same, max_model_len = have_same_tokenizer(policy, generator), generator.model_config.max_model_len
        chat = LocalChatTokenizer(
            tokenizer_of(generator), getattr(generator.model_config.hf_text_config, "pad_token_id", None)
        )
    elif settings.confidence_kind == "remote":
        chat = RemoteTokenizer(address, client)
        probe, max_model_len = await chat.check()
        same = probe == encode(tokenizer, PROBE)
    else:
        return read_token_ids, policy.model_config.max_model_len
    if not reads_chat(settings, policy.model_config.model, same_tokenizer=same, trained=artifact.input):
        return read_token_ids, max_model_len
    reads_thought = artifact.kind == "confidence"
    judged = "thought and answer" if reads_thought else "the answer"
    announce(f"{address} judges {judged} as a chat in its own template")
    return ChatInput(chat, tokenizer.decode, max_model_len, reads_thought), max_model_len


async def _remote(
    settings: Settings, policy: VllmConfig, client: httpx.AsyncClient, input_of: Input, max_model_len: int
) -> RemoteConfidence | None:
    if settings.confidence_kind != "remote":
        return None
    remote = RemoteConfidence(
        str(settings.confidence_model), settings.confidence_timeout_seconds, client, max_model_len, input_of
    )
    probe = encode(tokenizer_of(policy), PROBE)
    await remote.check(Judged(probe, probe, probe, answer=PROBE))
    return remote


def _keep_messages(messages: list[Any]) -> None:
    current_request().messages = messages


def _confidence(
    settings: Settings,
    policy: AsyncLLM,
    generator: SupervisedEngine | None,
    remote: RemoteConfidence | None,
    input_of: Input,
) -> Confidence | None:
    """The confidence source without its calibration; None when there is none, and for log-probabilities."""
    kind, timeout = settings.confidence_kind, settings.confidence_timeout_seconds
    if kind == "pooling":
        assert generator is not None
        assert generator.engine is not None
        return PoolingConfidence(generator, timeout, generator.engine.model_config.max_model_len, input_of)
    if kind == "yesno":
        question, yes, no = yes_no_ids(lambda text: encode(policy.renderer.tokenizer, text), settings.yesno_question)
        return YesNoConfidence(policy, question, yes, no, timeout)
    return remote


def _server_state(
    settings: Settings,
    policy: AsyncLLM,
    fmt: TrajectoryFormat,
    format_source: str,
    confidence: Confidence | None,
    artifact: Artifact,
    lexicon: Lexicon,
    *,
    logprobs: int | None,
) -> ServerState:
    metrics, feedback, drain = Metrics(REGISTRY), Feedback(artifact.calibration.reference), Drain()
    metrics.set_build_info(version=__version__, vllm_version=vllm_version, confidence=settings.confidence_kind)
    metrics.export_calibration(feedback)
    metrics.export_drain(lambda: drain.has_begun, lambda: drain.num_trajectories)
    tokenizer: Any = policy.renderer.tokenizer
    encode_tag = lru_cache(maxsize=64)(partial(encode, tokenizer))

    def encode_cached(text: str) -> list[int]:
        """Tags are encoded many times a cycle."""
        return list(encode_tag(text)) if len(text) <= _TAG_CHARACTERS else encode(tokenizer, text)

    return ServerState(
        settings=settings,
        model=policy.model_config.model,
        format=fmt,
        format_source=format_source,
        confidence=confidence,
        generator=artifact,
        count_oops=OopsCounter(lexicon, encode_cached).count,
        encode=encode_cached,
        decode=tokenizer.decode,
        end_of_turn_ids=end_of_turn_ids(policy.vllm_config),
        metrics=metrics,
        feedback=feedback,
        drain=drain,
        logprobs=logprobs,
        shows_cycle_end=_shows_cycle_end(fmt, policy),
    )


def _shows_cycle_end(fmt: TrajectoryFormat, policy: AsyncLLM) -> bool:
    """True when the closing tag is not a special token, which vLLM removes from text."""
    tokenizer: Any = policy.renderer.tokenizer
    ids = encode(tokenizer, fmt.answer_close or "")
    return tokenizer.decode(ids, skip_special_tokens=True) == fmt.answer_close
