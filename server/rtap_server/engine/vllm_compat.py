"""Every private vLLM name that the server uses, as typed functions; tests/server/engine/test_vllm_compat.py holds each.

The extras ``cpu`` and ``cuda`` pin the minor version of vLLM that these tests run against.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import zmq
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig, VllmConfig
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config  # pyright: ignore[reportUnknownVariableType]
from vllm.v1.engine.coordinator import DPCoordinatorProc
from vllm.v1.engine.core import EngineCoreProc

from rtap_server.engine.engine_process import isolate

if TYPE_CHECKING:  # engine processes import this module, and AsyncLLM would bring the API's modules
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["disable_envs_cache", "enable_envs_cache"]

# What vLLM's processes run. A forked process finds the replaced attributes below.
_run_engine_core = cast(Callable[..., None], EngineCoreProc.run_engine_core)  # pyright: ignore[reportUnknownMemberType]
_run_coordinator = cast(Callable[..., None], DPCoordinatorProc.run_coordinator)  # pyright: ignore[reportUnknownMemberType]


def isolate_engines() -> None:
    """Isolate the processes that vLLM starts from now on (``engine_process.isolate``)."""
    EngineCoreProc.run_engine_core = staticmethod(run_isolated_engine)
    DPCoordinatorProc.run_coordinator = staticmethod(run_isolated_coordinator)


def run_isolated_engine(*args: Any, **options: Any) -> None:
    isolate()
    _run_engine_core(*args, **options)


def run_isolated_coordinator(*args: Any, **options: Any) -> None:
    isolate()
    _run_coordinator(*args, **options)


def set_stops(params: SamplingParams, stop: list[str], token_ids: list[int]) -> None:
    """Make generation stop at these only, without changing the ``params`` that this is a shallow copy of."""
    params.stop, params.stop_token_ids = stop, token_ids
    params._all_stop_token_ids = set(token_ids)  # pyright: ignore[reportPrivateUsage]
    params.output_text_buffer_length = max(map(len, stop), default=1) - 1


def check_stop_token_ids(params: SamplingParams, config: ModelConfig) -> None:
    """Raise VLLMValidationError for an id outside the vocabulary."""
    params._validate_stop_token_ids(config)  # pyright: ignore[reportPrivateUsage]


def tokenizer_of(config: VllmConfig) -> Any:
    """The tokenizer of an engine that has not started."""
    tokenizer: Any = cached_tokenizer_from_config(config.model_config)  # pyright: ignore[reportUnknownVariableType]
    return tokenizer


def on_output(engine: "AsyncLLM", callback: Callable[[], None]) -> None:
    """Call ``callback`` for every message from the engine process, requests of any output kind included."""
    core: Any = engine.engine_core
    receive = core.get_output_async

    async def receive_observed() -> Any:
        outputs = await receive()
        callback()
        return outputs

    core.get_output_async = receive_observed


def on_chat(engine: "AsyncLLM", callback: Callable[[list[Any]], None]) -> None:
    """Call ``callback`` with the parsed messages of every chat that ``engine`` renders, in the request's own task."""
    renderer: Any = engine.renderer
    render = renderer.render_chat_async

    async def render_observed(*args: Any, **options: Any) -> Any:
        conversations, prompts = await render(*args, **options)
        for messages in conversations:
            callback(messages)
        return conversations, prompts

    renderer.render_chat_async = render_observed


def process_ids(engine: "AsyncLLM") -> list[int]:
    """Engine processes on this machine; none when Ray runs them, whose death Ray reports to vLLM."""
    manager: Any = _resources(engine).engine_manager
    return [process.pid for process in getattr(manager, "processes", ())]


def zmq_context(engine: "AsyncLLM") -> "zmq.Context[Any] | None":
    """The sockets' context, which ``shutdown`` leaves open until the process ends."""
    return getattr(_resources(engine), "ctx", None)


def _resources(engine: "AsyncLLM") -> Any:
    core: Any = engine.engine_core
    return core.resources


def vllm_flags() -> dict[str, Any]:
    """Groups of vLLM's command line, each with its flags and their numbers of values."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser(prog="rtap serve", add_help=False))
    groups: list[dict[str, Any]] = []
    for group in parser._action_groups:  # pyright: ignore[reportPrivateUsage]
        actions = group._group_actions  # pyright: ignore[reportPrivateUsage]
        flags = {
            flag: 1 if action.nargs is None else action.nargs for action in actions for flag in action.option_strings
        }
        summary = " ".join((group.description or "").split("\n\n", 1)[0].split())
        groups.append({"title": group.title or "", "summary": summary, "flags": flags})
    release = ".".join(vllm_version.split(".")[:2])
    return {"version": f"{release}.", "groups": [group for group in groups if group["flags"]]}
