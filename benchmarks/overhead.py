"""Overhead of ``rtap serve --policy single`` against plain ``vllm serve``, on any model.

    python benchmarks/overhead.py MODEL --questions QUESTIONS.jsonl --concurrency 1 8 32

All servers run at once and are loaded one at a time, in a random order in each round, with the same prompts and seeds.
They are started several times, because two processes of the same code differ for their whole lives. ``--base CHECKOUT``
adds a third server, an older checkout of this repository. Writes docs/results/overhead.{json,md}, with a model also its
name: overhead-MODEL.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    MODELS,
    RESULTS,
    Load,
    Servers,
    bench_serve,
    commit_of,
    comparable_servers,
    interval_text,
    is_bundled,
    list_info,
    questions_of,
    ratio_over_rounds,
    report_name,
    run_info,
    shuffled,
    write_prompts,
    write_report,
)

from rtap_training.evaluation.statistics import Interval

Round = Mapping[str, Load]
"""The loads of one round by server: "rtap", "vllm" and perhaps "base"."""
_LEAST_TRIAL = 2  # requests that size the rounds
# Sizes of a run of about ten minutes on two cores, for the demo policy and a model of half a billion parameters.
DEMO_SIZES = {"starts": 4, "rounds": 4, "seconds": 4.0, "output_len": 256}
SIZES = {"starts": 2, "rounds": 3, "seconds": 10.0, "output_len": 64}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of each server. ratio: rtap over vllm; over_base: rtap over base.

    bound: what the ratio must reach; None without a goal. is_met refers to it."""

    name: str
    values: Mapping[str, float]
    ratio: Interval
    over_base: Interval | None
    bound: str | None
    is_met: bool | None


@dataclass(frozen=True, slots=True)
class Level:
    """All figures at one concurrency. errors: failed requests of all servers."""

    concurrency: int
    starts: int
    rounds: int
    requests_a_round: int
    figures: tuple[Figure, ...]
    errors: int


def requests_per_second(loads: Sequence[Load]) -> float:
    """Of all loads together."""
    return sum(one.completed for one in loads) / sum(one.seconds for one in loads)


def tokens_per_second(loads: Sequence[Load]) -> float:
    """Of all loads together."""
    return sum(one.tokens for one in loads) / sum(one.seconds for one in loads)


def percentile_ms(name: str, percent: float) -> Callable[[Sequence[Load]], float]:
    """Percentile over the requests of all loads together, in milliseconds."""

    def figure(loads: Sequence[Load]) -> float:
        return 1000 * float(np.percentile(np.concatenate([getattr(one, name) for one in loads]), percent))

    return figure


def mean_chunks(loads: Sequence[Load]) -> float:
    """Streaming chunks with text, mean over the requests of all loads together."""
    return float(np.mean(np.concatenate([one.chunks for one in loads])))


def cpu_ms_per_token(loads: Sequence[Load]) -> float:
    """Processor time of the API process for each generated token, of all loads together."""
    return 1000 * sum(one.cpu_seconds for one in loads) / sum(one.tokens for one in loads)


FIGURES: Mapping[str, Callable[[Sequence[Load]], float]] = {
    "requests/s": requests_per_second,
    "tokens/s": tokens_per_second,
    "TTFT, median ms": percentile_ms("ttft", 50),
    "TTFT, p99 ms": percentile_ms("ttft", 99),
    "TPOT, median ms": percentile_ms("tpot", 50),
    "chunks a reply": mean_chunks,
    "API process, CPU ms a token": cpu_ms_per_token,
}

Bounds = Mapping[str, tuple[float | None, float | None]]
"""Bounds of the ratio of a figure: (at least, at most)."""
# A step of the demo policy takes 4 ms, in which the server's own work is visible.
DEMO_BOUNDS: Bounds = {"requests/s": (0.98, None), "TTFT, median ms": (None, 1.05), "chunks a reply": (0.95, None)}
BOUNDS: Bounds = {"tokens/s": (0.99, None), "TTFT, median ms": (None, 1.03), "chunks a reply": (0.95, None)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 1 when a goal is missed or a request failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    is_demo = is_bundled(args.model)
    for name, value in (DEMO_SIZES if is_demo else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    started = datetime.now(UTC)
    prompts = write_prompts(questions_of(args.questions))
    generator = args.confidence_model or (MODELS / "confidence" if is_demo else None)
    plain_flags = ["--reasoning-parser", args.reasoning_parser] if args.reasoning_parser else []
    measured: dict[int, list[list[Round]]] = {concurrency: [] for concurrency in args.concurrency}
    described: dict[str, Any] = {}
    for start in range(args.starts):
        print(f"start {start + 1} of {args.starts}", flush=True)
        with comparable_servers(
            args.model, confidence_model=generator, max_model_len=args.max_model_len, plain_flags=plain_flags,
            base=args.base, plain_first=start % 2 == 0,
        ) as servers:  # fmt: skip
            for concurrency in args.concurrency:
                measured[concurrency].append(_measure(servers, prompts, concurrency, start, args))
            described = {
                "flags": " ".join(servers.flags),
                "flags of vllm serve alone": " ".join(plain_flags) or "none",
                "environment": " ".join(f"{name}={value}" for name, value in servers.environment.items()),
            }
    bounds = DEMO_BOUNDS if is_demo else BOUNDS
    levels = [summarise(concurrency, rounds, bounds) for concurrency, rounds in measured.items()]
    info = run_info(__file__, arguments, started, seed=args.seed, model=str(args.model), generator=str(generator))
    if args.base is not None:
        info["base"] = commit_of(args.base)
    info |= described
    content = {"setting": info, "levels": list(map(asdict, levels))}
    write_report(args.output, report_name("overhead", args.model), content, to_markdown(info, levels))
    failed = any(level.errors for level in levels)
    return int(failed or any(f.is_met is False for level in levels for f in level.figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="overhead.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODELS / "policy", help="default: the bundled policy")
    parser.add_argument("--confidence-model", type=Path, help="idle generator of ours; default: of the bundled policy")
    parser.add_argument("--base", type=Path, help="an older checkout of this repository, a third server")
    parser.add_argument("--reasoning-parser", help="of the plain server, e.g. deepseek_r1; ours always has one")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="JSONL files; default: the bundled ones")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--starts", type=int, help=f"how often all servers are started {_defaults('starts')}")
    parser.add_argument("--rounds", type=int, help=f"rounds of each start {_defaults('rounds')}")
    parser.add_argument("--seconds", type=float, help=f"approximate load of a server in a round {_defaults('seconds')}")
    parser.add_argument("--output-len", type=int, help=f"most tokens of a completion {_defaults('output_len')}")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def _defaults(name: str) -> str:
    return f"(default: {SIZES[name]}; for the bundled policy {DEMO_SIZES[name]})"


def _measure(servers: Servers, prompts: Path, concurrency: int, start: int, args: argparse.Namespace) -> list[Round]:
    """The rounds of one start at one concurrency, after a warm-up of every server."""

    def load_all(count: int, seed: int) -> Round:
        return {
            server.name: bench_serve(
                server, prompts, concurrency=concurrency, count=count, seed=seed, output_len=args.output_len
            )
            for server in shuffled(servers.all, concurrency, seed)
        }

    trial = load_all(max(_LEAST_TRIAL, concurrency), args.seed)
    rate = requests_per_second([trial["vllm"]])
    count = concurrency * max(1, round(rate * args.seconds / concurrency))
    first = args.seed + 1 + start * args.rounds
    rounds: list[Round] = []
    for seed in range(first, first + args.rounds):
        rounds.append(load_all(count, seed))
        rates = ", ".join(f"{name} {requests_per_second([load]):.1f}/s" for name, load in rounds[-1].items())
        print(f"{concurrency} at a time, {count} requests: {rates}", flush=True)
    return rounds


def summarise(concurrency: int, starts: Sequence[Sequence[Round]], bounds: Bounds) -> Level:
    """Figures of one concurrency with their ratios and intervals. starts: the rounds of each start."""
    rounds = [one for rounds in starts for one in rounds]
    loads = {name: [one[name] for one in rounds] for name in rounds[0]}
    sizes = list(map(len, starts))
    figures: list[Figure] = []
    for name, figure in FIGURES.items():
        least, most = bounds.get(name, (None, None))
        ratio = ratio_over_rounds(figure, loads["rtap"], loads["vllm"], starts=sizes)
        over_base = ratio_over_rounds(figure, loads["rtap"], loads["base"], starts=sizes) if "base" in loads else None
        bound = f">= {least}" if least is not None else f"<= {most}" if most is not None else None
        is_met = ratio.value >= least if least is not None else ratio.value <= most if most is not None else None
        values = {server: figure(of_server) for server, of_server in loads.items()}
        figures.append(Figure(name, values, ratio, over_base, bound, is_met))
    errors = sum(load.failed for one in rounds for load in one.values())
    requests = sum(load.completed + load.failed for load in loads["rtap"]) // len(rounds)
    return Level(concurrency, len(starts), len(rounds), requests, tuple(figures), errors)


def to_markdown(info: Mapping[str, Any], levels: Sequence[Level]) -> str:
    """The report."""
    lines = [
        "# Overhead of policy `single` against plain `vllm serve`",
        "",
        "Load by `vllm bench serve`: streaming chat requests, a fixed number at a time. All servers run at once and "
        "are loaded one at a time, in a random order in each round, with the same prompts and seeds. Ratios have 95 % "
        "intervals by bootstrap over starts and their rounds. TTFT is the time to the first streaming chunk with text, "
        "TPOT the time per token after it, chunks are those with text. The API process answers HTTP; the engine is "
        "another.",
        "",
        *list_info(info),
    ]
    for level in levels:
        servers = sorted(level.figures[0].values, key=["rtap", "vllm", "base"].index)
        has_base = "base" in servers
        head = ["figure", *servers, "rtap / vllm [95 %]", "goal", "met", *(["rtap / base [95 %]"] if has_base else [])]
        lines += [
            "",
            f"## {level.concurrency} at a time",
            "",
            f"{level.starts} starts, {level.rounds} rounds in all, of about {level.requests_a_round} requests to each "
            f"server; {level.errors} failed.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
        ]
        for f in level.figures:
            met = "" if f.is_met is None else "yes" if f.is_met else "**no**"
            places = 1 if min(f.values.values()) >= 1 else 3
            cells = [f.name, *(f"{f.values[server]:,.{places}f}" for server in servers), interval_text(f.ratio)]
            cells += [f.bound or "", met, *([interval_text(f.over_base)] if f.over_base is not None else [])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
