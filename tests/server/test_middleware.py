"""Whatever stands in a request's ``rtap``: a good one comes to the route without it, a bad one is a sentence."""

import asyncio
import json

import httpx
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from server.caps import Caps
from server.drain import Drain
from server.edge import Edge
from server.feedback import Feedback
from server.intake import Intake
from server.limits import Admission
from server.metrics import Metrics
from server.middleware import RecursionMiddleware
from server.routing import RECURSIVE_PATHS
from server.wire import current_exchange, parse_options
from tests.server.test_wire import _JSON, _OPTIONS, SETTINGS


class Service:
    """The layers before a route, and a route that keeps what it was given."""

    def __init__(self) -> None:
        metrics = Metrics(CollectorRegistry())
        self.admission = Admission(1)
        self.taken = []
        work = RecursionMiddleware(
            self.route, settings=SETTINGS, metrics=metrics, feedback=Feedback(), admission=self.admission,
            max_model_len=1024,
        )  # fmt: skip
        caps = Caps(16, 1024, 1024, allows_templates=False)
        self.app = Edge(
            Intake(
                work, max_body_bytes=2**20, caps=caps, admission=self.admission, drain=Drain(), metrics=metrics
            )
        )  # fmt: skip

    async def route(self, scope, receive, send) -> None:
        self.taken.append((json.loads((await receive())["body"]), current_exchange()))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, path: str, body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://rtap") as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})


SERVICE = Service()


@given(st.sampled_from(sorted(RECURSIVE_PATHS)), st.one_of(_OPTIONS, _JSON))
def test_options_are_taken_out_or_refused_and_the_place_is_given_back(path, raw):
    SERVICE.taken.clear()
    reply = asyncio.run(SERVICE.ask(path, json.dumps({"model": "rtap", "stop": None, "rtap": raw}).encode()))
    assert SERVICE.admission.requests_in_flight == 0
    if reply.status_code == 200:
        ((body, exchange),) = SERVICE.taken
        assert body == {"model": "rtap", "stop": None}
        assert exchange.options == parse_options(raw, SETTINGS)
    else:
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["type"]) == (400, 400, "invalid_request_error")
        assert (error["param"] or "rtap").startswith("rtap")  # NaN is no JSON, and no field of it
        assert not SERVICE.taken
