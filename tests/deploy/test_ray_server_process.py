"""A replica's server process, with a tiny server in the place of the real one."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.ray.gateway import ReplicaLost
from deploy.ray.server_process import ServerProcess, check_flags
from deploy.ray.traffic import ForwardedRequest, ResponseStart

PROGRAM = (sys.executable, str(Path(__file__).with_name("tiny_server.py")))
ROOT = Path(__file__).resolve().parents[2]


@contextlib.asynccontextmanager
async def child(*flags: str) -> AsyncIterator[ServerProcess]:
    """Made in the test's own loop, which its connections belong to."""
    started = await ServerProcess.start(flags, program=PROGRAM)
    try:
        yield started
    finally:
        await started.stop()


async def read(server: ServerProcess, request: ForwardedRequest) -> tuple[ResponseStart, bytes]:
    parts = [part async for part in server.send(request)]
    assert isinstance(parts[0], ResponseStart)
    return parts[0], b"".join(part for part in parts[1:] if isinstance(part, bytes))


async def test_requests_reach_the_server_and_replies_come_back() -> None:
    async with child() as server:
        head, body = await read(
            server, ForwardedRequest("POST", "/echo", b"x=%20y", ((b"authorization", b"Bearer k"),), b"hello")
        )
        assert (head.status, dict(head.headers)[b"retry-after"]) == (202, b"7")
        assert b'"body": "hello"' in body
        assert b'"query": "x=%20y"' in body
        assert b'"key": "Bearer k"' in body
        assert not {b"date", b"server", b"connection"} & set(dict(head.headers))


async def test_leaving_a_stream_aborts_it_at_the_server() -> None:
    async with child() as server:
        reply = server.send(ForwardedRequest("POST", "/stream"))
        head = await anext(reply)
        assert isinstance(head, ResponseStart)
        assert head.is_stream
        assert await anext(reply) == b"data: 1\n\n"
        await reply.aclose()
        until = time.monotonic() + 5
        while (await read(server, ForwardedRequest("GET", "/seen")))[1] != b"1":
            assert time.monotonic() < until
            await asyncio.sleep(0.02)


async def test_a_server_that_dies_is_a_lost_replica() -> None:
    async with child() as server:
        with pytest.raises(ReplicaLost):
            await read(server, ForwardedRequest("POST", "/die"))
        assert await server.ended() == 9
        assert await server.status("/ready") == 0
        with pytest.raises(ReplicaLost):
            await read(server, ForwardedRequest("GET", "/seen"))


async def test_a_server_that_never_becomes_ready_is_told() -> None:
    with pytest.raises(ReplicaLost, match="exit code 2"):
        await ServerProcess.start(["--fail"], program=PROGRAM)


def test_the_server_ends_with_its_replica_however_that_ended() -> None:
    code = (
        "import asyncio, sys\nfrom deploy.ray.server_process import ServerProcess\n"
        "async def main():\n"
        f"    child = await ServerProcess.start([], program={PROGRAM!r})\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    replica = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert replica.stdout is not None
    server = int(replica.stdout.readline())
    os.kill(server, 0)
    replica.send_signal(signal.SIGKILL)
    replica.wait()
    replica.stdout.close()
    until = time.monotonic() + 5
    while Path(f"/proc/{server}/cmdline").exists() and Path(f"/proc/{server}/cmdline").read_bytes():
        assert time.monotonic() < until, "the server outlived its replica"
        time.sleep(0.02)


@pytest.mark.parametrize("flag", ["--port", "--host=0.0.0.0", "--uds", "--api-keys-file"])
def test_flags_that_are_the_fleets_are_refused(flag: str) -> None:
    check_flags(["--max-model-len", "1024"])
    with pytest.raises(ValueError, match=flag.split("=")[0]):
        check_flags(["--max-model-len", "1024", flag, "x"])
