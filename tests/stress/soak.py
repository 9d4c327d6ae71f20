"""Mixed traffic for half an hour, with clients that leave and a generator that is killed: what grows, what is left, and
whether the counters agree with what clients saw. Writes docs/results/soak.{json,md}; exits 1 when a bound is broken.

Who asks for what is in ``soak_traffic.py``, what is measured of processes in ``soak_watch.py``.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from bench_servers import ROOT, run_of
from soak_traffic import Tally, Traffic
from soak_watch import (
    API,
    GENERATOR,
    MIB,
    POLICY,
    Held,
    Processes,
    Sample,
    growth,
    held,
    lives,
    processes_of,
    scrape,
    watch,
    written,
)

from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval

# What fills up to a bound would look like growth for as long as a soak lasts: KV caches, whose memory counts when it is
# first written, and kept results. These are full after the warm-up.
FLAGS = (
    "--idempotency-results", "64", "--idempotency-bytes", str(2 * MIB), "--kv-cache-memory-bytes", str(128 * MIB),
    "--confidence-engine-args", json.dumps({"kv_cache_memory_bytes": 64 * MIB}),
)  # fmt: skip
_QUIET_SECONDS, _SAMPLE_SECONDS = 60.0, 1.0
_SETTLED_SECONDS = 1200.0  # of traffic, until allocators have what they need: growth is judged after it
_RESTART_SECONDS = 300.0
MOST_MIB_AN_HOUR = 24.0  # proven growth, the low end of the interval, of any process
# To the disk, beside the log: a page of it that is written in two goes counts twice.
_MOST_WRITTEN, _MOST_WRITTEN_A_SECOND = 2**17, 2**10
MOST_LEFT_OVER = 4  # files, sockets, threads or tasks more than before, when all clients have gone


@dataclass(frozen=True, slots=True)
class Plan:
    """warm_seconds: traffic before anything is measured. kill_seconds: between ends of the generator, all in the first
    third; None: never."""

    seconds: float
    warm_seconds: float
    clients: int
    seed: int
    kill_seconds: float | None


@dataclass(frozen=True, slots=True)
class Check:
    """One bound, and whether it was kept."""

    what: str
    found: str
    bound: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Soaked:
    """What came of it. growth: MiB an hour, of each process in the second half."""

    tally: Tally
    kills: int
    before: Held
    after: Held
    growth: Mapping[str, tuple[Interval, Sequence[Sample]]]
    checks: Sequence[Check]


async def soak(url: str, server: psutil.Process, log: Path, plan: Plan, tell: Callable[[str], None]) -> Soaked:
    """Warm up, look, soak, look again. server: its API process. log: where its output goes."""
    processes = await processes_of(url, server)
    await Traffic(url, plan.seed - 1).run(plan.clients, plan.warm_seconds)
    before = await _quiet(url, server)
    counted, on_disk = await scrape(url), written(processes, log)
    traffic, samples = Traffic(url, plan.seed), list[Sample]()
    watching = asyncio.create_task(watch(processes, samples, _SAMPLE_SECONDS))
    killing = asyncio.create_task(_kill(traffic, processes, plan, tell))
    try:
        await traffic.run(plan.clients, plan.seconds)
    finally:
        watching.cancel()
        kills = await killing
        await asyncio.gather(watching, return_exceptions=True)
    after = await _quiet(url, server)
    risen = {name: value - counted.get(name, 0.0) for name, value in (await scrape(url)).items()}
    late = [sample for sample in samples if sample.seconds > plan.seconds / 2]
    grown = {
        role: (growth(longest), longest)
        for role in (API, POLICY, GENERATOR)
        if (longest := max(lives(late, role), key=len, default=list[Sample]()))
    }
    checks = [*_counts(traffic.tally, risen), *_left_over(before, after)]
    most = _MOST_WRITTEN + round(_MOST_WRITTEN_A_SECOND * plan.seconds)
    checks.append(_at_most("bytes written to disk beside the log", written(processes, log) - on_disk, most))
    if plan.warm_seconds + plan.seconds / 2 >= _SETTLED_SECONDS:
        checks += _grown(grown)
    checks.append(_exactly("times the generator was started anew", risen["rtap_engine_restarts_total"], kills))
    return Soaked(traffic.tally, kills, before, after, grown, checks)


async def _kill(traffic: Traffic, processes: Processes, plan: Plan, tell: Callable[[str], None]) -> int:
    """End the generator's process now and then in the first third, so that every process is old when growth counts."""
    kills, began = 0, time.monotonic()
    while plan.kill_seconds is not None and time.monotonic() - began + plan.kill_seconds < plan.seconds / 3:
        await asyncio.sleep(plan.kill_seconds)
        before = await _restarts(traffic.url)
        traffic.is_generator_away = True
        processes.by_role()[GENERATOR].kill()
        kills += 1
        tell(f"{time.monotonic() - began:.0f} s: the generator is killed")
        async with asyncio.timeout(_RESTART_SECONDS):
            while await _restarts(traffic.url) == before:
                await asyncio.sleep(_SAMPLE_SECONDS)
        traffic.is_generator_away = False
    return kills


async def _restarts(url: str) -> float:
    """How often the generator was started anew, counted when it is up."""
    return (await scrape(url)).get("rtap_engine_restarts_total", 0.0)


async def _quiet(url: str, server: psutil.Process) -> Held:
    """What is held when all clients have gone and all engines are up."""
    until = time.monotonic() + _QUIET_SECONDS
    while True:
        await asyncio.sleep(1)
        figures, now = await scrape(url), await held(url, server)
        running = figures["vllm:num_requests_running"] + figures["vllm:num_requests_waiting"] + now.trajectories
        is_up = all(v == 1 for k, v in figures.items() if k.startswith("rtap_engine_up{"))
        if (not running and is_up) or time.monotonic() > until:
            await asyncio.sleep(1)  # connections that are being closed
            return await held(url, server)


def _exactly(what: str, found: float, expected: float) -> Check:
    return Check(what, f"{found:g}", f"= {expected:g}", found == expected)


def _at_most(what: str, found: float, most: float) -> Check:
    return Check(what, f"{found:g}", f"<= {most:g}", found <= most)


def _counts(tally: Tally, risen: Mapping[str, float]) -> list[Check]:
    """The server's counters against what clients saw, both of the soak alone."""
    checks = [_exactly("requests that failed", len(tally.errors), 0)]
    told = {f"rtap_requests_total{{policy={p},stop_reason={r}}}": float(n) for (p, r), n in tally.trajectories.items()}
    finished = {k: v for k, v in risen.items() if k.startswith("rtap_requests_total{") and "abandoned" not in k and v}
    checks += [_exactly(k, finished.get(k, 0), told.get(k, 0)) for k in sorted({*told, *finished})]
    abandoned = sum(v for k, v in risen.items() if k.startswith("rtap_requests_total{") and "abandoned" in k)
    checks.append(_at_most("trajectories abandoned (of clients that left)", abandoned, tally.left))
    checks += [_exactly(name, risen.get(name, 0), count) for name, count in sorted(tally.sums.items())]
    return checks


def _left_over(before: Held, after: Held) -> list[Check]:
    checks = [_exactly("rtap_trajectories when all have gone", after.trajectories, 0)]
    for name in ("files", "sockets", "threads", "tasks"):
        was = getattr(before, name)
        checks.append(_at_most(f"{name} when all have gone, {was} before", getattr(after, name), was + MOST_LEFT_OVER))
    return checks


def _grown(grown: Mapping[str, tuple[Interval, Sequence[Sample]]]) -> list[Check]:
    bound = f"low end <= {MOST_MIB_AN_HOUR:g}"
    return [
        Check(f"growth of the {role}, MiB/h", _interval(slope), bound, slope.low <= MOST_MIB_AN_HOUR)
        for role, (slope, _) in grown.items()
    ]


def _interval(value: Interval) -> str:
    return f"{value.value:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"


def to_json(setting: Mapping[str, Any], soaked: Soaked) -> str:
    """Every figure."""
    roles = {
        role: {"MiB an hour": asdict(slope), "samples": len(seen), "MiB": _curve(seen)}
        for role, (slope, seen) in soaked.growth.items()
    }
    content = {
        "setting": setting,
        "asked": dict(soaked.tally.asked),
        "errors": soaked.tally.errors[:100],
        "generator killed": soaked.kills,
        "held before": asdict(soaked.before),
        "held after": asdict(soaked.after),
        "memory": roles,
        "checks": [asdict(check) for check in soaked.checks],
    }
    return json.dumps(content, indent=1) + "\n"


def _curve(seen: Sequence[Sample]) -> list[float]:
    """Some sixty points of it."""
    return [round(s.rss / MIB, 1) for s in seen[:: max(1, len(seen) // 60)]]


def to_markdown(setting: Mapping[str, Any], soaked: Soaked) -> str:
    """The report."""
    asked = ", ".join(f"{n} {kind}" for kind, n in sorted(soaked.tally.asked.items(), key=lambda item: -item[1]))
    lines = [
        "# Soak",
        "",
        "Clients of all kinds at once, each asking again as soon as it is answered; some leave before the reply or in "
        "the midst of a stream, and in the first third the generator's process is killed now and then. *Growth*: "
        "resident memory in the second half by least squares, with its 95 % interval: allocators fill up for some "
        "twenty minutes. *Left over*: what the API process holds when all clients have gone, against the same after "
        "the warm-up. Counters are held against what clients were told, to the unit.",
        "",
        *(f"- {name}: `{value}`" for name, value in setting.items()),
        "",
        f"{sum(soaked.tally.asked.values())} times a client asked ({asked}); {sum(soaked.tally.trajectories.values())} "
        f"trajectories told, {soaked.tally.left} left; the generator was killed {soaked.kills} times.",
        "",
        "| process | MiB first | MiB last | highest | MiB an hour [95 %] | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for role, (slope, seen) in soaked.growth.items():
        first, last, most = (x / MIB for x in (seen[0].rss, seen[-1].rss, max(s.rss for s in seen)))
        minutes = (seen[-1].seconds - seen[0].seconds) / 60
        lines.append(f"| {role} | {first:.0f} | {last:.0f} | {most:.0f} | {_interval(slope)} | {minutes:.1f} |")
    lines += ["", "| bound | found | must be | kept |", "|---|---|---|---|"]
    lines += [f"| {c.what} | {c.found} | {c.bound} | {'yes' if c.kept else '**no**'} |" for c in soaked.checks]
    lines += ["", *(f"- {error}" for error in soaked.tally.errors[:20])]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="soak.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--kill-minutes", type=float, default=3.0, help="between two ends of the generator; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    kill_seconds = 60 * options.kill_minutes or None
    plan = Plan(60 * options.minutes, options.warm_seconds, options.clients, options.seed, kill_seconds)
    started, log = datetime.now(UTC), ROOT / "build" / "soak.log"
    with running_server(serve_command(None, None, FLAGS), log=log, ready_seconds=300) as url:
        server = next(child for child in psutil.Process().children() if url.rpartition(":")[2] in child.cmdline())
        try:
            soaked = asyncio.run(soak(url, server, log, plan, lambda text: print(text, flush=True)))
        except aiohttp.ClientConnectionError as error:
            print(f"the server is gone ({error}); its log: {log}")
            return 1
    setting = run_of([f"scripts/{Path(__file__).name}", *arguments], started) | {
        "seed": plan.seed,
        "clients": plan.clients,
        "flags": " ".join(FLAGS),
        "machine": f"{os.cpu_count()} cores, shared",
    }
    write_atomically(options.output / "soak.json", to_json(setting, soaked))
    report = to_markdown(setting, soaked)
    write_atomically(options.output / "soak.md", report)
    print(report)
    return int(not all(check.kept for check in soaked.checks))


if __name__ == "__main__":
    sys.exit(main())
