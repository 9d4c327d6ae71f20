"""The soak test kills the generator and waits for its restart."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.stress.soak import SoakConfig, _kill
from tests.stress.soak_processes import GENERATOR
from tests.stress.soak_traffic import Traffic


class Server(ThreadingHTTPServer):
    """Metrics of a server that restarts its killed generator. seen: the flag at each scrape."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Metrics)
        self.traffic = Traffic(f"http://127.0.0.1:{self.server_port}", 0)
        self.killed, self.seen = 0, list[bool]()

    def kill(self) -> None:
        self.killed += 1

    def by_role(self) -> dict[str, "Server"]:
        return {GENERATOR: self}


class Metrics(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append(self.server.traffic.is_generator_away)
        up = self.server.killed if len(self.server.seen) > 3 else 0
        body = f"# TYPE rtap_engine_restarts counter\nrtap_engine_restarts_total {up}\n".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


async def test_clients_know_that_the_generator_is_away_until_its_restart():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = SoakConfig(seconds=0.8, warm_seconds=0, clients=1, seed=0, kill_seconds=0.2)
        lines = list[str]()
        async with asyncio.timeout(30):
            kills = await _kill(server.traffic, server, config, lines.append)  # type: ignore[arg-type]
        server.shutdown()
    assert (kills, server.killed, len(lines)) == (1, 1, 1)
    assert server.seen == [False, True, True, True]
    assert not server.traffic.is_generator_away
