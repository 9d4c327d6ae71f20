"""What recursion costs where it is not used: policy ``single`` of this server against plain ``vllm serve``.

Both servers live at once and are loaded one at a time, in alternating order (A B, B A, …), each round with the same
prompts and seeds on both, so that a slow minute of the machine hits both. Both are started several times, because a
process is a little faster or slower than another of the same code as long as it lives. The plain server gets
``</answer>`` as stop token, so that both stop at the same place. Ratios are over pooled rounds, with 95 % intervals by
paired bootstrap over starts and their rounds. Writes docs/results/overhead.{json,md}.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvloop
from bench_load import Load, load, open_session
from bench_servers import (
    MODELS,
    ROOT,
    STREAMED,
    Servers,
    bench_questions,
    both_servers,
    chat_body,
    drawn,
    interval_text,
    ratio_over_rounds,
    setting,
)
from rich.console import Console
from rich.progress import Progress

from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.statistics import Interval


@dataclass(frozen=True, slots=True)
class Round:
    """The same requests on both servers. ours_first: which was loaded first."""

    ours: Load
    plain: Load
    ours_first: bool


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of both servers, and ours over plain. bound: what the ratio must reach, None where nothing must."""

    name: str
    ours: float
    plain: float
    ratio: Interval
    bound: str | None
    is_met: bool | None


@dataclass(frozen=True, slots=True)
class Level:
    """All figures at one concurrency."""

    concurrency: int
    starts: int
    rounds: int
    requests_a_round: int
    figures: tuple[Figure, ...]
    errors: int


def requests_per_second(loads: Sequence[Load]) -> float:
    """Of all loads together."""
    return sum(one.num_requests for one in loads) / sum(one.seconds for one in loads)


def tokens_per_second(loads: Sequence[Load]) -> float:
    """Of all loads together."""
    return sum(one.tokens for one in loads) / sum(one.seconds for one in loads)


def percentile_ms(what: str, percent: float) -> Callable[[Sequence[Load]], float]:
    """Percentile over the requests of all loads together, in milliseconds."""

    def figure(loads: Sequence[Load]) -> float:
        return 1000 * float(np.percentile(np.concatenate([getattr(one, what) for one in loads]), percent))

    return figure


# name, figure of some loads, bound of ours over plain: (at least, at most)
FIGURES: tuple[tuple[str, Callable[[Sequence[Load]], float], tuple[float | None, float | None]], ...] = (
    ("requests/s", requests_per_second, (0.98, None)),
    ("tokens/s", tokens_per_second, (0.98, None)),
    ("first chunk, median ms", percentile_ms("first_chunk", 50), (None, 1.05)),
    ("first chunk, p99 ms", percentile_ms("first_chunk", 99), (None, None)),
    ("first text, median ms", percentile_ms("first_text", 50), (None, 1.05)),
    ("first text, p99 ms", percentile_ms("first_text", 99), (None, None)),
    ("first text after the tag, median ms", percentile_ms("first_word", 50), (None, 1.05)),
    ("first text after the tag, p99 ms", percentile_ms("first_word", 99), (None, None)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Result: 0, or 1 when a bound is missed or a request failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    console = Console()
    started = datetime.now(UTC)
    questions = bench_questions(args.questions)
    generator = None if args.without_generator else args.confidence_model
    plain_flags = ["--reasoning-parser", args.reasoning_parser] if args.reasoning_parser else []
    measured: dict[int, list[list[Round]]] = {concurrency: [] for concurrency in args.concurrency}
    described: dict[str, Any] = {}
    for start in range(args.starts):
        console.print(f"starting both servers, {start + 1} of {args.starts} times")
        with both_servers(
            model=args.model,
            confidence_model=generator,
            max_model_len=args.max_model_len,
            logs=ROOT / "build" / "bench",
            plain_flags=plain_flags,
            gives_executor=args.same_executor,
        ) as servers:
            for concurrency, rounds in uvloop.run(_measure(servers, questions, args, start, console)).items():
                measured[concurrency].append(rounds)
            described = setting(servers, [f"scripts/{Path(__file__).name}", *arguments], started)
    levels = [summarise(concurrency, rounds) for concurrency, rounds in measured.items()]
    described |= {"seed": args.seed, "generator beside ours": str(generator)}
    results = {"setting": described, "levels": [asdict(level) for level in levels]}
    write_atomically(args.output / "overhead.json", json.dumps(results, indent=1) + "\n")
    markdown = to_markdown(described, levels)
    write_atomically(args.output / "overhead.md", markdown)
    console.print(markdown, markup=False, soft_wrap=True)
    failed = any(level.errors for level in levels)
    return 1 if failed or any(f.is_met is False for level in levels for f in level.figures) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_overhead.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODELS / "policy")
    parser.add_argument("--confidence-model", type=Path, default=MODELS / "confidence")
    parser.add_argument("--reasoning-parser", help="of the plain server, e.g. deepseek_r1; ours always has one")
    parser.add_argument("--same-executor", action="store_true", help="the plain one on our executor, not on vLLM's")
    parser.add_argument("--without-generator", action="store_true", help="ours without a (here idle) generator")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="default: the bundled ones")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--starts", type=int, default=4, help="how often both servers are started")
    parser.add_argument("--rounds", type=int, default=4, help="of each start; even: each server is first equally often")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long one server is loaded in a round")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    return parser


async def _measure(
    servers: Servers,
    questions: Sequence[Question],
    args: argparse.Namespace,
    start: int,
    console: Console,
) -> dict[int, list[Round]]:
    """The rounds of one start, the ``start``-th, at each concurrency."""
    measured: dict[int, list[Round]] = {}
    async with open_session() as session:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            for concurrency in args.concurrency:
                bar = progress.add_task(f"{concurrency} at a time", total=args.rounds)
                count = await _requests_a_round(session, servers, questions, concurrency, args)
                rounds = measured[concurrency] = list[Round]()
                for number in range(start * args.rounds, (start + 1) * args.rounds):
                    rounds.append(await _round(session, servers, questions, concurrency, count, number, args.seed))
                    progress.advance(bar)
                for error in [e for one in rounds for e in (*one.ours.errors, *one.plain.errors)][:3]:
                    console.print(f"failed request: {error}", style="bold red", markup=False)
    return measured


async def _requests_a_round(
    session: aiohttp.ClientSession,
    servers: Servers,
    questions: Sequence[Question],
    concurrency: int,
    args: argparse.Namespace,
) -> int:
    """Warm both servers up, and see how many requests fill ``args.seconds``; a multiple of the concurrency."""
    count = 4 * concurrency
    await _round(session, servers, questions, concurrency, count, 0, args.seed + 1)
    trial = await _round(session, servers, questions, concurrency, count, 1, args.seed + 1)
    rate = count / trial.plain.seconds
    return concurrency * max(4, round(rate * args.seconds / concurrency))


async def _round(
    session: aiohttp.ClientSession,
    servers: Servers,
    questions: Sequence[Question],
    concurrency: int,
    count: int,
    number: int,
    seed: int,
) -> Round:
    """Load both servers with the same ``count`` requests. Rounds differ in prompts, seeds and who is first."""
    rng = np.random.default_rng([seed, concurrency, number])
    pairs = drawn(questions, rng, count)
    ours = [chat_body(q, s, 1.0, rtap={"policy": "single"}, **STREAMED) for q, s in pairs]
    plain = [chat_body(q, s, 1.0, stop_token_ids=[servers.answer_close_id], **STREAMED) for q, s in pairs]
    ours_first = number % 4 in (0, 3)  # A B, B A, B A, A B: linear drift cancels
    if ours_first:
        ours_load = await load(session, servers.rtap, ours, concurrency)
        return Round(ours_load, await load(session, servers.plain, plain, concurrency), ours_first)
    plain_load = await load(session, servers.plain, plain, concurrency)
    return Round(await load(session, servers.rtap, ours, concurrency), plain_load, ours_first)


def summarise(concurrency: int, starts: Sequence[Sequence[Round]]) -> Level:
    """Figures of one concurrency with their ratios and intervals, of the rounds of each start."""
    rounds = [one for rounds in starts for one in rounds]
    all_ours, all_plain = [r.ours for r in rounds], [r.plain for r in rounds]
    figures: list[Figure] = []
    for name, figure, (least, most) in FIGURES:
        interval = ratio_over_rounds(figure, all_ours, all_plain, starts=list(map(len, starts)))
        ratio = interval.value
        bound = f">= {least}" if least is not None else f"<= {most}" if most is not None else None
        is_met = ratio >= least if least is not None else ratio <= most if most is not None else None
        figures.append(Figure(name, figure(all_ours), figure(all_plain), interval, bound, is_met))
    errors = sum(len(r.ours.errors) + len(r.plain.errors) for r in rounds)
    requests = sum(r.ours.num_requests for r in rounds) // len(rounds)
    return Level(concurrency, len(starts), len(rounds), requests, tuple(figures), errors)


def to_markdown(setting: dict[str, Any], levels: Sequence[Level]) -> str:
    """The report."""
    lines = [
        "# Overhead of policy `single` against plain `vllm serve`",
        "",
        "Both servers alive at once, loaded one at a time, alternating; the same prompts and seeds on both in each "
        "round. Ratios are ours over plain, with 95 % intervals by bootstrap over starts of both and their rounds. "
        "`first chunk` has the role and no text: it is sent with the first token, and is what vLLM's own benchmark "
        "counts as the time to the first token. `first text` is the first "
        "chunk with any text in `content` or `reasoning`; the plain server's first text is the tag `<think>` itself, "
        "which ours does not send, so `first text after the tag` compares the same token of both.",
        "",
        *(f"- {name}: `{value}`" for name, value in setting.items()),
    ]
    for level in levels:
        lines += [
            "",
            f"## {level.concurrency} at a time",
            "",
            f"{level.starts} starts, {level.rounds} rounds in all, of some {level.requests_a_round} requests a server; "
            f"{level.errors} failed.",
            "",
            "| figure | rtap, single | vllm serve | ratio [95 %] | must be | met |",
            "|---|---|---|---|---|---|",
        ]
        for f in level.figures:
            met = "" if f.is_met is None else "yes" if f.is_met else "**no**"
            lines.append(
                f"| {f.name} | {f.ours:,.1f} | {f.plain:,.1f} | {interval_text(f.ratio)} | {f.bound or ''} | {met} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
