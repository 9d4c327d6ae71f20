"""Server that `rtap chat MODEL` starts and stops."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator

import httpx

BUNDLED = "rtap"  # name of the bundled models
_POLL_SECONDS = 0.3
_STOP_SECONDS = 30


class ServerFailed(Exception):
    """The server ended before it was ready; the text is its last message."""


@contextlib.contextmanager
def started_server(model: str, show: Callable[[float], None]) -> Generator[str]:
    """Address of a server of ``model``, which stops at the end. show: called with the seconds while it loads.

    Raises ServerFailed."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    named = [] if model == BUNDLED else [model]
    command = [sys.executable, "-m", "rtap_server", *named, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        # Its own session: Ctrl-C stops an answer, not the server.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            began = time.monotonic()
            while not _is_ready(url):
                if process.poll() is not None:
                    log.seek(0)
                    lines = log.read().decode("utf-8", "replace").strip().splitlines() or ["it ended without a message"]
                    raise ServerFailed(lines[-1].removeprefix("rtap serve: "))
                show(time.monotonic() - began)
                time.sleep(_POLL_SECONDS)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
