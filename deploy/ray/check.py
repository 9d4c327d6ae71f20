# pyright: reportUnknownMemberType=false
# Ray is only half typed.
"""Check and measure deploy/ray on a local Ray with two CPU replicas of the bundled models.

    python -m deploy.ray.check

Checks keys and limits, stickiness, abort, a killed server, a killed replica and a drained replica under load. Reports
the throughput of two replicas, of one, and of a replica without gateway. Takes about ten minutes.
"""

import argparse
import asyncio
import logging
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]
from ray.serve.schema import ServeDeploySchema

from benchmarks.harness import RESULTS, ROOT, list_info, questions_of, run_info, write_report
from deploy.ray.check_client import CONCURRENT, Client, ClientReply, wait_for

KEYS = """
[[keys]]
name = "client"
key = "client-key"
[[keys]]
name = "six"
key = "six-a-minute"
requests_per_minute = 6
[[keys]]
name = "tokens"
key = "tokens-a-minute"
tokens_per_minute = 300
[[keys]]
name = "scraper"
key = "metrics-key"
scope = "metrics"
"""


def servers() -> list[psutil.Process]:
    """Server processes of this fleet's replicas."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if {"rtap_server", "--uds"} <= set(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def fleet(keys: Path) -> Generator[tuple[str, Callable[[int], None]]]:
    """(address, function that sets the number of replicas) of a fleet on a new local Ray."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ray's default is 15. The case of the name is Ray's.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=tempfile.mkdtemp(prefix="ray"), logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def scale(replicas: int) -> None:
        """Deploy with another number of replicas; the others keep running."""
        config = yaml.safe_load((ROOT / "deploy" / "ray" / "config.yaml").read_text(encoding="utf-8"))
        (application,) = config["applications"]
        application["args"]["api_keys_file"] = str(keys)
        (replica,) = application["deployments"]
        del replica["autoscaling_config"]
        replica["num_replicas"] = replicas
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(config))

    try:
        scale(2)
        yield f"http://127.0.0.1:{port}", scale
    finally:
        serve.shutdown()
        ray.shutdown()


async def check_keys(url: str, questions: Sequence[str]) -> str:
    """Requests without a key are refused; limits of a key count over both replicas."""
    nobody = await Client(url, key="wrong").chat(questions[0], 1)
    six = await Client(url, key="six-a-minute").many([{"question": q, "seed": 1} for q in questions[:12]])
    statuses = Counter(reply.status for reply in six)
    spender, spent = Client(url, key="tokens-a-minute"), [ClientReply(200, "", "done", 0)]
    for question in questions:
        if spent[-1].status != 200:
            break
        spent.append(await spender.chat(question, 1))
    tokens = [reply.tokens for reply in spent[:-1]]
    replicas = {reply.replica for reply in (*six, *spent) if reply.replica}
    assert nobody.status == 401
    assert statuses == {200: 6, 429: 6}, statuses
    assert spent[-1].status == 429
    assert sum(tokens[:-1]) <= 300 <= sum(tokens), tokens
    assert len(replicas) == 2
    return (
        f"401 without a key; 6 of 12 at 6 a minute; 300 tokens a minute: refused after {sum(tokens)}; on both replicas"
    )


async def check_sticky(client: Client, questions: Sequence[str]) -> str:
    """All turns of a conversation reach one replica and its prefix cache; conversations spread over both."""
    replicas, cached = list[set[str]](), 0
    for question in questions[:12]:
        seen, turns = set[str](), list[dict[str, str]]()
        for _ in range(3):
            reply = await client.chat(question, 1, turns=turns)
            seen.add(reply.replica)
            cached += reply.cached if turns else 0
            turns += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "Are you sure?"}]
        replicas.append(seen)
    shares = Counter(next(iter(seen)) for seen in replicas)
    assert all(len(seen) == 1 for seen in replicas), replicas
    assert len(shares) == 2, shares
    assert cached > 0
    return f"12 conversations of 3 turns, each at one replica, {sorted(shares.values())}; {cached} later tokens cached"


async def check_abort(client: Client, question: str) -> str:
    """A disconnect reaches the engine through gateway and replica."""
    before = await client.metric("rtap_requests_total", stop_reason="abandoned")
    began = time.monotonic()
    await client.leave_early(question)
    while await client.metric("rtap_requests_total", stop_reason="abandoned") == before:
        assert time.monotonic() - began < 15, "the request is still running after its client disconnected"
        await asyncio.sleep(0.2)
    left = await client.metric("rtap_trajectories")
    return f"counted as abandoned after {time.monotonic() - began:.1f} s, {left:.0f} in flight"


async def check_killed(client: Client, jobs: Sequence[Mapping[str, Any]], victim: Callable[[], int]) -> str:
    """Kill a process while ``jobs`` run: no unstreamed reply is lost, and every cut stream ends with an error event."""
    retried, running = await client.metric("rtap_gateway_retries_total"), asyncio.ensure_future(client.many(jobs))
    await asyncio.sleep(2)
    os.kill(victim(), signal.SIGKILL)
    replies = await running
    again = await wait_for(client, 2)
    endings = Counter(
        ("stream" if job["stream"] else "whole", t.status, t.ending) for job, t in zip(jobs, replies, strict=True)
    )
    allowed = {("whole", 200, "done"), ("stream", 200, "done"), ("stream", 200, "error")}
    assert set(endings) <= allowed, endings
    retries = await client.metric("rtap_gateway_retries_total") - retried
    broken = endings["stream", 200, "error"]
    return (
        f"{len(jobs)} requests, half of them streams: all whole ones answered, {broken} streams ended with an "
        f"error event, none silently; {retries:.0f} retries; two replicas again after {again:.0f} s"
    )


async def check_drain(client: Client, jobs: Sequence[Mapping[str, Any]], scale: Callable[[int], None]) -> str:
    """Remove a replica while ``jobs`` run: all are answered."""
    running = asyncio.ensure_future(client.many(jobs))
    await asyncio.sleep(2)
    await asyncio.to_thread(scale, 1)
    replies = await running
    assert all((t.status, t.ending) == (200, "done") for t in replies), Counter((t.status, t.ending) for t in replies)
    await wait_for(client, 1)
    return f"{len(jobs)} requests while one of two replicas left: all answered"


async def measure(client: Client, questions: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Throughput of a replica's socket, of one replica through the gateway, and of both, in turns."""
    command = servers()[0].cmdline()
    direct = Client("http://replica", socket=command[command.index("--uds") + 1])
    ways: dict[str, tuple[Client, str]] = {
        "one replica, directly": (direct, ""),
        "one replica, gateway": (client, "one"),
        "two replicas, gateway": (client, ""),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    latencies: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, (sender, session) in ways.items():
            jobs = [{"question": q, "seed": number, "session": session} for q in questions]
            began = time.monotonic()
            replies = await sender.many(jobs)
            assert {t.status for t in replies} == {200}
            if number:  # the first round warms up
                rates[way].append(len(jobs) / (time.monotonic() - began))
                latencies[way] += [t.seconds for t in replies]
    base = rates["one replica, gateway"]
    return [
        {
            "way": way,
            "requests/s": round(statistics.mean(rates[way]), 2),
            "median ms": round(1000 * statistics.median(latencies[way])),
            "ratio to one through the gateway, by round": [
                round(a / b, 2) for a, b in zip(rates[way], base, strict=True)
            ],
        }
        for way in ways
    ]


async def check(url: str, scale: Callable[[int], None], options: argparse.Namespace) -> dict[str, Any]:
    """All checks in order."""
    client, seen = Client(url), dict[str, Any]()
    seen["ready"] = f"two replicas after {await wait_for(client, 2, 400):.0f} s"
    questions = [question.text for question in questions_of([])]
    random.Random(options.seed).shuffle(questions)
    long = [
        {"question": q, "seed": i, "stream": bool(i % 2), "threshold": 1, "max_cycles": 6}
        for i, q in enumerate(questions)
    ]

    def report(name: str, text: str) -> None:
        seen[name] = text
        print(f"{name}: {text}", flush=True)

    report("keys and limits", await check_keys(url, questions))
    report("stickiness", await check_sticky(client, questions))
    report("a client disconnects", await check_abort(client, questions[0]))
    throughput = await measure(client, questions[: options.requests], options.rounds)
    report("a server is killed", await check_killed(client, long[: options.requests], lambda: servers()[0].pid))
    parent: Callable[[], int] = lambda: servers()[0].ppid()  # noqa: E731
    report("a replica is killed", await check_killed(client, long[: options.requests], parent))
    report("a replica is removed", await check_drain(client, long[: options.requests], scale))
    return {"seen": seen, "throughput": throughput}


def markdown(info: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The report."""
    lines = ["# Replicas on Ray Serve", "", *list_info(info), "", "| check | result |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in found["seen"].items()]
    columns = list(found["throughput"][0])
    lines += ["", f"{CONCURRENT} at a time, in turns, all on the same cores:", "", f"| {' | '.join(columns)} |"]
    lines += [
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(str(row[c]) for c in columns)} |" for row in found["throughput"]),
    ]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="check.py", description="Check and measure deploy/ray on this machine.")
    parser.add_argument("--requests", type=int, default=96, help="requests of a round (default: 96)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the throughput (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of questions (default: 0)")
    parser.add_argument("--output", type=Path, default=RESULTS / "ray", help="folder of the report")
    options = parser.parse_args(argv)
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text(KEYS, encoding="utf-8")
        with fleet(keys) as (url, scale):
            found = asyncio.run(check(url, scale, options))
    info = run_info(__file__, argv, started, seed=options.seed)
    write_report(options.output, "ray", {"run": info, **found}, markdown(info, found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
