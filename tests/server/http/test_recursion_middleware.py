"""Whatever stands in a request's ``rtap``: a good one comes to the route without it, a bad one is a sentence. And five
times as many requests as there is room for."""

import asyncio
import json
import time
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from rtap_core.artifact import Artifact
from rtap_core.errors import InvalidRequest
from rtap_core.format import RTAP, THINK
from rtap_core.types import Policy
from rtap_server.engine.request_state import RequestState, current_request
from rtap_server.engine.server_state import Drain, ServerState
from rtap_server.http.admission import Admission
from rtap_server.http.body_limits import BodyLimitsMiddleware, BodyMemory
from rtap_server.http.field_limits import FieldLimits
from rtap_server.http.recursion_fields import (
    RecursionMiddleware,
    parse_options,
    read_recursion_fields,
    resolve_limits,
)
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.http.route_kinds import RECURSIVE_PATHS
from rtap_server.http.schema import RtapOptions
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics
from tests.error_shapes import error_of
from tests.server.http.test_recursion_fields import _JSON, _OPTIONS, SETTINGS


class Sure:
    """A confidence source that is never asked."""


def server_state(metrics: Metrics) -> ServerState:
    return ServerState(
        settings=SETTINGS, format=RTAP, confidence=Sure(), generator=Artifact(), count_oops=len, encode=list,  # type: ignore[arg-type]
        decode=lambda _ids, _: "", end_of_turn_ids=frozenset(), metrics=metrics, feedback=Feedback(), drain=Drain(),
    )  # fmt: skip


def limits_of(options: RtapOptions):
    return resolve_limits(options, SETTINGS, Artifact(), has_confidence=True)


class Service:
    """The layers before a route, and a route that keeps what it was given."""

    def __init__(self, places: int = 1, seconds: float = 0.0) -> None:
        """seconds: that the route takes."""
        metrics = Metrics(CollectorRegistry())
        self.admission = Admission(places)
        self.taken, self.seconds, self.most_in_flight, self.tokens_in_flight = [], seconds, 0, 0
        work = RecursionMiddleware(
            self.route, server=server_state(metrics), admission=self.admission, max_model_len=1024
        )  # fmt: skip
        limits = FieldLimits(16, 1024, 1024, allows_templates=False)
        self.app = RequestIdMiddleware(
            BodyLimitsMiddleware(
                work, routes=[Route(path, print, methods=["POST"]) for path in RECURSIVE_PATHS],
                max_body_bytes=2**20, body_timeout_seconds=30.0, memory=BodyMemory(2**24), field_limits=limits,
                admission=self.admission, drain=Drain(), metrics=metrics,
            )
        )  # fmt: skip

    async def route(self, scope, receive, send) -> None:
        self.taken.append((json.loads((await receive())["body"]), current_request()))
        self.most_in_flight = max(self.most_in_flight, self.admission.requests_in_flight)
        self.tokens_in_flight = self.admission.tokens_in_flight
        await asyncio.sleep(self.seconds)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, path: str, body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://rtap") as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})


SERVICE = Service()
BODY = b'{"model": "rtap", "messages": []}'


@given(st.sampled_from(sorted(RECURSIVE_PATHS)), st.one_of(_OPTIONS, _JSON))
def test_options_are_taken_out_or_refused_and_the_place_is_given_back(path, raw):
    SERVICE.taken.clear()
    reply = asyncio.run(SERVICE.ask(path, json.dumps({"model": "rtap", "stop": None, "rtap": raw}).encode()))
    assert SERVICE.admission.requests_in_flight == 0
    if reply.status_code == 200:
        ((body, state),) = SERVICE.taken
        assert body == {"model": "rtap", "stop": None}
        assert state.limits == limits_of(parse_options({"rtap": raw}, SETTINGS))
    else:
        error = error_of(path, reply.json())
        assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
        assert (error.get("param") or "rtap").startswith("rtap")  # NaN is no JSON, and no field of it
        assert not SERVICE.taken


@pytest.mark.parametrize("field", ["use_beam_search", "background"])
async def test_what_would_escape_the_recursion_is_refused(field):
    SERVICE.taken.clear()
    reply = await SERVICE.ask("/v1/responses", json.dumps({"model": "rtap", field: True}).encode())
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
    assert not SERVICE.taken


def test_min_tokens_is_refused_where_it_would_mask_the_end_of_an_answer():
    server = server_state(Metrics(CollectorRegistry()))
    for value in (3, "3", 1.0):
        state = RequestState(fields={"min_tokens": value})
        with pytest.raises(InvalidRequest, match=r"min_tokens=\d .* </answer>; leave out"):
            read_recursion_fields(state, "/v1/completions", server)
        read_recursion_fields(state, "/v1/completions", replace(server, format=THINK))
    for value in (0, None, -1, "x"):  # the last two are vLLM's to refuse
        read_recursion_fields(RequestState(fields={"min_tokens": value}), "/v1/completions", server)


async def test_options_among_the_xargs_count_for_places_cycles_and_the_reply_alike():
    SERVICE.taken.clear()
    xargs = {"rtap_policy": "vote", "rtap_samples": 3, "rtap_return_cycles": True, "other": 1}
    reply = await SERVICE.ask("/v1/messages", json.dumps({"max_tokens": 9, "vllm_xargs": xargs}).encode())
    ((body, state),) = SERVICE.taken
    assert (reply.status_code, body) == (200, {"max_tokens": 9, "vllm_xargs": xargs})
    assert state.limits == limits_of(RtapOptions(policy=Policy.VOTE, samples=3))
    assert state.return_cycles
    assert SERVICE.tokens_in_flight == 3 * 9


async def test_at_five_times_the_load_those_who_are_taken_wait_no_longer_and_the_rest_are_told_at_once():
    """The same of the real server, measured: docs/results/overload.md."""
    places, seconds, lasting = 8, 0.2, 2.0
    service, waits = Service(places, seconds), {200: [], 503: []}

    async def ask() -> None:
        began = time.perf_counter()
        reply = await service.ask("/v1/chat/completions", BODY)
        waits[reply.status_code].append(time.perf_counter() - began)
        assert reply.status_code == 200 or reply.headers["retry-after"] == "1"

    asked, began = set(), time.perf_counter()
    capacity = places / seconds
    while (now := time.perf_counter() - began) < lasting:
        asked |= {asyncio.create_task(ask()) for _ in range(int(5 * capacity * now) - len(asked))}
        await asyncio.sleep(0.01)
    await asyncio.gather(*asked)
    assert service.most_in_flight == places
    assert len(waits[200]) > 0.7 * capacity * lasting
    assert len(waits[503]) > 2 * len(waits[200])
    waits = {status: sorted(took) for status, took in waits.items()}
    assert waits[200][len(waits[200]) // 2] < 1.5 * seconds
    assert waits[503][len(waits[503]) // 2] < 0.05
