"""vLLM's own app on a scripted engine, with keys: what tests of the whole stack ask without a model."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

import rtap_server.engine.reasoning_parser  # noqa: F401 - registers itself, as its plugin flag makes vLLM do
from rtap_core.artifact import Artifact
from rtap_core.format import RTAP
from rtap_core.types import Confidence
from rtap_server.__main__ import _parse
from rtap_server.app import create_app
from rtap_server.engine.server_state import Drain, ServerState
from rtap_server.http.admission import Admission
from rtap_server.http.api_keys import load_keys
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics
from tests.other_checkpoints import MODELS

POLICY = str(MODELS / "policy")
_SURE = Logprob(logprob=0.0, rank=1, decoded_token="x")
CYCLE = "<think>3+4=7</think><answer>7</answer>"
KEYS = """
[[keys]]
name = "a"
key = "key-a"
[[keys]]
name = "b"
key = "key-b"
[[keys]]
name = "poor"
key = "key-poor"
tokens_per_minute = 5
"""


class Engine:
    """What of an AsyncLLM the routes use: real configuration, tokenizer and renderer; every request gets one cycle,
    which ``write`` makes of its prompt, after at most ``most_seconds``; whole, or ``by_token`` for who streams."""

    errored, is_running = False, True

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.salts: list[str | None] = []
        self.prompts: list[str] = []
        self.write: Callable[[str], str] = lambda _: CYCLE
        self.most_seconds = 0.0
        self.by_token, self.token_seconds = False, 0.0
        self.ids: list[str] = []
        self.aborted: set[str] = set()
        self.go = asyncio.Event()
        self.go.set()

    def encode_text(self, text: str) -> list[int]:
        return self.renderer.tokenizer.encode(text, add_special_tokens=False)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self, n: int = 1) -> None: ...

    async def check_health(self) -> None: ...

    async def abort(self, request_id: str | list[str], **options: Any) -> None:
        """Ends every request under an id that has arrived, as vLLM does."""
        given = {request_id} if isinstance(request_id, str) else set(request_id)
        self.aborted |= given & set(self.ids)

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.salts.append(prompt.get("cache_salt"))
        self.ids.append(request_id)
        self.prompts.append(self.renderer.tokenizer.decode(prompt["prompt_token_ids"]))
        text = self.write(self.prompts[-1])
        await self.go.wait()
        await asyncio.sleep(random.random() * self.most_seconds)
        ids = self.encode_text(text)
        is_cut = self.by_token and (params.output_kind is RequestOutputKind.DELTA or bool(self.token_seconds))
        pieces = [[token_id] for token_id in ids] if is_cut else [ids]
        for number, piece in enumerate(pieces, 1):
            await asyncio.sleep(self.token_seconds)
            is_aborted = request_id in self.aborted
            part = CompletionOutput(
                index=0, text=self.renderer.tokenizer.decode(piece) if is_cut else text, token_ids=piece,
                cumulative_logprob=None, logprobs=None if params.logprobs is None else [{i: _SURE} for i in piece],
                finish_reason="abort" if is_aborted else "stop" if number == len(pieces) else None,
            )  # fmt: skip
            yield RequestOutput(
                request_id=request_id, prompt=None, prompt_token_ids=prompt["prompt_token_ids"], prompt_logprobs=None,
                outputs=[part], finished=is_aborted or number == len(pieces), num_cached_tokens=0,
            )  # fmt: skip
            if is_aborted:
                return


class Service:
    """The app and what stands behind it."""

    def __init__(self, app: FastAPI, engine: Engine, registry: CollectorRegistry, drain: Drain) -> None:
        self.app, self.engine, self.registry, self.drain = app, engine, registry, drain

    async def ask(self, path: str, key: str | None = None, method: str = "POST", **options: Any) -> httpx.Response:
        headers = options.pop("headers", {}) | ({} if key is None else {"authorization": f"Bearer {key}"})
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://rtap") as client:
            return await client.request(method, path, headers=headers, **options)

    def rejected(self, reason: str) -> float:
        return self.registry.get_sample_value("rtap_rejected_total", {"reason": reason}) or 0.0

    def forget_spending(self) -> None:
        """Every key is as new."""
        gate: Any = self.app.middleware_stack
        while type(gate).__name__ != "AuthMiddleware":
            gate = getattr(gate, "_app", None) or gate.app
        gate._accounts.clear()

    def metrics(self) -> str:
        return generate_latest(self.registry).decode()


def make_service(file: Path, settings: Settings, *flags: str, confidence: Confidence | None = None) -> Service:
    """The app with the keys of ``file``, which is written."""
    file.write_text(KEYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "key-vllm")
        args, _, _ = _parse([POLICY, "--served-model-name", "rtap", "--enable-scale-out", *flags])
        engine = Engine(AsyncEngineArgs(model=POLICY, kv_cache_memory_bytes=2**20).create_engine_config())
        registry = CollectorRegistry()
        server = ServerState(
            settings=settings, format=RTAP, confidence=confidence, generator=Artifact(), count_oops=len,
            encode=engine.encode_text, end_of_turn_ids=frozenset(), metrics=Metrics(registry), feedback=Feedback(),
            drain=Drain(),
        )  # fmt: skip
        admission = Admission(settings.max_in_flight_requests, settings.max_in_flight_tokens)
        keys = load_keys(file, {"VLLM_API_KEY": "key-vllm"})
        app = asyncio.run(create_app(engine, args, server, keys, admission))  # type: ignore[arg-type]
    return Service(app, engine, registry, server.drain)
