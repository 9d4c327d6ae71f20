# pyright: reportUnknownMemberType=false
# Ray is only half typed.
"""deploy/ray on a Ray of its own on this machine, two CPU replicas of the bundled models: what holds, how fast it is.

Keys and limits, stickiness, abort, a server and then a whole replica killed under load, a replica drained under load;
and the throughput of two replicas against one and against a replica asked directly. Everything must hold; throughput
is only reported. All requests stay on this machine. Takes about ten minutes.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import shlex
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
from bench_servers import bench_questions, run_of
from fleet_client import CONCURRENT, Client, Told, wait_for
from ray import serve
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]
from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).resolve().parents[1]
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
    """The server processes of this fleet's replicas."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if {"rtap_server", "--uds"} <= set(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def fleet(keys: Path) -> Generator[tuple[str, Callable[[int], None]]]:
    """(address, function that sets the number of replicas) of a fleet on a Ray of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # 15 by default: whatever else runs here would come first. The name is Ray's, in this case
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=tempfile.mkdtemp(prefix="ray"), logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def scale(replicas: int) -> None:
        """As `serve deploy` does with a changed file: what has not changed goes on running."""
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
    """Refused without a key; limits of a key count over both replicas."""
    nobody = await Client(url, key="wrong").ask(questions[0], 1)
    six = await Client(url, key="six-a-minute").many([{"question": q, "seed": 1} for q in questions[:12]])
    statuses = Counter(told.status for told in six)
    spender, spent = Client(url, key="tokens-a-minute"), [Told(200, "", "done", 0)]
    for question in questions:
        if spent[-1].status != 200:
            break
        spent.append(await spender.ask(question, 1))
    tokens = [told.tokens for told in spent[:-1]]
    replicas = {told.replica for told in (*six, *spent) if told.replica}
    assert nobody.status == 401
    assert statuses == {200: 6, 429: 6}, statuses
    assert spent[-1].status == 429
    assert sum(tokens[:-1]) <= 300 <= sum(tokens), tokens
    assert len(replicas) == 2
    return (
        f"401 without a key; 6 of 12 at 6 a minute; 300 tokens a minute: refused after {sum(tokens)}; on both replicas"
    )


async def check_sticky(client: Client, questions: Sequence[str]) -> str:
    """All turns of a conversation at one replica, where they find their cache; conversations at both."""
    replicas, cached = list[set[str]](), 0
    for question in questions[:12]:
        seen, turns = set[str](), list[dict[str, str]]()
        for _ in range(3):
            told = await client.ask(question, 1, turns=turns)
            seen.add(told.replica)
            cached += told.cached if turns else 0
            turns += [{"role": "assistant", "content": told.text}, {"role": "user", "content": "Are you sure?"}]
        replicas.append(seen)
    shares = Counter(next(iter(seen)) for seen in replicas)
    assert all(len(seen) == 1 for seen in replicas), replicas
    assert len(shares) == 2, shares
    assert cached > 0
    return f"12 conversations of 3 turns, each at one replica, {sorted(shares.values())}; {cached} later tokens cached"


async def check_abort(client: Client, question: str) -> str:
    """A client that leaves through the whole chain ends the work."""
    before = await client.metric("rtap_requests_total", stop_reason="abandoned")
    began = time.monotonic()
    await client.leave_early(question)
    while await client.metric("rtap_requests_total", stop_reason="abandoned") == before:
        assert time.monotonic() - began < 15, "the request of a client that left is still being answered"
        await asyncio.sleep(0.2)
    left = await client.metric("rtap_trajectories")
    return f"counted as abandoned after {time.monotonic() - began:.1f} s, {left:.0f} in flight"


async def check_killed(client: Client, jobs: Sequence[Mapping[str, Any]], victim: Callable[[], int]) -> str:
    """Kill -9 a process while ``jobs`` run: no whole reply is lost, and no stream ends without saying so."""
    retried, running = await client.metric("rtap_gateway_retries_total"), asyncio.ensure_future(client.many(jobs))
    await asyncio.sleep(2)
    os.kill(victim(), signal.SIGKILL)
    told = await running
    again = await wait_for(client, 2)
    endings = Counter(
        ("stream" if job["stream"] else "whole", t.status, t.ending) for job, t in zip(jobs, told, strict=True)
    )
    allowed = {("whole", 200, "done"), ("stream", 200, "done"), ("stream", 200, "error")}
    assert set(endings) <= allowed, endings
    retries = await client.metric("rtap_gateway_retries_total") - retried
    broken = endings["stream", 200, "error"]
    return (
        f"{len(jobs)} requests, half of them streams: all whole ones answered, {broken} streams that had begun ended "
        f"with an error event, none silently; {retries:.0f} asked again; two replicas again {again:.0f} s later"
    )


async def check_drain(client: Client, jobs: Sequence[Mapping[str, Any]], scale: Callable[[int], None]) -> str:
    """One replica fewer while ``jobs`` run: every one is answered."""
    running = asyncio.ensure_future(client.many(jobs))
    await asyncio.sleep(2)
    await asyncio.to_thread(scale, 1)
    told = await running
    assert all((t.status, t.ending) == (200, "done") for t in told), Counter((t.status, t.ending) for t in told)
    await wait_for(client, 1)
    return f"{len(jobs)} requests while one of two replicas left: all answered"


async def measure(client: Client, questions: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Throughput in turns: a replica asked directly on its socket, the same through the gateway, both replicas."""
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
        for way, (asker, session) in ways.items():
            jobs = [{"question": q, "seed": number, "session": session} for q in questions]
            began = time.monotonic()
            told = await asker.many(jobs)
            assert {t.status for t in told} == {200}
            if number:  # the first warms up
                rates[way].append(len(jobs) / (time.monotonic() - began))
                latencies[way] += [t.seconds for t in told]
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
    """Everything, in order."""
    client, seen = Client(url), dict[str, Any]()
    seen["ready"] = f"two replicas after {await wait_for(client, 2, 400):.0f} s"
    questions = [question.text for question in bench_questions(())]
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
    report("a client leaves", await check_abort(client, questions[0]))
    throughput = await measure(client, questions[: options.requests], options.rounds)
    report("a server is killed", await check_killed(client, long[: options.requests], lambda: servers()[0].pid))
    parent: Callable[[], int] = lambda: servers()[0].ppid()  # noqa: E731
    report("a replica is killed", await check_killed(client, long[: options.requests], parent))
    report("a replica leaves", await check_drain(client, long[: options.requests], scale))
    return {"seen": seen, "throughput": throughput}


def markdown(found: Mapping[str, Any]) -> str:
    """The report."""
    lines = [
        "# Replicas on Ray Serve",
        "",
        *(f"- {k}: `{v}`" for k, v in found["run"].items()),
        "",
        "| what | seen |",
        "|---|---|",
    ]
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
    parser = argparse.ArgumentParser(description="Check and measure deploy/ray on this machine.")
    parser.add_argument("--requests", type=int, default=96, help="requests of a round (default: 96)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the throughput (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="which questions, in which order (default: 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "ray", help="folder of the report")
    options = parser.parse_args(argv)
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text(KEYS, encoding="utf-8")
        with fleet(keys) as (url, scale):
            found = asyncio.run(check(url, scale, options))
    run = run_of([], started) | {"command": shlex.join(["python", "scripts/check_ray.py", *argv])}
    found = {"run": {**run, "seed": options.seed, "ray": ray.__version__, "cores": os.cpu_count()}, **found}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "ray.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.output / "ray.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
