"""The gateway on a local Ray, with replicas of a tiny server that a request can end."""

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from ray import serve

from deploy.ray.app import FleetGateway, Replica

pytestmark = pytest.mark.slow
PROGRAM = (sys.executable, str(Path(__file__).with_name("tiny_server.py")))
REPLICAS = 4


@pytest.fixture(scope="module")
def fleet() -> Iterator[httpx.Client]:
    """A client of REPLICAS replicas."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, logging_level=logging.ERROR)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        replica = Replica.options(num_replicas=REPLICAS, ray_actor_options={"num_cpus": 0})
        gateway = FleetGateway.options(ray_actor_options={"num_cpus": 0})
        serve.run(gateway.bind(replica.bind([], None, PROGRAM), None, 4096), route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def servers() -> set[int]:
    """Process ids of the tiny servers."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if PROGRAM[1] in command_of(child)}


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for_replicas(fleet: httpx.Client) -> None:
    until = time.monotonic() + 120
    while fleet.get("/ready").json().get("replicas") != REPLICAS:
        assert time.monotonic() < until
        time.sleep(0.5)


@pytest.mark.parametrize("session", ["", "one"])
def test_a_request_that_ends_its_server_ends_two_of_them(fleet: httpx.Client, session: str) -> None:
    wait_for_replicas(fleet)
    before = servers()
    headers = {"x-session-id": session} if session else {}
    reply = fleet.post("/die", headers=headers)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (502, "false")
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    time.sleep(1)
    assert len(before & servers()) == REPLICAS - 2
    assert fleet.get("/seen").status_code == 200


def test_errors_of_the_gateway_have_the_servers_shape(fleet: httpx.Client) -> None:
    reply = fleet.post("/echo", content=b"x" * 5000)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
