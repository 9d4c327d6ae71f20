"""What beginning the next cycle ahead of the verdict is worth: ``--speculate-below`` 4 against 0 on the bundled models.

Both servers live at once and are asked one at a time, in alternating order, the same questions with the same seeds.
Ratios are over pooled rounds, with 95 % intervals by bootstrap over rounds. Writes docs/results/ahead/ahead.{json,md}.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_servers import MODELS, ROOT, interval_text, ratio_over_rounds, run_of, sums
from rich.console import Console

from training.evaluation.client import Load, RtapServer
from training.evaluation.questions import Question, load_questions
from training.evaluation.records import RunSpec, write_atomically
from training.evaluation.rules import CONFIDENCE
from training.evaluation.server_process import running_server, serve_command
from training.evaluation.statistics import Interval
from training.tasks import check

SUMS = ("rtap_confidence_seconds_sum", "rtap_request_seconds_sum", "rtap_discarded_tokens_total")


@dataclass(frozen=True, slots=True)
class Round:
    """Sums over the same requests on one server. first_answer: of ``rtap.first_answer_seconds``."""

    first_answer_seconds: float
    wall_seconds: float
    waited_seconds: float
    request_seconds: float
    returned_tokens: int
    discarded_tokens: float
    failed: int


@dataclass(frozen=True, slots=True)
class Level:
    """One concurrency: rounds of both servers, and ratios with over without."""

    concurrency: int
    ahead: tuple[Round, ...]
    waiting: tuple[Round, ...]
    first_answer: Interval
    wall: Interval


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Result: 1 when a request failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="bench_ahead.py")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=8, help="even, so that each server is first equally often")
    parser.add_argument("--requests", type=int, default=32, help="a round and server")
    parser.add_argument("--max-cycles", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "ahead")
    args = parser.parse_args(arguments)
    console, started = Console(), datetime.now(UTC)
    questions = next(iter(load_questions([MODELS / "eval" / "countdown.jsonl"]).values()))
    logs = ROOT / "build" / "bench"
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(
                running_server(serve_command(None, None, flags), log=logs / f"{name}.log", ready_seconds=300)
            )
            for name, flags in (("ahead", []), ("waiting", ["--speculate-below", "0"]))
        }
        levels = asyncio.run(_measure(urls, questions, args, console))
    setting = run_of([f"scripts/{Path(__file__).name}", *arguments], started)
    content = {"setting": setting, "levels": [asdict(level) for level in levels]}
    write_atomically(args.output / "ahead.json", json.dumps(content, indent=1) + "\n")
    report = to_markdown(setting, levels)
    write_atomically(args.output / "ahead.md", report)
    console.print(report, markup=False, soft_wrap=True)
    return int(any(r.failed for level in levels for r in (*level.ahead, *level.waiting)))


async def _measure(
    urls: Mapping[str, str], questions: Sequence[Question], args: argparse.Namespace, console: Console
) -> list[Level]:
    levels: list[Level] = []
    for concurrency in args.concurrency:
        load = Load(concurrency, 1.0, 0, args.max_cycles)
        servers = {
            name: await RtapServer(url, api_key=None, timeout_seconds=120, concurrency=concurrency).connect()
            for name, url in urls.items()
        }
        rounds: dict[str, list[Round]] = {name: [] for name in urls}
        for number in range(-1, args.rounds):  # the first warms up
            first = max(number, 0) * args.requests
            chosen = [questions[i % len(questions)] for i in range(first, first + args.requests)]
            names = list(urls) if number % 4 in (0, 3) else [*urls][::-1]  # linear drift cancels
            for name in names:
                found = await _round(urls[name], servers[name], chosen, RunSpec(CONFIDENCE, args.threshold), load)
                if number >= 0:
                    rounds[name].append(found)
        levels.append(summarise(concurrency, rounds["ahead"], rounds["waiting"]))
        console.print(f"{concurrency} at a time: done")
    return levels


async def _round(url: str, server: RtapServer, questions: Sequence[Question], spec: RunSpec, load: Load) -> Round:
    before = sums(url, SUMS)
    run = await server.run("countdown", questions, spec, load, check, on_outcome=lambda _: None)
    waited, seconds, discarded = (after - before[name] for name, after in sums(url, SUMS).items())
    return Round(
        first_answer_seconds=sum(o.first_answer_seconds or o.seconds for o in run.answered),
        wall_seconds=run.wall_seconds or 0.0,
        waited_seconds=waited,
        request_seconds=seconds,
        returned_tokens=sum(o.policy_tokens for o in run.answered),
        discarded_tokens=discarded,
        failed=len(run.outcomes) - len(run.answered),
    )


def summarise(concurrency: int, ahead: Sequence[Round], waiting: Sequence[Round]) -> Level:
    """Ratios of sums, resampled by round."""
    return Level(
        concurrency,
        tuple(ahead),
        tuple(waiting),
        ratio_over_rounds(lambda rounds: sum(r.first_answer_seconds for r in rounds), ahead, waiting),
        ratio_over_rounds(lambda rounds: sum(r.wall_seconds for r in rounds), ahead, waiting),
    )


def to_markdown(setting: Mapping[str, Any], levels: Sequence[Level]) -> str:
    """The report."""
    lines = [
        "# The next cycle ahead of the verdict",
        "",
        "Both servers alive at once, asked in turn, the same questions and seeds. Ratios are with over without, below "
        "1 is faster, with 95 % intervals by bootstrap over rounds. *Scoring*: share of the requests' time in which a "
        "score was outstanding; without, all of it is waiting. *Discarded*: tokens sampled for nothing, over those "
        "returned.",
        "",
        *(f"- {name}: `{value}`" for name, value in setting.items()),
        "",
        "| at a time | time to the answer | wall-clock | scoring without | scoring with | discarded |",
        "|---|---|---|---|---|---|",
    ]
    for level in levels:
        waits = (
            sum(r.waited_seconds for r in rounds) / sum(r.request_seconds for r in rounds)
            for rounds in (level.waiting, level.ahead)
        )
        discarded = sum(r.discarded_tokens for r in level.ahead) / sum(r.returned_tokens for r in level.ahead)
        cells = [str(level.concurrency), *map(interval_text, (level.first_answer, level.wall))]
        lines.append(f"| {' | '.join([*cells, *(f'{w:.1%}' for w in waits), f'{discarded:.1%}'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
