"""Abuse test: a good client asks once a second while others attack the server.

    python -m tests.stress.abuse                                                # starts a server with API keys
    python -m tests.stress.abuse --url http://127.0.0.1:8000 --key KEY          # a running one on this machine

No good request may fail or wait more than 2 s, /live must answer within 0.5 s, sampled ten times a second, and the
memory of all server processes must return to within 5 % of that before the attack. Each attack has an expectation of
its own, and no input may cause a 5xx (except 503 for a full server). Writes docs/results/abuse.{json,md}; exits 1 when
anything is broken.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.harness import LOGS, READY_SECONDS, RESULTS, list_info, processes_of, run_info, write_report
from rtap_training.evaluation.server_process import running_server, serve_command
from tests.stress.abuse_attacks import ATTACKS, TOKENS_PER_MINUTE, Attack, Outcome, Target, run_attack
from tests.stress.soak import FLAGS
from tests.stress.soak_processes import MIB
from tests.stress.soak_traffic import CHAT

MOST_LIVE_SECONDS, MOST_GOOD_SECONDS, MOST_MEMORY_RATIO = 0.5, 2.0, 1.05
_LIVE_EVERY, _GOOD_EVERY = 0.1, 1.0
_REPLY_SECONDS = 60.0  # a probe or a good request without a reply has this latency
_SETTLE_SECONDS, _MOST_SETTLE_SECONDS = 5.0, 30.0  # after an attack, for memory to return
_WARM_SECONDS = 20.0
_KEYS = f"""
[[keys]]
name = "good"
key = "good-key"
[[keys]]
name = "attacker"
key = "attacker-key"
[[keys]]
name = "limited"
key = "limited-key"
tokens_per_minute = {TOKENS_PER_MINUTE}
"""
# In turn, so that an attack on one kind of request is seen.
_GOOD: Sequence[Mapping[str, Any]] = (
    {"rtap": {"max_cycles": 2}},
    {"structured_outputs": {"choice": ["yes", "no"]}, "rtap": {"policy": "single"}},
)


@dataclass(slots=True)
class Watch:
    """Latencies in seconds, and failures of the good client. late: the longest delay of this process's own clock."""

    live: list[float] = field(default_factory=list[float])
    good: list[float] = field(default_factory=list[float])
    failures: list[str] = field(default_factory=list[str])
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One attack. before, after: resident memory of all server processes, in bytes; None for a remote server."""

    attack: str
    expected: str
    seconds: float
    watch: Watch
    before: int | None
    after: int | None
    outcome: Outcome

    @property
    def problems(self) -> list[str]:
        """Broken bounds and expectations."""
        live, good = max(self.watch.live, default=0.0), max(self.watch.good, default=0.0)
        found = [f"/live took {live:.2f} s"] if live > MOST_LIVE_SECONDS else []
        found += [f"a good request took {good:.2f} s"] if good > MOST_GOOD_SECONDS else []
        found += [f"good requests failed: {self.watch.failures[0]}"] if self.watch.failures else []
        if self.before and self.after and self.after > MOST_MEMORY_RATIO * self.before:
            found.append(f"memory is {self.after / self.before - 1:.0%} above that before")
        return found + self.outcome.problems


async def _every(seconds: float, send: Callable[[int], Awaitable[None]], watch: Watch) -> None:
    """Call ``send`` at a fixed rate, whether or not earlier calls have ended, until cancelled. Waits for them then."""
    began, running = time.perf_counter(), set[asyncio.Future[None]]()
    try:
        for number in itertools.count():
            task = asyncio.ensure_future(send(number))
            running.add(task)
            task.add_done_callback(running.discard)
            due = began + (number + 1) * seconds
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            watch.late = max(watch.late, time.perf_counter() - due)
    finally:
        await asyncio.gather(*running)


class GoodClient:
    """A client that probes /live and sends one request a second."""

    def __init__(self, url: str, key: str, watch: Watch) -> None:
        self._url, self._watch = url, watch
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=_REPLY_SECONDS)

    async def run(self) -> None:
        """Send until cancelled."""
        # New connections, as a kubelet's: a server that accepts none is not alive.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(self._url, connector=connector, timeout=self._timeout) as self._session:
            clients = _every(_LIVE_EVERY, self._probe, self._watch), _every(_GOOD_EVERY, self._ask, self._watch)
            await asyncio.gather(*clients, return_exceptions=True)  # once cancelled, both wait for their replies

    async def _probe(self, _: int) -> None:
        began = time.perf_counter()
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get("/live") as reply:
                if reply.status == 200:
                    self._watch.live.append(time.perf_counter() - began)
                    return
        self._watch.live.append(_REPLY_SECONDS)

    async def _ask(self, number: int) -> None:
        question = f"make {82 + number} from 3, 7, {25 + number}"
        messages = [{"role": "user", "content": question}]
        body = {"model": "rtap", "max_tokens": 96, "messages": messages, **_GOOD[number % len(_GOOD)]}
        began = time.perf_counter()
        try:
            async with self._session.post(CHAT, json=body, headers=self._headers) as reply:
                content = await reply.read()
            if reply.status != 200:
                self._watch.failures.append(f"{reply.status}: {content[:200]!r}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self._watch.failures.append(f"{type(error).__name__}: {error}")
        self._watch.good.append(time.perf_counter() - began)


async def watched(url: str, key: str, work: Callable[[], Awaitable[None]]) -> Watch:
    """Latencies of the good client while ``work`` runs."""
    watch = Watch()
    client = asyncio.create_task(GoodClient(url, key, watch).run())
    try:
        await work()
    finally:
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
    return watch


def resident(processes: Sequence[psutil.Process]) -> int | None:
    """Resident memory of all processes that still run; None without any."""
    sizes: list[int] = []
    for process in processes:
        with suppress(psutil.Error):
            sizes.append(process.memory_info().rss)
    return sum(sizes) or None


async def attack_once(
    attack: Attack,
    target: Target,
    good_key: str,
    find_processes: Callable[[], Sequence[psutil.Process]],
    pool: Executor,
) -> Row:
    """Run an attack in ``pool``, wait for memory to return, and measure all the while."""
    before, began, outcome = resident(find_processes()), time.monotonic(), Outcome()

    async def work() -> None:
        nonlocal outcome
        outcome = await asyncio.get_running_loop().run_in_executor(pool, run_attack, attack.name, target)
        ended = time.monotonic()
        while (waited := time.monotonic() - ended) < _MOST_SETTLE_SECONDS:
            after = resident(find_processes())
            if waited > _SETTLE_SECONDS and (not before or not after or after <= MOST_MEMORY_RATIO * before):
                return
            await asyncio.sleep(0.5)

    watch = await watched(target.url, good_key, work)
    after = resident(find_processes())
    return Row(attack.name, attack.expected, time.monotonic() - began, watch, before, after, outcome)


async def abuse(
    attacks: Sequence[Attack],
    target: Target,
    good_key: str,
    find_processes: Callable[[], Sequence[psutil.Process]],
    log_line: Callable[[str], None],
) -> list[Row]:
    """Run all attacks in order. The first row is the good client alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(int).result()  # its imports would slow the first attack down
        began = time.monotonic()
        watch = await watched(target.url, good_key, lambda: asyncio.sleep(_WARM_SECONDS))
        size = resident(find_processes())
        rows = [Row("none", "–", time.monotonic() - began, watch, size, size, Outcome())]
        for attack in attacks:
            rows.append(await attack_once(attack, target, good_key, find_processes, pool))
            log_line(f"{attack.name}: {'; '.join(rows[-1].problems) or 'kept'}"[:2000])
    return rows


def to_markdown(info: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The report."""
    lines = [
        "# Abuse",
        "",
        "A good client asks once a second and probes /live ten times a second while others attack the server. Bounds: "
        f"/live {MOST_LIVE_SECONDS} s, a good request {MOST_GOOD_SECONDS:g} s, no failure, memory within "
        f"{MOST_MEMORY_RATIO - 1:.0%} of that before. *Seen*: replies to the attacker by status.",
        "",
        *list_info(info),
        "",
        "| attack | expected | worst /live s | worst good s | good sent, failed | MiB before, after | seen | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        watch, seen = row.watch, ", ".join(f"{count} × {what}" for what, count in sorted(row.outcome.replies.items()))
        cells = [
            row.attack,
            row.expected,
            f"{max(watch.live, default=0):.2f}",
            f"{max(watch.good, default=0):.2f}",
            f"{len(watch.good)}, {len(watch.failures)}",
            f"{row.before / MIB:.0f}, {row.after / MIB:.0f}" if row.before and row.after else "–",
            seen or "–",
            "**no**" if row.problems else "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {row.attack}: {_one_line(problem)}" for row in rows for problem in row.problems)]
    return "\n".join(lines).rstrip() + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def to_json(info: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Every figure."""
    attacks = [
        {
            "attack": row.attack,
            "seconds": round(row.seconds, 1),
            "live": _summary(row.watch.live),
            "good": _summary(row.watch.good),
            "failures": row.watch.failures[:100],
            "memory": [row.before, row.after],
            "seen": row.outcome.replies,
            "problems": row.problems,
        }
        for row in rows
    ]
    return {"setting": info, "attacks": attacks}


def _summary(latencies: Sequence[float]) -> dict[str, float]:
    if not latencies:
        return {"count": 0}
    return {
        "count": len(latencies),
        **{f"p{p} ms": round(1000 * float(np.percentile(latencies, p)), 1) for p in (50, 99, 100)},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="abuse.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", help="of a running server on this machine; default: start one with the bundled models")
    parser.add_argument("--key", default="", help="API key of a running server, for the good client and the attacker")
    parser.add_argument("--limited-key", default="", help=f"one of {TOKENS_PER_MINUTE} tokens a minute")
    parser.add_argument("--log", type=Path, help="output of the running server")
    parser.add_argument("--only", nargs="+", choices=[attack.name for attack in ATTACKS], metavar="ATTACK")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options, started = parser.parse_args(arguments), datetime.now(UTC)
    attacks = [attack for attack in ATTACKS if options.only is None or attack.name in options.only]
    with ExitStack() as stack:
        if options.url:
            target, good_key = Target(options.url, options.key, options.limited_key, options.log), options.key
        else:
            log, keys = LOGS / "abuse.log", Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys.toml"
            keys.write_text(_KEYS, encoding="utf-8")
            command = serve_command(None, None, [*FLAGS, "--api-keys-file", str(keys)])
            url = stack.enter_context(running_server(command, log=log, ready_seconds=READY_SECONDS))
            target, good_key = Target(url, "attacker-key", "limited-key", log), "good-key"
        rows = asyncio.run(
            abuse(
                attacks,
                target,
                good_key,
                lambda: _processes(target.url),
                lambda text: print(text, flush=True),
            )
        )
    late = max(row.watch.late for row in rows)
    info = run_info(__file__, arguments, started, **{"own clock late, most": f"{1000 * late:.0f} ms"})
    write_report(options.output, "abuse", to_json(info, rows), to_markdown(info, rows))
    return int(any(row.problems for row in rows))


def _processes(url: str) -> Sequence[psutil.Process]:
    """The server and its engines; none when it runs elsewhere, or has ended."""
    try:
        return processes_of(url)
    except StopIteration:
        return []


if __name__ == "__main__":
    sys.exit(main())
