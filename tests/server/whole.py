"""vLLM's own app on a scripted engine, with keys: what tests of the whole stack ask without a model."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import renderer_from_config
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
from rtap_server.http.auth import AuthMiddleware
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics
from tests.other_checkpoints import MODELS
from tests.server.fake_engine import FakeEngine

POLICY = str(MODELS / "policy")
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
tokens_per_minute = 20
"""


class PolicyEngine(FakeEngine):
    """A FakeEngine with the configuration, tokenizer and renderer of the bundled policy, which vLLM's routes use."""

    errored, is_running = False, True

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        tokenizer = self.renderer.tokenizer
        super().__init__(
            lambda _: CYCLE,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            decode=tokenizer.decode,
            end_of_turn_id=None,
            ends_turn=True,
        )

    @property
    def prompts(self) -> list[str]:
        """Text of each call's prompt."""
        return [self.decode(call.prompt["prompt_token_ids"]) for call in self.calls]

    @property
    def salts(self) -> list[str | None]:
        """Cache salt of each call."""
        return [call.prompt.get("cache_salt") for call in self.calls]

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self, n: int = 1) -> None: ...

    async def check_health(self) -> None: ...


class Service:
    """The app and what stands behind it."""

    def __init__(self, app: FastAPI, engine: PolicyEngine, registry: CollectorRegistry, drain: Drain) -> None:
        self.app, self.engine, self.registry, self.drain = app, engine, registry, drain

    async def ask(self, path: str, key: str | None = None, method: str = "POST", **options: Any) -> httpx.Response:
        headers = options.pop("headers", {}) | ({} if key is None else {"authorization": f"Bearer {key}"})
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://rtap") as client:
            return await client.request(method, path, headers=headers, **options)

    def rejected(self, reason: str) -> float:
        return self.registry.get_sample_value("rtap_rejected_total", {"reason": reason}) or 0.0

    def forget_spending(self) -> None:
        """Reset the usage of every key."""
        (auth,) = (layer for layer in self.layers() if type(layer) is AuthMiddleware)
        auth._accounts.clear()

    def layers(self) -> list[Any]:
        """The ASGI layers that a request passes, outermost first."""
        layers, layer = [], self.app.middleware_stack
        while layer is not None:
            layers.append(layer)
            layer = getattr(layer, "_app", None) or getattr(layer, "app", None)
        return layers

    def metrics(self) -> str:
        """Our metrics and vLLM's."""
        return (generate_latest(self.registry) + generate_latest(REGISTRY)).decode()


def make_service(file: Path | None, settings: Settings, *flags: str, confidence: Confidence | None = None) -> Service:
    """The app with API keys in ``file``, which is written, and in VLLM_API_KEY. None: without keys."""
    environ = {} if file is None else {"VLLM_API_KEY": "key-vllm"}
    if file is not None:
        file.write_text(KEYS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        args, _, _ = _parse([POLICY, "--served-model-name", "rtap", "--enable-scale-out", *flags])
        engine = PolicyEngine(AsyncEngineArgs(model=POLICY, kv_cache_memory_bytes=2**20).create_engine_config())
        registry = CollectorRegistry()
        server = ServerState(
            settings=settings, format=RTAP, confidence=confidence, generator=Artifact(), count_oops=len,
            encode=engine.encode, decode=lambda token_ids, _: engine.decode(token_ids), end_of_turn_ids=frozenset(),
            metrics=Metrics(registry), feedback=Feedback(), drain=Drain(),
        )  # fmt: skip
        admission = Admission(
            settings.max_in_flight_requests, settings.max_in_flight_tokens, settings.trajectories_limit
        )  # fmt: skip
        keys = load_keys(file, environ)
        app = asyncio.run(create_app(engine, args, server, keys, admission))  # type: ignore[arg-type]
    return Service(app, engine, registry, server.drain)
