"""Contract of the server with vLLM's internals. A failure shows what to check after an upgrade of vLLM."""

import ast
import asyncio
import copy
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
import zmq
from starlette.applications import Starlette
from vllm import SamplingParams, envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import TokensInput
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser.abstract_parser import DelegatingParser
from vllm.pooling_params import PoolingParams
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.renderers import ChatParams, renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.coordinator import DPCoordinator, DPCoordinatorProc
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, MPClient
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor

import rtap_server
from rtap_server.engine import reasoning_parser, vllm_compat
from rtap_server.engine.output_writer import ANSWER_MARK, DRAFT_MARK, REASONING_PARSER
from rtap_server.engine.recursive_engine import RecursiveEngine
from tests.other_checkpoints import MODELS

POLICY = str(MODELS / "policy")
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def _parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_that_we_call():
    assert _parameters(build_app) == ["args", "supported_tasks", "model_config"]
    assert _parameters(init_app_state) == ["engine_client", "state", "args", "supported_tasks"]
    assert _parameters(NoSignalServer)[0] == "config"
    assert _parameters(get_uvicorn_log_config) == ["args"]
    assert _parameters(SSLCertRefresher) == ["ssl_context", "key_path", "cert_path", "ca_path"]
    assert _parameters(SSLCertRefresher.stop) == ["self"]
    assert _parameters(setup_server) == ["args", "reuse_port"]
    assert _parameters(EngineClient.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert _parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert {"vllm_config", "usage_context", "disable_log_stats"} <= set(_parameters(AsyncLLM.from_vllm_config))
    assert _parameters(AsyncLLM.encode)[1:4] == ["prompt", "pooling_params", "request_id"]
    assert issubclass(VLLMValidationError, Exception)
    assert {"message", "parameter"} <= set(_parameters(VLLMValidationError.__init__))


def test_tokens_are_known_before_an_engine_is_started():
    config = AsyncEngineArgs(model=POLICY, kv_cache_memory_bytes=2**20).create_engine_config()
    assert vllm_compat.tokenizer_of(config).get_vocab()["<think>"] == 444


def test_the_parser_has_what_serve_reads():
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["m"])
    validate_parsed_serve_args(args)
    for name in (
        "model_tag", "model", "served_model_name", "reasoning_parser", "reasoning_parser_plugin", "headless", "grpc",
        "api_server_count", "structured_outputs_config", "enable_chunked_prefill", "block_size", "enforce_eager",
        "kv_cache_memory_bytes", "distributed_executor_backend", "tensor_parallel_size", "pipeline_parallel_size",
        "enable_ssl_refresh", "uvicorn_log_level", "disable_uvicorn_access_log",
        "h11_max_incomplete_event_size", "trust_remote_code",
    ):  # fmt: skip
        assert hasattr(args, name), name
    assert (args.enable_chunked_prefill, args.block_size, args.kv_cache_memory_bytes) == (None, None, None)


@pytest.mark.parametrize(("executor", "becomes"), [(IN_PROCESS, IN_PROCESS), ("uni", "mp"), (None, "mp")])
def test_on_a_cpu_an_executor_stays_in_process_only_by_its_path(executor, becomes):
    """Once vLLM leaves "uni" alone, loading.py can use that name instead."""
    args = AsyncEngineArgs(model=POLICY, kv_cache_memory_bytes=2**20, distributed_executor_backend=executor)
    config = args.create_engine_config()
    assert config.parallel_config.distributed_executor_backend == becomes
    if executor == IN_PROCESS:
        assert Executor.get_class(config) is UniProcExecutor


def test_torch_tells_what_the_cpu_can_compute():
    found = torch.cpu.get_capabilities()
    assert found["architecture"] != "x86_64" or {"avx512_bf16", "amx_bf16"} <= set(found)


def test_recursive_engine_passes_for_an_engine_client():
    class Inner:
        is_running = True

        def check_admission(self, n: int = 1) -> str:
            return f"inner {n}"

    engine = RecursiveEngine(Inner(), None)  # pyright: ignore[reportArgumentType]
    assert isinstance(engine, EngineClient)
    assert engine.is_running
    assert engine.check_admission(2) == "inner 2"  # not EngineClient's own no-op


def test_outputs_have_the_fields_that_are_written():
    part = CompletionOutput(0, "", [], None, None)
    assert {"index", "text", "token_ids", "logprobs", "finish_reason", "stop_reason", "lora_request"} <= set(vars(part))
    names = ("prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics", "num_cached_tokens")
    assert set(names) <= set(_parameters(RequestOutput.__init__))
    assert {k.name for k in RequestOutputKind} == {"CUMULATIVE", "DELTA", "FINAL_ONLY"}


def test_what_a_prompt_says_of_its_first_part_has_these_names():
    assert {"prompt", "prompt_token_offsets", "arrival_time", "cache_salt"} <= set(get_type_hints(TokensInput))


def test_a_shallow_copy_of_sampling_params_shares_nothing_that_changes_but_the_stop_ids():
    """``AsyncLLM`` copies those of a request so, and so do we for each cycle."""
    tokenizer = cached_tokenizer_from_config(AsyncEngineArgs(model=str(MODELS / "policy")).create_model_config())
    shared = {
        "stop": ["x"], "stop_token_ids": [5], "bad_words": ["7"], "logit_bias": {3: 1.0}, "extra_args": {"a": [1]},
    }  # fmt: skip
    params = SamplingParams(**copy.deepcopy(shared), skip_clone=True)
    mine = params.clone()
    mine.update_from_generation_config({"eos_token_id": [7, 8]}, 7)
    mine.update_from_tokenizer(tokenizer)
    assert {name: getattr(params, name) for name in shared} == shared
    assert params._bad_words_token_ids is None
    assert params._all_stop_token_ids == {5, 7, 8}  # the one of which each cycle has its own


def test_sampling_params_have_the_fields_that_are_set_per_cycle():
    params = SamplingParams(stop="x", stop_token_ids=[5], seed=1)
    for name in ("n", "max_tokens", "min_tokens", "prompt_logprobs", "logprobs", "extra_args"):
        assert hasattr(params, name), name
    assert params._all_stop_token_ids == {5}
    assert params.output_text_buffer_length == 0
    assert "sampling_params.stop_token_ids" in inspect.getsource(check_stop)
    assert PoolingParams(task="classify", use_activation=True).task == "classify"


def test_only_callers_that_parse_reasoning_ask_for_split_text():
    assert "reasoning_parser_kwargs" in inspect.getsource(OpenAIServingChat)
    assert "reasoning_parser_kwargs" not in inspect.getsource(OpenAIServingCompletion)


def test_the_reasoning_parser_is_registered_and_splits_at_the_mark():
    assert ReasoningParserManager.get_reasoning_parser(REASONING_PARSER).__name__ == "RecursiveReasoningParser"

    class Tokenizer:
        def get_vocab(self):
            return {"<think>": 1, "</think>": 2, "<answer>": 3}

    parser = reasoning_parser.RecursiveReasoningParser(Tokenizer())
    assert isinstance(parser, ReasoningParser)
    assert parser.extract_reasoning(f"12{ANSWER_MARK}108", None) == ("12", "108")
    assert parser.extract_reasoning("12", None) == ("12", None)
    deltas = [parser.extract_reasoning_streaming("", "", t, [], [], []) for t in ("12", "", f"*9{ANSWER_MARK}108")]
    assert [(d.reasoning, d.content) if d else None for d in deltas] == [("12", None), None, ("*9", "108")]
    thought, _, both = deltas
    sent = [json.loads(d.model_dump_json(exclude_unset=True)) for d in (thought, both)]
    assert sent == [{"reasoning": "12", "reasoning_content": "12"}, {"reasoning": "*9", "content": "108"}]
    draft = parser.extract_reasoning_streaming("", "", DRAFT_MARK + '{"index": 0, "text": "1"}', [], [], [])
    assert json.loads(draft.model_dump_json(exclude_unset=True)) == {"draft": {"index": 0, "text": "1"}}
    assert parser.has_engine_confirmed_reasoning_end()
    assert not parser.is_reasoning_end([1, 9, 3, 7])  # asked of prompts: a user may write any tag there
    assert parser.is_reasoning_end_streaming([1, 9, 3], [3])
    assert parser.extract_content_ids([1, 9, 3, 7, 8]) == [7, 8]


def test_delegating_parser_hands_over_deltas_without_growing_text():
    class Composed(DelegatingParser):
        reasoning_parser_cls = reasoning_parser.RecursiveReasoningParser

    class Tokenizer:
        def get_vocab(self):
            return {}

    class Request:
        include_reasoning = True
        tool_choice = None
        tools = None

    parser = Composed(Tokenizer(), None)
    got = [
        parser.parse_delta(t, [1], Request(), None, finished=t == "!")
        for t in ("12", "*9", f"{ANSWER_MARK}108", " more", "!")
    ]
    assert [(d.reasoning, d.content) for d in got if d] == [
        ("12", None), ("*9", None), (None, "108"), (None, " more"), (None, "!")
    ]  # fmt: skip
    assert parser._stream_state.previous_text == ""
    assert DeltaMessage(reasoning="x").reasoning == "x"


def test_starlette_builds_its_middleware_from_a_list():
    app = Starlette()
    assert app.user_middleware == []
    assert callable(app.build_middleware_stack)


@pytest.mark.parametrize(
    "name", ["abort", "check_admission", "get_supported_tasks", "is_running", "errored", "dead_error"]
)
def test_names_that_routes_of_vllm_ask_of_the_engine(name):
    assert hasattr(AsyncLLM, name)


def test_stops_of_a_cycle_leave_the_requests_alone():
    params = SamplingParams(stop=["x"], stop_token_ids=[5])
    cycle = copy.copy(params)
    vllm_compat.set_stops(cycle, ["y", "long"], [7])
    assert (cycle.stop, cycle.stop_token_ids, cycle._all_stop_token_ids) == (["y", "long"], [7], {7})
    assert cycle.output_text_buffer_length == 3
    assert (params.stop, params.stop_token_ids, params._all_stop_token_ids) == (["x"], [5], {5})


def test_stop_token_ids_outside_the_vocabulary_are_found():
    config: Any = SimpleNamespace(get_vocab_size=lambda: 9)
    vllm_compat.check_stop_token_ids(SamplingParams(stop_token_ids=[8]), config)
    with pytest.raises(VLLMValidationError, match="out-of-vocab") as caught:
        vllm_compat.check_stop_token_ids(SamplingParams(stop_token_ids=[9]), config)
    assert caught.value.parameter == "stop_token_ids"


async def test_each_message_of_an_engine_is_observed():
    """vLLM's own output handler, on a client that has two messages."""
    messages, seen = asyncio.Queue[Any](), list[int]()
    for _ in range(2):
        messages.put_nowait(SimpleNamespace(outputs=[], scheduler_stats=None, engine_index=0, timestamp=0.0))
    engine: Any = object.__new__(AsyncLLM)
    engine.engine_core = SimpleNamespace(get_output_async=messages.get, shutdown=lambda **_: None)
    engine.output_processor = SimpleNamespace(update_scheduler_stats=lambda _: None, propagate_error=seen.append)
    engine.renderer = SimpleNamespace(mm_processor_cache=None, shutdown=lambda: None)
    engine.output_handler, engine.log_stats, engine.logger_manager = None, False, None
    vllm_compat.on_output(engine, lambda: seen.append(1))
    engine._run_output_handler()
    async with asyncio.timeout(10):
        while len(seen) < 2:
            await asyncio.sleep(0.01)
    engine.output_handler.cancel()
    await asyncio.gather(engine.output_handler, return_exceptions=True)
    assert seen == [1, 1]
    assert inspect.iscoroutinefunction(AsyncMPClient.get_output_async)


def test_vllm_starts_its_processes_by_the_functions_that_are_replaced(monkeypatch):
    for owner, name in ((EngineCoreProc, "run_engine_core"), (DPCoordinatorProc, "run_coordinator")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restores it
    vllm_compat.isolate_engines()
    assert pickle.loads(pickle.dumps(EngineCoreProc.run_engine_core)) is vllm_compat.run_isolated_engine
    assert pickle.loads(pickle.dumps(DPCoordinatorProc.run_coordinator)) is vllm_compat.run_isolated_coordinator
    assert "target=EngineCoreProc.run_engine_core" in inspect.getsource(CoreEngineProcManager.__init__)
    assert "target=DPCoordinatorProc.run_coordinator" in inspect.getsource(DPCoordinator.__init__)
    # A worker process of an engine ends with the engine by vLLM's own means.
    assert "death_pipe.recv()" in inspect.getsource(WorkerProc.monitor_death_pipe)


def test_engine_processes_and_the_sockets_context():
    with zmq.Context() as context:
        resources = BackgroundResources(ctx=context)
        engine: Any = SimpleNamespace(engine_core=SimpleNamespace(resources=resources))
        assert vllm_compat.process_ids(engine) == []
        manager: Any = SimpleNamespace(processes=[SimpleNamespace(pid=3)])
        resources.engine_manager = manager
        assert vllm_compat.process_ids(engine) == [3]
        assert vllm_compat.zmq_context(engine) is context
    assert "self.processes: list[BaseProcess]" in inspect.getsource(CoreEngineProcManager.__init__)
    source = inspect.getsource(MPClient)
    assert "self.resources.engine_manager" in source
    assert "self.resources = BackgroundResources(ctx=" in source


def test_cached_variables_are_read_again_once_the_cache_is_off(monkeypatch):
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7")
    vllm_compat.enable_envs_cache()
    try:
        monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "8")
        assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE == 7
    finally:
        vllm_compat.disable_envs_cache()
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE == 8


def test_the_supervisor_uses_these_members_of_an_engine():
    assert _parameters(AsyncLLM.shutdown) == ["self", "timeout"]
    assert _parameters(AsyncLLM.get_num_unfinished_requests) == ["self"]
    assert isinstance(AsyncLLM.errored, property)


async def test_messages_are_known_when_a_chat_is_rendered():
    """All routes with messages render them here; tests/e2e/test_reward_models.py asks each."""
    assert "renderer.render_chat_async(" in inspect.getsource(OnlineRenderer.preprocess_chat)
    for render in (OnlineRenderer.render_chat, OnlineRenderer.render_responses):
        assert "self.preprocess_chat(" in inspect.getsource(render)
    config = AsyncEngineArgs(model=POLICY, kv_cache_memory_bytes=2**20).create_engine_config()
    engine, seen = SimpleNamespace(renderer=renderer_from_config(config)), []
    vllm_compat.on_chat(engine, seen.append)  # type: ignore[arg-type]
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": "2?"}]
    rendered = await engine.renderer.render_chat_async([[{"role": "user", "content": parts}]], ChatParams())
    assert seen == rendered[0] == [[{"role": "user", "content": "2 +\n2?"}]]


def test_only_vllm_compat_uses_private_names():
    root = Path(rtap_server.__file__).parent
    files = [path for path in root.rglob("*.py") if path != Path(vllm_compat.__file__)]
    assert len(files) > 20
    assert {str(path.relative_to(root)): found for path in files if (found := _private_names(path))} == {}
    assert "params._all_stop_token_ids" in _private_names(Path(vllm_compat.__file__))


def _private_names(path: Path) -> set[str]:
    """Private attributes and imports of other classes and packages, and the engine client's internals."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if (_is_private(node.attr) and not is_own) or node.attr in ("engine_core", "engine_manager", "resources"):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {f"{node.module}: {name}" for name in names if _is_private(name)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if _is_private(str(name)):
                found.add(ast.unparse(node))
    return found - {"os._exit"}


def _is_private(name: str) -> bool:
    """namedtuple's ``_replace`` is public."""
    return name.startswith("_") and not name.startswith("__") and name != "_replace"


def test_an_aborted_request_gives_what_it_has():
    """Deadlines and drains abort the cycle that is being written, and count and return what there is of it."""
    source = inspect.getsource(OutputProcessor.abort_requests)
    assert "finish_reason=FinishReason.ABORT" in source
    assert "req_state.queue.put(request_output)" in source
