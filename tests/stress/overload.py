"""What five times the load does to a server that takes no more than it can answer.

First, closed loops of more and more clients find the rate that it can hold, and how many requests at a time that takes.
Then the server is started with that many as its ``--max-in-flight-requests``, and two loads take turns on it: that many
clients in a closed loop (*at capacity*), and requests that arrive at random five times as often as it can answer,
whoever is still waiting (*overload*). Ratios are of pooled rounds, with 95 % intervals by paired bootstrap over rounds.
At last, clients leave, and the engine's gauges are watched until they are at 0. Writes docs/results/overload.{json,md}.
"""

import argparse
import asyncio
import json
import os
import platform
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
from bench_open_load import Clients, Load, open_session, p99_of, rate_of
from bench_servers import ROOT, bench_questions, chat_body, interval_text, ratio_over_rounds, run_of
from prometheus_client.parser import text_string_to_metric_families

from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval

TIMES = 5  # of the capacity is offered
_NEAR_THE_BEST = 0.97  # the fewest clients that complete this share of the best rate are the capacity
MOST_P99_RATIO, LEAST_RATE_RATIO, MOST_REFUSAL_MS, MOST_LEAVING_SECONDS = 1.5, 1.0, 50.0, 1.0
_LEAVERS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """levels: completed a second by clients at a time. rounds: at capacity, and in overload. leaving: seconds until the
    gauges were at 0, each time clients left."""

    levels: Mapping[int, float]
    capacity: int
    rounds: Sequence[tuple[Load, Load]]
    leaving: Sequence[float]

    @property
    def p99(self) -> Interval:
        """Of admitted requests, overload over capacity."""
        return ratio_over_rounds(p99_of, [over for _, over in self.rounds], [at for at, _ in self.rounds])

    @property
    def rate(self) -> Interval:
        """Of completed requests, overload over capacity."""
        return ratio_over_rounds(rate_of, [over for _, over in self.rounds], [at for at, _ in self.rounds])

    def pooled(self, what: str) -> list[float]:
        """Of all overloads."""
        return [value for _, over in self.rounds for value in getattr(over, what)]


async def _levels(url: str, bodies: Sequence[bytes], levels: Sequence[int], seconds: float) -> dict[int, float]:
    """Completed a second by number of clients, up and down again, so that a drift of the machine cancels."""
    async with open_session() as session:
        clients, loads = Clients(session, url, bodies), {level: list[Load]() for level in levels}
        await clients.closed(8, 3)
        for level in (*levels, *reversed(levels)):
            loads[level].append(await clients.closed(level, seconds))
            print(f"{level} clients: {rate_of(loads[level]):.1f}/s", flush=True)
    return {level: rate_of(found) for level, found in loads.items()}


def capacity_of(levels: Mapping[int, float]) -> int:
    """The fewest clients with which (nearly) the best rate is reached."""
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
    """Clients with seconds of work left go at once; how long until nothing runs or waits in the engine."""
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
    """What was to be reached, and what was."""

    what: str
    found: str
    bound: str
    met: bool


def goals_of(found: Found) -> list[Goal]:
    """All of them. A rate is met where its interval reaches it."""
    refused = float(np.percentile(found.pooled("refused"), 99))
    wrong, leaving, p99, rate = found.pooled("wrong"), max(found.leaving), found.p99, found.rate
    answer, late = f"<= {MOST_REFUSAL_MS:g}", f"<= {MOST_LEAVING_SECONDS:g}"
    return [
        Goal("p99 of admitted, over that at capacity", interval_text(p99), "<= 1.5", p99.value <= MOST_P99_RATIO),
        Goal("completed/s, over that at capacity", interval_text(rate), ">= 1", rate.high >= LEAST_RATE_RATIO),
        Goal("refusal (503, Retry-After), p99 ms", f"{refused:.1f}", answer, refused <= MOST_REFUSAL_MS),
        Goal("neither answered nor refused so", str(len(wrong)), "0", not wrong),
        Goal(
            "s from clients' leaving to an idle engine, most", f"{leaving:.2f}", late, leaving <= MOST_LEAVING_SECONDS
        ),
    ]


def _summary(one: Load) -> dict[str, Any]:
    def told(values: Sequence[float]) -> dict[str, float]:
        shares = np.percentile(values, (50, 90, 99)) if values else ()
        return {
            "count": len(values),
            **{f"p{p} ms": round(float(v), 1) for p, v in zip((50, 90, 99), shares, strict=False)},
        }

    return {
        "seconds": round(one.seconds, 2),
        "completed": told(one.completed),
        "refused": told(one.refused),
        "sent late": told(one.late),
        "wrong": one.wrong[:10],
    }


def to_markdown(setting: Mapping[str, Any], found: Found) -> str:
    """The report."""
    ats, overs = [at for at, _ in found.rounds], [over for _, over in found.rounds]
    doc = (__doc__ or "").split("\n\n")
    offered = sum(len(one.late) for one in overs) / sum(one.seconds for one in overs)
    lines = ["# Overload", "", doc[1].replace("\n", " "), "", *(f"- {k}: `{v}`" for k, v in setting.items()), ""]
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
    lines += [f"| {g.what} | {g.found} | {g.bound} | {'yes' if g.met else '**no**'} |" for g in goals_of(found)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Result: 0, or 1 when a goal is missed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="bench_overload.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--leave", type=int, default=10, help="how often clients leave")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    args, started = parser.parse_args(arguments), datetime.now(UTC)
    questions = bench_questions([])[:512]
    bodies = [json.dumps(chat_body(question, None, 1.0, rtap={"max_cycles": 4})).encode() for question in questions]
    logs = ROOT / "build" / "bench"
    with running_server(serve_command(None, None, []), log=logs / "levels.log", ready_seconds=300) as url:
        levels = uvloop.run(_levels(url, bodies, args.levels, args.seconds / 2))
    capacity = capacity_of(levels)
    flags = ["--max-in-flight-requests", str(capacity)]
    with running_server(serve_command(None, None, flags), log=logs / "overload.log", ready_seconds=300) as url:
        rounds = uvloop.run(_rounds(url, bodies, capacity, args))
        leaving = uvloop.run(_leaving(url, args.leave, min(_LEAVERS, capacity)))
    found = Found(levels, capacity, rounds, leaving)
    setting = run_of([f"scripts/{Path(__file__).name}", *arguments], started) | {
        "seed": args.seed,
        "flags": " ".join(flags),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, which the clients use as well",
    }
    content = {
        "setting": setting,
        "completed/s by clients": found.levels,
        "capacity": found.capacity,
        "rounds": [{"at capacity": _summary(at), "overload": _summary(over)} for at, over in found.rounds],
        "seconds until idle": [round(seconds, 3) for seconds in found.leaving],
        "goals": [asdict(goal) for goal in goals_of(found)],
    }
    write_atomically(args.output / "overload.json", json.dumps(content, indent=1) + "\n")
    report = to_markdown(setting, found)
    write_atomically(args.output / "overload.md", report)
    print(report)
    return int(not all(goal.met for goal in goals_of(found)))


if __name__ == "__main__":
    sys.exit(main())
