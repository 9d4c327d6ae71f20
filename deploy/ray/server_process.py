"""One ``rtap serve`` process behind a Unix socket, and HTTP requests to it.

A separate process, because the server takes over signals, the event loop and vLLM's processes. Ray is not used here.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path

import aiohttp
from yarl import URL

from deploy.ray.gateway import ReplicaLost
from deploy.ray.traffic import ForwardedRequest, ResponseStart

CHECKOUT = Path(__file__).resolve().parents[2]
SERVE = (sys.executable, "-m", "rtap_server")
STOP_SECONDS = 10.0
_HOP_HEADERS = frozenset({b"connection", b"transfer-encoding", b"keep-alive", b"date", b"server"})
_OWNED_FLAGS = ("--host", "--port", "--uds", "--api-keys-file")


def check_flags(flags: Sequence[str]) -> None:
    """Raise ValueError for flags that the fleet sets."""
    owned = [flag for flag in flags if flag.split("=")[0] in _OWNED_FLAGS]
    if owned:
        raise ValueError(f"flags {', '.join(owned)} are set by the fleet: remove them; name keys with api_keys_file")


class ServerProcess:
    """A running server, created by ``start``."""

    def __init__(self, process: asyncio.subprocess.Process, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._process, self._folder = process, folder
        self._http = aiohttp.ClientSession(
            # A kept connection may be closed by a server that is well; a new one fails only when the server is lost.
            connector=aiohttp.UnixConnector(_socket(folder), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    @classmethod
    async def start(
        cls,
        flags: Sequence[str],
        api_keys_file: Path | None = None,
        program: Sequence[str] = SERVE,
    ) -> "ServerProcess":
        """Start a server and wait until it is ready. Raises ReplicaLost when it ends before."""
        folder = tempfile.TemporaryDirectory(prefix="rtap-replica-")
        keys = [] if api_keys_file is None else ["--api-keys-file", str(api_keys_file)]
        # setpriv: the kernel sends SIGTERM to the server when the replica dies
        command = ["setpriv", "--pdeathsig", "TERM", *program, *flags, *keys]
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = await asyncio.create_subprocess_exec(
            *command, "--uds", _socket(folder), cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path}
        )
        server = cls(process, folder)
        while await server.status("/ready") != 200:
            if process.returncode is not None:
                await server.stop()
                raise ReplicaLost(f"rtap serve ended with exit code {process.returncode} before it was ready")
            await asyncio.sleep(0.2)
        return server

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    async def ended(self) -> int:
        """Wait for its end. Returns the exit code."""
        return await self._process.wait()

    async def status(self, path: str) -> int:
        """HTTP status of a GET; 0 while nothing listens."""
        try:
            async with self._http.get(_url(path, b""), timeout=aiohttp.ClientTimeout(total=4)) as reply:
                return reply.status
        except (aiohttp.ClientError, TimeoutError):
            return 0

    async def send(self, request: ForwardedRequest) -> AsyncGenerator[ResponseStart | bytes]:
        """Yield the start of the reply, then its body in parts.

        Closing the generator closes the connection, which aborts the request. Raises ReplicaLost."""
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in request.headers]
        try:
            async with self._http.request(
                request.method,
                _url(request.path, request.query),
                headers=headers,
                data=request.body,
                allow_redirects=False,
            ) as reply:
                headers_seen = _lowered(reply.raw_headers)
                yield ResponseStart(reply.status, tuple((k, v) for k, v in headers_seen if k not in _HOP_HEADERS))
                async for part in reply.content.iter_any():
                    yield part
        except aiohttp.ClientError as error:
            raise ReplicaLost(f"rtap serve: {type(error).__name__}") from error

    async def stop(self) -> None:
        """Send SIGTERM, on which the server drains, then SIGKILL. Idempotent."""
        await self._http.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                self._process.kill()
        self._folder.cleanup()


def _lowered(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    return ((name.lower(), value) for name, value in headers)


def _socket(folder: tempfile.TemporaryDirectory[str]) -> str:
    return str(Path(folder.name) / "http")


def _url(path: str, query: bytes) -> URL:
    """URL on a socket, where the host has no meaning."""
    return URL.build(scheme="http", host="replica", path=path, query_string=query.decode("latin-1"))
