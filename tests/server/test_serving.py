"""The web server and what watches over it, without engines: what breaks is not mistaken for a clean stop."""

import socket

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from server.__main__ import _parse
from server.drain import Drain
from server.limits import Admission
from server.metrics import Metrics
from server.serving import serve_app
from server.supervision import Supervisor, Ward
from tests.other_checkpoints import MODELS
from tests.server.live import LIMITS


async def test_a_supervisor_that_breaks_is_told_and_not_swallowed(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "")
    args, _, _ = _parse([str(MODELS / "policy")])
    drain = Drain()
    unknown = Ward("policy", object())  # type: ignore[arg-type] - an engine that has nothing of what is asked of it
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(ExceptionGroup) as caught:
        await serve_app(
            FastAPI(), args, sock, heads=LIMITS, drain=drain, drain_seconds=1.0, admission=Admission(1),
            supervisor=Supervisor([unknown], Metrics(CollectorRegistry()), 1.0, lambda _: None),
        )  # fmt: skip
    assert caught.group_contains(AttributeError)
    assert drain.has_begun
