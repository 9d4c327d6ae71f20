"""Overload test: five times the load that the server can take.

    python -m tests.stress.overload

Closed loops of more and more clients find the capacity: the fewest clients that reach nearly the best rate. The server
then starts with that ``--max-in-flight-requests``, and two loads alternate: a closed loop of that many clients (*at
capacity*), and Poisson arrivals at five times the rate (*overload*). Ratios are of pooled rounds, with 95 % intervals
by paired bootstrap over rounds. Last, clients disconnect, and the engine's gauges must fall to 0. Writes
docs/results/overload.{json,md}.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import (
    LOGS,
    READY_SECONDS,
    RESULTS,
    interval_text,
    list_info,
    questions_of,
    ratio_over_rounds,
    run_info,
    write_report,
)
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval
from tests.stress.overload_clients import Clients, Load, open_session, p99_of, rate_of

TIMES = 5  # offered load over capacity
_NEAR_THE_BEST = 0.97  # share of the best rate that counts as capacity
MOST_P99_RATIO, LEAST_RATE_RATIO, MOST_LEAVING_SECONDS = 1.5, 0.9, 1.0
MOST_REFUSAL_MS = {50: 50.0, 99: 250.0}  # by percentile
_LEAVERS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """levels: completed requests per second by number of clients. rounds: (at capacity, overload).

    leaving: seconds until the engine's gauges were 0 after each disconnect."""

    levels: Mapping[int, float]
    capacity: int
    rounds: Sequence[tuple[Load, Load]]
    leaving: Sequence[float]

    @property
    def p99(self) -> Interval:
        """p99 latency of admitted requests, overload over capacity."""
        return ratio_over_rounds(p99_of, [over for _, over in self.rounds], [at for at, _ in self.rounds])

    @property
    def rate(self) -> Interval:
        """Rate of completed requests, overload over capacity."""
        return ratio_over_rounds(rate_of, [over for _, over in self.rounds], [at for at, _ in self.rounds])

    def pooled(self, name: str) -> list[float]:
        """Values of all overloads."""
        return [value for _, over in self.rounds for value in getattr(over, name)]


async def _levels(url: str, bodies: Sequence[bytes], levels: Sequence[int], seconds: float) -> dict[int, float]:
    """Completed requests per second by number of clients, up and down so that a drift of the machine cancels."""
    async with open_session() as session:
        clients, loads = Clients(session, url, bodies), {level: list[Load]() for level in levels}
        await clients.closed(8, 3)
        for level in (*levels, *reversed(levels)):
            loads[level].append(await clients.closed(level, seconds))
            print(f"{level} clients: {rate_of(loads[level]):.1f}/s", flush=True)
    return {level: rate_of(found) for level, found in loads.items()}


def capacity_of(levels: Mapping[int, float]) -> int:
    """The fewest clients that reach nearly the best rate."""
    return min(level for level, rate in levels.items() if rate >= _NEAR_THE_BEST * max(levels.values()))


async def _rounds(
    url: str, bodies: Sequence[bytes], capacity: int, args: argparse.Namespace
) -> list[tuple[Load, Load]]:
    rounds: list[tuple[Load, Load]] = []
    async with open_session() as session:
        clients = Clients(session, url, bodies)
        rate = rate_of([await clients.closed(capacity, args.seconds)])
        for number in range(args.rounds):
            if number % 2:
                over = await clients.opened(TIMES * rate, args.seconds, args.seed + number)
                at = await clients.closed(capacity, args.seconds)
            else:
                at = await clients.closed(capacity, args.seconds)
                over = await clients.opened(TIMES * rate, args.seconds, args.seed + number)
            rounds.append((at, over))
            rate = rate_of([at for at, _ in rounds])
            print(f"round {number}: {rate_of([at]):.1f}/s at capacity, {rate_of([over]):.1f}/s in overload", flush=True)
    return rounds


async def _leaving(url: str, times: int, clients_at_once: int) -> list[float]:
    """Seconds from the disconnect of clients with long requests to an idle engine."""
    question = {"messages": [{"role": "user", "content": "make 82 from 3, 7, 25"}], "model": "rtap"}
    body = json.dumps({**question, "ignore_eos": True, "rtap": {"threshold": 1.0, "max_cycles": 16}}).encode()
    seconds: list[float] = []
    async with open_session() as session:
        for _ in range(times):
            clients = Clients(session, url, [body])
            tasks = [asyncio.create_task(clients.one([], [], [])) for _ in range(clients_at_once)]
            while await _at_work(session, url) < clients_at_once:
                await asyncio.sleep(0.01)
            left = time.perf_counter()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while await _at_work(session, url):
                await asyncio.sleep(0.01)
            seconds.append(time.perf_counter() - left)
    return seconds


async def _at_work(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(f"{url}/metrics") as reply:
        families = text_string_to_metric_families(await reply.text())
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(sample.value for family in families for sample in family.samples if sample.name in names)


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound and its measured value."""

    name: str
    found: str
    bound: str
    met: bool


def goals_of(found: Found) -> list[Goal]:
    """Goals with their measured values."""
    wrong, leaving, p99, rate = found.pooled("wrong"), max(found.leaving), found.p99, found.rate
    late = f"<= {MOST_LEAVING_SECONDS:g}"
    refusals = [
        Goal(f"refusal (503, Retry-After), p{percent} ms", f"{took:.1f}", f"<= {most:g}", took <= most)
        for percent, most in MOST_REFUSAL_MS.items()
        for took in [float(np.percentile(found.pooled("refused"), percent))]
    ]
    return [
        Goal("p99 of admitted, over that at capacity", interval_text(p99), "<= 1.5", p99.value <= MOST_P99_RATIO),
        Goal(
            "completed/s, over that at capacity",
            interval_text(rate),
            f">= {LEAST_RATE_RATIO:g}",
            rate.value >= LEAST_RATE_RATIO,
        ),
        *refusals,
        Goal("wrong replies", str(len(wrong)), "0", not wrong),
        Goal(
            "seconds from disconnect to an idle engine, most", f"{leaving:.2f}", late, leaving <= MOST_LEAVING_SECONDS
        ),
    ]


def _summary(one: Load) -> dict[str, Any]:
    def summary(values: Sequence[float]) -> dict[str, float]:
        shares = np.percentile(values, (50, 90, 99)) if values else ()
        return {
            "count": len(values),
            **{f"p{p} ms": round(float(v), 1) for p, v in zip((50, 90, 99), shares, strict=False)},
        }

    return {
        "seconds": round(one.seconds, 2),
        "completed": summary(one.completed),
        "refused": summary(one.refused),
        "sent late": summary(one.late),
        "wrong": one.wrong[:10],
    }


def to_markdown(info: Mapping[str, Any], found: Found) -> str:
    """The report."""
    ats, overs = [at for at, _ in found.rounds], [over for _, over in found.rounds]
    doc = (__doc__ or "").split("\n\n")
    offered = sum(len(one.late) for one in overs) / sum(one.seconds for one in overs)
    lines = ["# Overload", "", doc[2].replace("\n", " "), "", *list_info(info), ""]
    lines += ["| clients in a closed loop | completed/s |", "|---|---|"]
    lines += [f"| {n}{' (capacity)' if n == found.capacity else ''} | {rate:.1f} |" for n, rate in found.levels.items()]
    lines += ["", "| | at capacity | overload |", "|---|---|---|"]
    lines += [f"| offered/s | – | {offered:.1f} |"]
    lines += [f"| completed/s | {rate_of(ats):.1f} | {rate_of(overs):.1f} |"]
    lines += [f"| p99 of completed, ms | {p99_of(ats):.0f} | {p99_of(overs):.0f} |"]
    halves = [np.median(np.concatenate([one.completed for one in loads])) for loads in (ats, overs)]
    lines += [f"| median of completed, ms | {halves[0]:.0f} | {halves[1]:.0f} |"]
    refused, late = found.pooled("refused"), found.pooled("late")
    lines += [f"| refused | 0 | {len(refused)} (median {np.median(refused):.1f} ms) |"]
    lines += [f"| sent late, p99 ms | – | {np.percentile(late, 99):.1f} |"]
    lines += ["", "| goal | found | must be | met |", "|---|---|---|---|"]
    lines += [f"| {g.name} | {g.found} | {g.bound} | {'yes' if g.met else '**no**'} |" for g in goals_of(found)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 1 when a goal is missed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="overload.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--leave", type=int, default=10, help="number of disconnects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args, started = parser.parse_args(arguments), datetime.now(UTC)
    bodies = [
        json.dumps({"messages": [{"role": "user", "content": q.text}], "rtap": {"max_cycles": 4}}).encode()
        for q in questions_of([])[:512]
    ]
    with running_server(serve_command(None, None, []), log=LOGS / "levels.log", ready_seconds=READY_SECONDS) as url:
        levels = uvloop.run(_levels(url, bodies, args.levels, args.seconds / 2))
    capacity = capacity_of(levels)
    flags = ["--max-in-flight-requests", str(capacity)]
    command = serve_command(None, None, flags)
    with running_server(command, log=LOGS / "overload.log", ready_seconds=READY_SECONDS) as url:
        rounds = uvloop.run(_rounds(url, bodies, capacity, args))
        leaving = uvloop.run(_leaving(url, args.leave, min(_LEAVERS, capacity)))
    found = Found(levels, capacity, rounds, leaving)
    info = run_info(__file__, arguments, started, seed=args.seed, flags=" ".join(flags))
    content = {
        "setting": info,
        "completed/s by clients": found.levels,
        "capacity": found.capacity,
        "rounds": [{"at capacity": _summary(at), "overload": _summary(over)} for at, over in found.rounds],
        "seconds until idle": [round(seconds, 3) for seconds in found.leaving],
        "goals": [asdict(goal) for goal in goals_of(found)],
    }
    write_report(args.output, "overload", content, to_markdown(info, found))
    return int(not all(goal.met for goal in goals_of(found)))


if __name__ == "__main__":
    sys.exit(main())
