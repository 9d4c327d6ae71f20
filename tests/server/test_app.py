"""vLLM's own app on a scripted engine: every route is behind the gate, and what a key asks for carries its salt."""

import asyncio
import itertools
import json
import re

import pytest
from fastapi import FastAPI
from starlette.routing import Mount, Route
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

from rtap_server.http.route_kinds import (
    BLOCKED_PATHS,
    BLOCKED_WITH_KEYS,
    GENERATING_PATHS,
    LIGHTWEIGHT_PATHS,
    RECURSIVE_PATHS,
)
from rtap_server.settings import Settings
from tests.error_shapes import error_of
from tests.server.whole import CYCLE, Service, make_service

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Two requests at a time, 100 tokens; keys of a file and vLLM's own variable."""
    return make_service(
        tmp_path_factory.mktemp("keys") / "keys.toml",
        Settings(max_in_flight_requests=2, max_in_flight_tokens=100),
        "--allowed-origins", '["http://page"]', "--enable-request-id-headers",
    )  # fmt: skip


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything that is mounted; a path's own parameters are called x."""
    found = []
    for route in app.routes:
        path = re.sub("{.*}", "x", route.path)  # type: ignore[attr-defined]
        assert isinstance(route, Mount | Route), route
        found += [(method, path) for method in (["GET"] if isinstance(route, Mount) else sorted(route.methods or []))]
    return found


PAGE_PATHS = {
    "/", "/page/page.css", "/page/icon.svg", "/page/main.js", "/page/api.js", "/page/controls.js", "/page/cycles.js",
    "/page/dom.js", "/page/figures.js", "/page/run.js", "/page/snippets.js", "/page/view.js",
}  # fmt: skip
"""Static files without data, open by name."""


async def test_every_route_but_the_probes_and_the_pages_files_wants_a_key(service):
    routes = routes_of(service.app)
    assert {"/metrics", "/openapi.json", "/tokenize", "/v1/models", "/v1/rtap/config", "/live", "/inference/v1/generate"
            } <= {path for _, path in routes}  # fmt: skip
    assert all("{" not in path for _, path in routes)
    assert {path for _, path in routes} >= PAGE_PATHS
    before, guarded = service.rejected("unauthorized"), 0
    for method, path in routes:
        without, wrong, right = [
            (await service.ask(path, key, method, json={} if method == "POST" else None)).status_code
            for key in (None, "wrong", "key-a")
        ]
        if path in ("/live", "/ready") or path in PAGE_PATHS:
            assert (without, wrong, right) == (200, 200, 200)
        else:
            guarded += 1
            assert (without, wrong) == (401, 401), (method, path)
            assert right != 401, (method, path)
    assert guarded > 30
    assert service.rejected("unauthorized") - before == 2 * guarded


async def test_what_every_post_does_is_known(service):
    """A route that a new vLLM brings is looked at before it is served: it would be outside admission."""
    known = RECURSIVE_PATHS | GENERATING_PATHS.keys() | LIGHTWEIGHT_PATHS | BLOCKED_PATHS.keys()
    posts = {route.path for route in service.app.routes if "POST" in (getattr(route, "methods", None) or ())}
    assert len(posts) > 15
    assert posts <= known


async def test_every_post_is_capped(service):
    """Its body, its templates, its addresses and its depth, before the route sees it."""
    deep = 100
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    bodies = [
        ({"content": b"1" * (8 * 2**20 + 1)}, 413), ({"json": {"chat_template": "x"}}, 400),
        ({"json": {"messages": image}}, 400), ({"content": b'{"a":' + b"[" * deep + b"]" * deep + b"}"}, 400),
        ({"json": {"n": 10**9}}, 400), ({"content": b"[" * 100_000}, 400),
    ]  # fmt: skip
    posts = {route.path for route in service.app.routes if "POST" in (getattr(route, "methods", None) or ())}
    for path in posts - BLOCKED_PATHS.keys() - BLOCKED_WITH_KEYS.keys():
        before = service.rejected("invalid")
        for body, status in bodies:
            reply = await service.ask(path, "key-vllm", **body)
            assert (reply.status_code, bool(error_of(path, reply.json()))) == (status, True)
        assert service.rejected("invalid") - before == len(bodies) - 1, path


async def test_methods_that_send_a_body_have_a_post_route_or_none(service):
    """BodyLimitsMiddleware reads the bodies of POST routes only; another method's route would get none."""
    assert {method for method, _ in routes_of(service.app)} <= {"GET", "HEAD", "POST"}


@pytest.mark.parametrize("key", [None, "key-a"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_open_paths_take_get_and_head_only(service, method, key):
    for path in ("/live", "/ready", *PAGE_PATHS):
        reply = await service.ask(path, key, method, content=b"1" * 100_000)
        assert (reply.status_code, error_of(path, reply.json())["message"]) == (405, "Method Not Allowed")
        assert "GET" in reply.headers["allow"]


async def test_without_a_content_type_a_body_is_json(service):
    for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
        body = json.dumps(CHAT).encode() if path != "/tokenize" else b'{"model": "rtap", "prompt": "3"}'
        for headers in ({}, {"content-type": "application/json ; charset=utf-8"}):
            reply = await service.ask(path, "key-a", content=body, headers=headers)
            assert reply.status_code == 200, reply.text
        empty = await service.ask(path, "key-a", content=b"")
        assert empty.status_code == 400
        assert error_of(path, empty.json())


async def test_a_model_can_be_looked_up(service):
    listed = (await service.ask("/v1/models", "key-a", "GET")).json()["data"][0]
    found = (await service.ask("/v1/models/rtap", "key-a", "GET")).json()
    assert {**found, "created": 0, "permission": []} == {**listed, "created": 0, "permission": []}
    for unknown in ("gpt-4", "org/model", "rtap/x"):
        reply = await service.ask(f"/v1/models/{unknown}", "key-a", "GET")
        error = error_of("/v1/models", reply.json())
        assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"the model '{unknown}' does not exist; this server has rtap" in error["message"]
    models = service.app.state.openai_serving_models
    models.base_model_paths[0].name = "org/rtap"
    try:
        assert (await service.ask("/v1/models/org/rtap", "key-a", "GET")).json()["id"] == "org/rtap"
        assert (await service.ask("/v1/models/org%2Frtap", "key-a", "GET")).json()["id"] == "org/rtap"
    finally:
        models.base_model_paths[0].name = "rtap"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_errors_of_vllm_have_the_types_and_codes_of_their_api(service, path):
    long = {"prompt": "3 " * 3000, "input": "3 " * 3000, "messages": [{"role": "user", "content": "3 " * 3000}]}
    body = BODIES[path] | {name: value for name, value in long.items() if name in BODIES[path]}
    for more, status, type_, code in (
        (body, 400, "invalid_request_error", "context_length_exceeded"),
        (BODIES[path] | {"model": "gpt"}, 404, "not_found_error", "model_not_found"),
        (BODIES[path] | {"temperature": "hot"}, 400, "invalid_request_error", None),
        (BODIES[path] | {"n": 1000}, 400, "invalid_request_error", None),
    ):
        reply = await service.ask(path, "key-a", json=more)
        error = error_of(path, reply.json())
        assert (reply.status_code, error["type"], error.get("code", code)) == (status, type_, code), error
    for key, status, type_, code in ((None, 401, "authentication_error", "invalid_api_key"),):
        error = error_of(path, (await service.ask(path, key, json=BODIES[path])).json())
        assert (error["type"], error.get("code", code)) == (type_, code), status


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_failure_that_vllm_answers_itself_is_logged_under_the_request_id(service, path, caplog, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("lost /dev/gpu0")

    serving = {"/v1/messages": "anthropic_serving_messages", "/v1/chat/completions": "openai_serving_chat"}[path]
    monkeypatch.setattr(getattr(service.app.state, serving).online_renderer, "preprocess_chat", broken)
    reply = await service.ask(path, "key-a", json=CHAT, headers={"x-request-id": "id-7"})
    assert (reply.status_code, "gpu0" in reply.text) == (500, False)
    assert error_of(path, reply.json())["message"].endswith("under request id id-7")
    (record,) = [record for record in caplog.records if record.name == "rtap.errors"]
    assert record.getMessage().startswith("request id-7 failed")


OURS = ["AuthMiddleware", "BodyLimitsMiddleware", "RecursionMiddleware"]


async def test_a_request_passes_at_most_five_layers_of_ours(service, tmp_path):
    """With keys, and with every optional layer."""
    full = await asyncio.to_thread(make_service, tmp_path / "keys.toml", Settings(log_format="json"))
    for one, expected in ((service, OURS), (full, ["RequestLogMiddleware", *OURS])):
        passed = [type(layer) for layer in one.layers()]
        ours = [layer.__name__ for layer in passed if layer.__module__.startswith("rtap_server")]
        mounted = [middleware.cls.__name__ for middleware in one.app.user_middleware]
        assert ours == ["RequestIdMiddleware", *expected]
        assert [name for name in mounted if name in ours] == expected
        assert len(ours) <= 5


async def test_a_path_that_is_no_route_wants_a_key_too(service):
    # What begins with two slashes is a host to httpx: tests/e2e/test_keys.py has those.
    for path in ("/live/", "/live/../v1/models", "/v1", "/metricsx", "/v1/models/", "/page", "/page/../v1/models"):
        for method in ("GET", "OPTIONS", "POST", "HEAD"):
            assert (await service.ask(path, method=method)).status_code == 401, (method, path)


@pytest.mark.parametrize("key", ["key-a", "key-b", "key-vllm"])
async def test_vllms_own_guard_which_knows_one_key_is_gone(service, key):
    assert not {AuthenticationMiddleware, XRequestIdMiddleware} & {m.cls for m in service.app.user_middleware}
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
    service.engine.calls.clear()
    for key, more in (("key-a", {}), ("key-b", {}), ("key-a", {"cache_salt": "own"}), ("key-a", {})):
        reply = await service.ask(path, key, json=BODIES[path] | more)
        assert reply.status_code == 200, reply.text
    first, other, own, again = service.engine.salts
    assert first == again
    assert len({first, other, own, "own", None}) == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/inference/v1/generate"])
async def test_tokens_that_were_sampled_and_read_are_charged_to_the_key(service, path):
    """20 a minute, one in 3 s: the next request waits until nothing is owed and its own 20 are there."""
    service.forget_spending()
    first, second = [await service.ask(path, "key-poor", json=BODIES[path]) for _ in range(2)]
    assert (first.status_code, second.status_code) == (200, 429), second.text
    usage = first.json().get("usage")
    spent = usage["total_tokens"] if usage else len(service.engine.encode(CYCLE)) + 3
    assert abs(int(second.headers["retry-after"]) - (spent - 20 if spent > 20 else spent) * 3) <= 1
    assert second.json()["error"]["type"] == "rate_limit_error"
    service.forget_spending()


async def test_a_stream_begins_with_the_role_of_each_choice_and_has_nothing_empty(service):
    """The engine's first output, for a tag, has no text: vLLM sends the role with it and no chunk of its own.

    Without log-probabilities: with them vLLM sends a chunk for every output."""
    service.engine.size = 1
    chat = CHAT | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    answer = BODIES["/v1/responses"] | {"stream": True}
    replies = [await service.ask(path, "key-a", json=body) for path, body in
               (("/v1/chat/completions", chat), ("/v1/responses", answer))]  # fmt: skip
    service.engine.size = None
    chunks, events = ([json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
                      for reply in replies)  # fmt: skip
    written = [choice for chunk in chunks if "cycle" not in chunk.get("rtap", {}) for choice in chunk["choices"]]
    assert [(choice["index"], choice["delta"].get("role")) for choice in written[:3]] == [
        (0, "assistant"), (1, "assistant"), (written[2]["index"], None)
    ]  # fmt: skip
    assert all("role" not in c["delta"] and (any(c["delta"].values()) or c["finish_reason"]) for c in written[2:])
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(service.engine.encode(CYCLE))
    deltas = [event["delta"] for event in events if event["type"].endswith(".delta")]
    assert "".join(deltas) == "3+4=77"
    assert all(deltas)


async def test_the_server_takes_so_many_requests_at_a_time(service):
    before = service.rejected("overloaded")
    service.engine.calls.clear()
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


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/rtap/score", "/generative_scoring"])
async def test_other_work_takes_a_place_too(service, path):
    service.engine.calls.clear()
    service.engine.go.clear()
    asked = ["/v1/completions", "/inference/v1/generate"]
    held = [asyncio.create_task(service.ask(other, "key-a", json=BODIES[other])) for other in asked]
    async with asyncio.timeout(10):
        while len(service.engine.salts) < 2:
            await asyncio.sleep(0.01)
    refused = await service.ask(path, "key-b", json=BODIES.get(path, {}))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (await service.ask("/tokenize", "key-b", json={"model": "rtap", "prompt": "3"})).status_code == 200
    service.engine.go.set()
    assert [reply.status_code for reply in await asyncio.gather(*held)] == [200, 200]


async def test_the_server_takes_so_many_tokens_at_a_time(service):
    service.engine.calls.clear()
    service.engine.go.clear()
    held = asyncio.create_task(service.ask("/v1/chat/completions", "key-a", json=CHAT))
    async with asyncio.timeout(10):
        while not service.engine.salts:
            await asyncio.sleep(0.01)
    refused = await service.ask("/v1/chat/completions", "key-b", json=CHAT | {"max_tokens": 81})  # 20 of 100 are held
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "limit of 100 tokens in flight" in refused.json()["error"]["message"]
    service.engine.go.set()
    assert (await service.ask("/v1/chat/completions", "key-b", json=CHAT | {"max_tokens": 80})).status_code == 200
    assert (await held).status_code == 200
    alone = await service.ask("/v1/chat/completions", "key-b", json=CHAT | {"max_tokens": 101})
    assert alone.status_code == 200


async def test_choices_and_samples_take_places_and_multiply(service):
    service.engine.calls.clear()
    service.engine.go.clear()
    held = asyncio.create_task(service.ask("/v1/chat/completions", "key-a", json=CHAT | {"n": 2}))
    async with asyncio.timeout(10):
        while not service.engine.salts:
            await asyncio.sleep(0.01)
    assert (await service.ask("/v1/chat/completions", "key-b", json=CHAT)).status_code == 503
    service.engine.go.set()
    assert (await held).status_code == 200
    vote = {"prompt": ["hi"] * 64, "n": 16, "ignore_eos": True, "rtap": {"policy": "vote", "samples": 32}}
    reply = await service.ask("/v1/completions", "key-b", json=BODIES["/v1/completions"] | vote)
    assert reply.status_code == 400
    assert "asks for 32768 trajectories (prompts x n x samples), above" in reply.json()["error"]["message"]


async def test_choices_of_other_work_take_places(service):
    service.engine.calls.clear()
    service.engine.go.clear()
    body = BODIES["/inference/v1/generate"] | {"sampling_params": {"max_tokens": 20, "n": 2}}
    held = asyncio.create_task(service.ask("/inference/v1/generate", "key-a", json=body))
    async with asyncio.timeout(10):
        while not service.engine.salts:
            await asyncio.sleep(0.01)
    assert (await service.ask("/v1/chat/completions", "key-b", json=CHAT)).status_code == 503
    service.engine.go.set()
    assert (await held).status_code == 200


async def test_a_limited_key_generates_its_minute_at_most(service):
    """Without max_tokens a request gets the rest; with a larger one it is refused before it generates."""
    service.forget_spending()
    service.engine.calls.clear()
    chat = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    assert (await service.ask("/v1/chat/completions", "key-poor", json=chat)).status_code == 200
    assert service.engine.calls[0].params.max_tokens == 20
    service.forget_spending()
    refused = await service.ask("/v1/chat/completions", "key-poor", json=CHAT | {"max_tokens": 10, "n": 3})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "may generate 30 tokens, above the 20 tokens per minute of API key 'poor'" in refused.text
    service.forget_spending()


@pytest.mark.parametrize(
    "path", ["/scale_elastic_ep", "/is_scaling_elastic_ep", "/invocations", "/v1/chat/completions/batch"]
)
async def test_routes_that_vllm_always_mounts_and_nobody_asked_for_are_closed(service, path):
    reply = await service.ask(path, "key-a", json={"new_data_parallel_size": 1})
    assert reply.status_code == 400
    assert f"{path} is blocked on this server: " in reply.json()["error"]["message"]


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
            assert "retry on another server" in reply.json()["error"]["message"]
        ready, live = [await service.ask(path, method="GET") for path in ("/ready", "/live")]
        assert (ready.status_code, ready.json(), live.status_code) == (503, {"status": "draining"}, 200)
    finally:
        drain.has_begun = False
    assert service.rejected("draining") - before == len(BODIES)
    assert (await service.ask("/ready", method="GET")).status_code == 200
