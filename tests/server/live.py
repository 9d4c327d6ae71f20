"""A real uvicorn in a thread, for what needs a socket: parsing, pipelining, disconnects, streams."""

import contextlib
import socket
import threading
import time
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp


@contextlib.contextmanager
def serving(app: ASGIApp) -> Generator[int]:
    """The port of ``app``, served as ``rtap serve`` serves it."""
    config = uvicorn.Config(
        app, port=0, log_config=None, lifespan="off", http="h11", h11_max_incomplete_event_size=8192
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest_of(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    reply = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            reply += part
    return reply


def exchange(port: int, *parts: bytes) -> bytes:
    """The reply to bytes as they are; they are sent while the other side takes them."""
    with connect(port) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                sock.sendall(part)
        return rest_of(sock)
