"""vLLM's own app on a scripted engine: every route is behind the gate, and what a key asks for carries its salt."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.routing import Mount, Route
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

import server.reasoning_parser  # noqa: F401 - registers itself, as its plugin flag makes vLLM do
from server.__main__ import _parse
from server.app import create_app
from server.drain import Drain
from server.feedback import Feedback
from server.keys import load_keys
from server.limits import Admission
from server.metrics import Metrics
from server.recursive_engine import Plan
from server.rtap.artifact import Artifact
from server.rtap.format import RTAP
from server.settings import Settings
from tests.other_checkpoints import MODELS

pytestmark = pytest.mark.asyncio(loop_scope="module")
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
tokens_per_minute = 5
"""


class Engine:
    """What of an AsyncLLM the routes use: real configuration, tokenizer and renderer; every request gets one cycle."""

    errored, is_running = False, True

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.salts: list[str | None] = []
        self.go = asyncio.Event()
        self.go.set()

    def encode_text(self, text: str) -> list[int]:
        return self.renderer.tokenizer.encode(text, add_special_tokens=False)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self, n: int = 1) -> None: ...

    async def check_health(self) -> None: ...

    async def abort(self, request_id: Any, **options: Any) -> None: ...

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.salts.append(prompt.get("cache_salt"))
        await self.go.wait()
        ids = self.encode_text(CYCLE)
        part = CompletionOutput(
            index=0, text=CYCLE, token_ids=ids, cumulative_logprob=None, logprobs=None, finish_reason="stop"
        )
        yield RequestOutput(
            request_id=request_id, prompt=None, prompt_token_ids=prompt["prompt_token_ids"], prompt_logprobs=None,
            outputs=[part], finished=True, num_cached_tokens=0,
        )  # fmt: skip


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


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two requests at a time, 100 tokens; keys of a file and vLLM's own variable."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(KEYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "key-vllm")
        args, _, _ = _parse(
            [POLICY, "--served-model-name", "rtap", "--enable-scale-out", "--allowed-origins", '["http://page"]']
        )
        engine = Engine(AsyncEngineArgs(model=POLICY, kv_cache_memory_bytes=2**20).create_engine_config())
        settings, registry = Settings(max_in_flight_requests=2, max_in_flight_tokens=100), CollectorRegistry()
        plan = Plan(
            settings=settings, format=RTAP, confidence=None, generator=Artifact(), count_oops=len,
            encode=engine.encode_text, end_of_turn_ids=frozenset(), metrics=Metrics(registry), feedback=Feedback(),
            drain=Drain(),
        )  # fmt: skip
        admission = Admission(settings.max_in_flight_requests, settings.max_in_flight_tokens)
        keys = load_keys(file, {"VLLM_API_KEY": "key-vllm"})
        app = asyncio.run(create_app(engine, args, settings, plan, keys, admission))  # type: ignore[arg-type]
        yield Service(app, engine, registry, plan.drain)


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything that is mounted; a path's own parameters are called x."""
    found = []
    for route in app.routes:
        path = route.path.replace("{response_id}", "x")  # type: ignore[attr-defined]
        assert isinstance(route, Mount | Route), route
        found += [(method, path) for method in (["GET"] if isinstance(route, Mount) else sorted(route.methods or []))]
    return found


async def test_every_route_but_two_wants_a_key(service):
    routes = routes_of(service.app)
    assert {"/metrics", "/openapi.json", "/tokenize", "/v1/models", "/v1/rtap/config", "/live", "/inference/v1/generate"
            } <= {path for _, path in routes}  # fmt: skip
    assert all("{" not in path for _, path in routes)
    before, guarded = service.rejected("unauthorized"), 0
    for method, path in routes:
        without, wrong, right = [
            (await service.ask(path, key, method, json={} if method == "POST" else None)).status_code
            for key in (None, "wrong", "key-a")
        ]
        if path in ("/live", "/ready"):
            assert (without, wrong, right) == (200, 200, 200)
        else:
            guarded += 1
            assert (without, wrong) == (401, 401), (method, path)
            assert right != 401, (method, path)
    assert guarded > 30
    assert service.rejected("unauthorized") - before == 2 * guarded


async def test_a_path_that_is_no_route_wants_a_key_too(service):
    for path in ("/", "/live/", "//live", "/live/../v1/models", "/v1", "/metricsx", "/v1/models/"):
        for method in ("GET", "OPTIONS", "POST", "HEAD"):
            assert (await service.ask(path, method=method)).status_code == 401, (method, path)


@pytest.mark.parametrize("key", ["key-a", "key-b", "key-vllm"])
async def test_vllms_own_guard_which_knows_one_key_is_gone(service, key):
    assert all(m.cls is not AuthenticationMiddleware for m in service.app.user_middleware)
    assert (await service.ask("/v1/models", key, "GET")).status_code == 200
    assert (await service.ask("/v1/models", method="GET", headers={"x-api-key": key})).status_code == 200


async def test_a_preflight_is_answered_and_a_refusal_can_be_read_by_a_page(service):
    asks = {"origin": "http://page", "access-control-request-method": "POST"}
    preflight = await service.ask("/v1/models", method="OPTIONS", headers=asks)
    assert preflight.status_code == 200, preflight.text
    refused = await service.ask("/v1/models", method="GET", headers={"origin": "http://page"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://page")


CHAT = {"model": "rtap", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 20}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "rtap", "prompt": "3 + 4", "max_tokens": 20},
    "/v1/responses": {"model": "rtap", "input": "3 + 4", "max_output_tokens": 20},
    "/v1/messages": CHAT,
    "/inference/v1/generate": {"model": "rtap", "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 20}},
}


@pytest.mark.parametrize("path", list(BODIES))
async def test_each_key_has_a_prefix_cache_of_its_own_on_every_way_into_the_engine(service, path):
    service.engine.salts.clear()
    for key, more in (("key-a", {}), ("key-b", {}), ("key-a", {"cache_salt": "own"}), ("key-a", {})):
        reply = await service.ask(path, key, json=BODIES[path] | more)
        assert reply.status_code == 200, reply.text
    first, other, own, again = service.engine.salts
    assert first == again
    assert len({first, other, own, "own", None}) == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/inference/v1/generate"])
async def test_tokens_that_were_sampled_and_read_are_charged_to_the_key(service, path):
    """5 a minute, refilled over seconds: the first request owes so much that the next one waits."""
    gate = service.app.middleware_stack
    while type(gate).__name__ != "Gate":
        gate = getattr(gate, "_app", None) or gate.app
    gate._accounts.clear()
    first, second = [await service.ask(path, "key-poor", json=BODIES[path]) for _ in range(2)]
    assert (first.status_code, second.status_code) == (200, 429), second.text
    usage = first.json().get("usage")
    spent = usage["total_tokens"] if usage else len(service.engine.encode_text(CYCLE)) + 3
    assert abs(int(second.headers["retry-after"]) - (spent - 5) * 12) <= 1
    assert second.json()["error"]["type"] == "rate_limit_error"
    gate._accounts.clear()


async def test_the_server_takes_so_many_requests_at_a_time(service):
    before = service.rejected("overloaded")
    service.engine.salts.clear()
    service.engine.go.clear()
    answered = [
        asyncio.create_task(service.ask(path, "key-a", json=BODIES[path])) for path in itertools.islice(BODIES, 2)
    ]
    async with asyncio.timeout(10):
        while len(service.engine.salts) < 2:
            await asyncio.sleep(0.01)
    refused = await service.ask("/v1/chat/completions", "key-b", content=b"not even JSON")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert (await service.ask("/v1/models", "key-b", "GET")).status_code == 200
    answered[0].cancel()  # its client leaves, and its place is free
    service.engine.go.set()
    await asyncio.gather(*answered, return_exceptions=True)
    assert (await service.ask("/v1/chat/completions", "key-b", json=CHAT)).status_code == 200
    assert service.rejected("overloaded") - before == 1


async def test_the_server_takes_so_many_tokens_at_a_time(service):
    service.engine.salts.clear()
    service.engine.go.clear()
    held = asyncio.create_task(service.ask("/v1/chat/completions", "key-a", json=CHAT | {"n": 2}))
    async with asyncio.timeout(10):
        while not service.engine.salts:
            await asyncio.sleep(0.01)
    vote = CHAT | {"rtap": {"policy": "vote", "samples": 3}}  # 40 are held, 60 more fit
    refused = await service.ask("/v1/chat/completions", "key-b", json=vote | {"max_tokens": 21})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    service.engine.go.set()
    assert (await service.ask("/v1/chat/completions", "key-b", json=vote)).status_code == 200
    assert (await held).status_code == 200
    never = await service.ask("/v1/chat/completions", "key-b", json=CHAT | {"max_tokens": 101})
    assert never.status_code == 400
    assert "may write 101 tokens, and this server writes 100 at a time" in never.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/scale_elastic_ep", "/is_scaling_elastic_ep", "/invocations", "/v1/chat/completions/batch"]
)
async def test_routes_that_vllm_always_mounts_and_nobody_asked_for_are_closed(service, path):
    reply = await service.ask(path, "key-a", json={"new_data_parallel_size": 1})
    assert reply.status_code == 400
    assert f"{path} is closed: " in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/reset_prefix_cache", "/start_profile", "/collective_rpc"])
async def test_routes_of_vllms_dev_mode_are_not_there(service, path):
    assert (await service.ask(path, "key-a", json={})).status_code == 404


async def test_a_server_that_is_leaving_says_so_and_takes_nothing_new(service):
    before, drain = service.rejected("draining"), service.drain
    drain.has_begun = True
    try:
        for path, body in BODIES.items():
            reply = await service.ask(path, "key-a", json=body)
            assert (reply.status_code, reply.headers["retry-after"], reply.headers["connection"]) == (503, "1", "close")
            assert "another one may answer" in reply.json()["error"]["message"]
        ready, live = [await service.ask(path, method="GET") for path in ("/ready", "/live")]
        assert (ready.status_code, ready.json(), live.status_code) == (503, {"status": "draining"}, 200)
    finally:
        drain.has_begun = False
    assert service.rejected("draining") - before == len(BODIES)
    assert (await service.ask("/ready", method="GET")).status_code == 200
