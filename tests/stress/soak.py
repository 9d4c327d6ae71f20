"""Soak test: half an hour of mixed traffic with disconnects and a killed generator.

    python -m tests.stress.soak

Checks the growth of memory, leftovers after the traffic, and the server's counters against what clients received.
Writes docs/results/soak.{json,md}; exits 1 when a bound is broken.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.harness import LOGS, READY_SECONDS, RESULTS, list_info, run_info, write_report
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval
from tests.stress.soak_processes import (
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
from tests.stress.soak_traffic import Tally, Traffic

# Small KV caches: their memory counts as growth until it has all been written, here within the warm-up.
FLAGS = (
    "--kv-cache-memory-bytes", str(128 * MIB),
    "--confidence-engine-args", json.dumps({"kv_cache_memory_bytes": 64 * MIB}),
)  # fmt: skip
_QUIET_SECONDS, _SAMPLE_SECONDS = 60.0, 1.0
_SETTLED_SECONDS = 1200.0  # of traffic: allocators grow until then, so growth is judged after it
_RESTART_SECONDS = 300.0
MOST_MIB_AN_HOUR = 24.0  # low end of the interval of any process's growth
# Bytes written besides the log, whose pages count twice when written in two steps.
_MOST_WRITTEN, _MOST_WRITTEN_A_SECOND = 2**17, 2**10
MOST_LEFT_OVER = 4  # further files, sockets, threads or tasks after all clients have disconnected


@dataclass(frozen=True, slots=True)
class SoakConfig:
    """warm_seconds: traffic before the measurement. kill_seconds: time between kills of the generator, all in the first
    third; None: never."""

    seconds: float
    warm_seconds: float
    clients: int
    seed: int
    kill_seconds: float | None


@dataclass(frozen=True, slots=True)
class Check:
    """A bound and its measured value."""

    name: str
    found: str
    bound: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Soaked:
    """Result of a soak. growth: MiB per hour of each process in the second half."""

    tally: Tally
    kills: int
    before: Held
    after: Held
    growth: Mapping[str, tuple[Interval, Sequence[Sample]]]
    checks: Sequence[Check]


async def soak(
    url: str, server: psutil.Process, log: Path, config: SoakConfig, log_line: Callable[[str], None]
) -> Soaked:
    """Warm up, measure, soak, measure again. server: the API process. log: the file of its output."""
    processes = await processes_of(url, server)
    await Traffic(url, config.seed - 1).run(config.clients, config.warm_seconds)
    before = await _quiet(url, server)
    counted, on_disk = await scrape(url), written(processes, log)
    traffic, samples = Traffic(url, config.seed), list[Sample]()
    watching = asyncio.create_task(watch(processes, samples, _SAMPLE_SECONDS))
    killing = asyncio.create_task(_kill(traffic, processes, config, log_line))
    try:
        await traffic.run(config.clients, config.seconds)
    finally:
        watching.cancel()
        kills = await killing
        await asyncio.gather(watching, return_exceptions=True)
    after = await _quiet(url, server)
    risen = {name: value - counted.get(name, 0.0) for name, value in (await scrape(url)).items()}
    late = [sample for sample in samples if sample.seconds > config.seconds / 2]
    grown = {
        role: (growth(longest), longest)
        for role in (API, POLICY, GENERATOR)
        if (longest := max(lives(late, role), key=len, default=list[Sample]()))
    }
    checks = [*_counts(traffic.tally, risen), *_left_over(before, after)]
    most = _MOST_WRITTEN + round(_MOST_WRITTEN_A_SECOND * config.seconds)
    checks.append(_at_most("bytes written to disk besides the log", written(processes, log) - on_disk, most))
    if config.warm_seconds + config.seconds / 2 >= _SETTLED_SECONDS:
        checks += _grown(grown)
    checks.append(_exactly("restarts of the generator", risen["rtap_engine_restarts_total"], kills))
    return Soaked(traffic.tally, kills, before, after, grown, checks)


async def _kill(traffic: Traffic, processes: Processes, config: SoakConfig, log_line: Callable[[str], None]) -> int:
    """Kill the generator's process in the first third only, so that every process is old when growth counts."""
    kills, began = 0, time.monotonic()
    while config.kill_seconds is not None and time.monotonic() - began + config.kill_seconds < config.seconds / 3:
        await asyncio.sleep(config.kill_seconds)
        before = await _restarts(traffic.url)
        traffic.is_generator_away = True
        processes.by_role()[GENERATOR].kill()
        kills += 1
        log_line(f"{time.monotonic() - began:.0f} s: the generator is killed")
        async with asyncio.timeout(_RESTART_SECONDS):
            while await _restarts(traffic.url) == before:
                await asyncio.sleep(_SAMPLE_SECONDS)
        traffic.is_generator_away = False
    return kills


async def _restarts(url: str) -> float:
    """Restarts of the generator so far."""
    return (await scrape(url)).get("rtap_engine_restarts_total", 0.0)


async def _quiet(url: str, server: psutil.Process) -> Held:
    """Resources held once all clients have disconnected and all engines are up."""
    until = time.monotonic() + _QUIET_SECONDS
    while True:
        await asyncio.sleep(1)
        figures, now = await scrape(url), await held(url, server)
        running = figures["vllm:num_requests_running"] + figures["vllm:num_requests_waiting"] + now.trajectories
        is_up = all(v == 1 for k, v in figures.items() if k.startswith("rtap_engine_up{"))
        if (not running and is_up) or time.monotonic() > until:
            await asyncio.sleep(1)  # for closing connections
            return await held(url, server)


def _exactly(name: str, found: float, expected: float) -> Check:
    return Check(name, f"{found:g}", f"= {expected:g}", found == expected)


def _at_most(name: str, found: float, most: float) -> Check:
    return Check(name, f"{found:g}", f"<= {most:g}", found <= most)


def _counts(tally: Tally, risen: Mapping[str, float]) -> list[Check]:
    """Check the server's counters against what clients received."""
    checks = [_exactly("requests that failed", len(tally.errors), 0)]
    seen = {f"rtap_requests_total{{policy={p},stop_reason={r}}}": float(n) for (p, r), n in tally.trajectories.items()}
    finished = {k: v for k, v in risen.items() if k.startswith("rtap_requests_total{") and "abandoned" not in k and v}
    checks += [_exactly(k, finished.get(k, 0), seen.get(k, 0)) for k in sorted({*seen, *finished})]
    abandoned = sum(v for k, v in risen.items() if k.startswith("rtap_requests_total{") and "abandoned" in k)
    checks.append(_at_most("trajectories abandoned (clients that disconnected)", abandoned, tally.left))
    checks += [_exactly(name, risen.get(name, 0), count) for name, count in sorted(tally.sums.items())]
    return checks


def _left_over(before: Held, after: Held) -> list[Check]:
    checks = [_exactly("rtap_trajectories at the end", after.trajectories, 0)]
    for name in ("files", "sockets", "threads", "tasks"):
        was = getattr(before, name)
        checks.append(_at_most(f"{name} at the end, {was} before", getattr(after, name), was + MOST_LEFT_OVER))
    return checks


def _grown(grown: Mapping[str, tuple[Interval, Sequence[Sample]]]) -> list[Check]:
    bound = f"low end <= {MOST_MIB_AN_HOUR:g}"
    return [
        Check(f"growth of the {role}, MiB/h", _interval(slope), bound, slope.low <= MOST_MIB_AN_HOUR)
        for role, (slope, _) in grown.items()
    ]


def _interval(value: Interval) -> str:
    return f"{value.value:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"


def to_json(info: Mapping[str, Any], soaked: Soaked) -> dict[str, Any]:
    """Every figure."""
    roles = {
        role: {"MiB an hour": asdict(slope), "samples": len(seen), "MiB": _curve(seen)}
        for role, (slope, seen) in soaked.growth.items()
    }
    return {
        "setting": info,
        "sent": dict(soaked.tally.sent),
        "errors": soaked.tally.errors[:100],
        "generator killed": soaked.kills,
        "held before": asdict(soaked.before),
        "held after": asdict(soaked.after),
        "memory": roles,
        "checks": [asdict(check) for check in soaked.checks],
    }


def _curve(seen: Sequence[Sample]) -> list[float]:
    """About sixty points."""
    return [round(s.rss / MIB, 1) for s in seen[:: max(1, len(seen) // 60)]]


def to_markdown(info: Mapping[str, Any], soaked: Soaked) -> str:
    """The report."""
    sent = ", ".join(f"{n} {kind}" for kind, n in sorted(soaked.tally.sent.items(), key=lambda item: -item[1]))
    lines = [
        "# Soak",
        "",
        "Clients of all kinds at once, each in a closed loop. Some disconnect before the reply or during a stream, and "
        "in the first third the generator's process is killed. *Growth*: slope of resident memory in the second half "
        "by least squares, with its 95 % interval. *At the end*: the API process after all clients have disconnected, "
        "against the same after the warm-up. Counters must equal what clients received.",
        "",
        *list_info(info),
        "",
        f"{sum(soaked.tally.sent.values())} requests ({sent}); {sum(soaked.tally.trajectories.values())} trajectories "
        f"received, {soaked.tally.left} disconnects; the generator was killed {soaked.kills} times.",
        "",
        "| process | MiB first | MiB last | highest | MiB an hour [95 %] | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for role, (slope, seen) in soaked.growth.items():
        first, last, most = (x / MIB for x in (seen[0].rss, seen[-1].rss, max(s.rss for s in seen)))
        minutes = (seen[-1].seconds - seen[0].seconds) / 60
        lines.append(f"| {role} | {first:.0f} | {last:.0f} | {most:.0f} | {_interval(slope)} | {minutes:.1f} |")
    lines += ["", "| bound | found | must be | kept |", "|---|---|---|---|"]
    lines += [f"| {c.name} | {c.found} | {c.bound} | {'yes' if c.kept else '**no**'} |" for c in soaked.checks]
    lines += ["", *(f"- {error}" for error in soaked.tally.errors[:20])]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="soak.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--kill-minutes", type=float, default=3.0, help="between two kills of the generator; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    kill_seconds = 60 * options.kill_minutes or None
    config = SoakConfig(60 * options.minutes, options.warm_seconds, options.clients, options.seed, kill_seconds)
    started, log = datetime.now(UTC), LOGS / "soak.log"
    with running_server(serve_command(None, None, FLAGS), log=log, ready_seconds=READY_SECONDS) as url:
        server = next(child for child in psutil.Process().children() if url.rpartition(":")[2] in child.cmdline())
        try:
            soaked = asyncio.run(soak(url, server, log, config, lambda text: print(text, flush=True)))
        except aiohttp.ClientConnectionError as error:
            print(f"the server ended ({error}); its log: {log}")
            return 1
    info = run_info(
        __file__, arguments, started, seed=config.seed, clients=config.clients, flags=" ".join(FLAGS)
    )  # fmt: skip
    write_report(options.output, "soak", to_json(info, soaked), to_markdown(info, soaked))
    return int(not all(check.kept for check in soaked.checks))


if __name__ == "__main__":
    sys.exit(main())
