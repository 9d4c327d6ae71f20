"""A client that asks for a stream and never reads it, against the whole service."""

import json
import socket
import time

from rtap_server.settings import Settings
from tests.server.live import serving
from tests.server.whole import make_service

LONG_NAME = "m" * 4000  # every event has it, so that the buffers of both sides are full soon
BODY = {
    "model": LONG_NAME,
    "stream": True,
    "n": 4,
    "max_tokens": 900,
    "rtap": {"policy": "single"},
    "messages": [{"role": "user", "content": "3 + 4"}],
}


def test_its_place_and_the_engine_are_free_soon_after():
    service = make_service(None, Settings(), "--served-model-name", LONG_NAME)
    service.engine.script = lambda _: "<think>" + "12 + 7 = 19 " * 200
    service.engine.size, service.engine.token_seconds = 1, 0.02
    service.app.middleware_stack._stall_seconds = 1.0

    def in_flight() -> float:
        return service.registry.get_sample_value("rtap_in_flight") or 0.0

    body = json.dumps(BODY).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    with serving(service.app) as port, socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects: the window is set then
        stalled.connect(("127.0.0.1", port))
        stalled.sendall(head % len(body) + body)
        until = time.monotonic() + 60
        while not in_flight() and time.monotonic() < until:
            time.sleep(0.01)
        assert in_flight() == 1
        while in_flight() and time.monotonic() < until:
            time.sleep(0.05)
        assert in_flight() == 0
        sampled = service.engine.num_sampled
        assert sampled < 4 * 900  # it has not run to the end
        time.sleep(0.3)
        assert (service.engine.num_sampled, service.engine.num_closed) == (sampled, 4)
