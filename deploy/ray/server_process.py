"""One ``rtap serve`` process behind a Unix socket, as a replica runs it, and requests handed to it over HTTP.

A process of its own, because the server takes over signals, the event loop and vLLM's processes; its flags, drain and
metrics are then those of any other `rtap serve`. Knows nothing of Ray.
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
from deploy.ray.traffic import Asked, Head

CHECKOUT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 10.0
_OF_THIS_HOP = frozenset({b"connection", b"transfer-encoding", b"keep-alive", b"date", b"server"})
_OWNED_FLAGS = ("--host", "--port", "--uds", "--api-keys-file")


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags that belong to the fleet. Raises ValueError."""
    owned = [flag for flag in flags if flag.split("=")[0] in _OWNED_FLAGS]
    if owned:
        raise ValueError(f"leave out {', '.join(owned)}: a replica listens on a socket that its gateway alone knows; "
                         "keys are named by api_keys_file")  # fmt: skip


class Child:
    """A running server. Make one with ``start``."""

    def __init__(self, process: asyncio.subprocess.Process, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._process, self._folder = process, folder
        self._http = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(_socket(folder), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    @classmethod
    async def start(
        cls,
        flags: Sequence[str],
        api_keys_file: Path | None = None,
        program: Sequence[str] = (sys.executable, "-m", "rtap_server"),
    ) -> "Child":
        """Returns when it is ready. Raises ReplicaLost if it ends before."""
        folder = tempfile.TemporaryDirectory(prefix="rtap-replica-")
        keys = [] if api_keys_file is None else ["--api-keys-file", str(api_keys_file)]
        # setpriv: when the replica dies, by whatever hand, the kernel tells the server to end as well
        command = ["setpriv", "--pdeathsig", "TERM", *program, *flags, *keys]
        process = await asyncio.create_subprocess_exec(
            *command, "--uds", _socket(folder), cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
        )
        child = cls(process, folder)
        while await child.status("/ready") != 200:
            if process.returncode is not None:
                await child.stop()
                raise ReplicaLost(f"rtap serve ended with exit code {process.returncode} before it was ready")
            await asyncio.sleep(0.2)
        return child

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid

    async def ended(self) -> int:
        """Its exit code, when it has ended."""
        return await self._process.wait()

    async def status(self, path: str) -> int:
        """HTTP status of a GET; 0 while nothing listens."""
        try:
            async with self._http.get(_url(path, b""), timeout=aiohttp.ClientTimeout(total=4)) as reply:
                return reply.status
        except (aiohttp.ClientError, TimeoutError):
            return 0

    async def ask(self, asked: Asked) -> AsyncGenerator[Head | bytes]:
        """A reply: its head, then its body as it comes. Closing the generator closes the connection, which is how the
        server is told to abort. Raises ReplicaLost."""
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in asked.headers]
        try:
            async with self._http.request(
                asked.method, _url(asked.path, asked.query), headers=headers, data=asked.body, allow_redirects=False
            ) as reply:
                yield Head(reply.status, tuple((k, v) for k, v in _lowered(reply.raw_headers) if k not in _OF_THIS_HOP))
                async for part in reply.content.iter_any():
                    yield part
        except aiohttp.ClientError as error:
            raise ReplicaLost(f"rtap serve: {type(error).__name__}") from error

    async def stop(self) -> None:
        """SIGTERM, on which the server drains, then for certain. May be called twice."""
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
    """The host is of no meaning on a socket."""
    return URL.build(scheme="http", host="replica", path=path, query_string=query.decode("latin-1"))
