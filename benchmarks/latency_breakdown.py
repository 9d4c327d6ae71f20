"""Latency breakdown of a request: queue, prefill, decode, scoring, the recursion loop, HTTP; and the cost of cycle k.

Sums of the server's histograms before and after a load, against the client's clock. Writes docs/results/where/.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import LOGS, MODELS, READY_SECONDS, RESULTS, list_info, metric_sums, processes_of, run_info, write_report

from rtap_training.evaluation.client import RtapServer
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import CycleRecord, Load, RunSpec
from rtap_training.evaluation.rules import CONFIDENCE, SINGLE
from rtap_training.evaluation.server_process import running_server, serve_command

PARTS = ("queue", "prefill", "decode", "engine", "scoring", "ours", "http")
IDLE_SECONDS = 10.0
QUEUE, PREFILL, DECODE, CYCLES, SCORING, REQUESTS = SUMS = (
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:e2e_request_latency_seconds_sum",
    "rtap_confidence_seconds_sum",
    "rtap_request_seconds_sum",
)


@dataclass(frozen=True, slots=True)
class Split:
    """Mean milliseconds of a request.

    engine: vLLM's time for its cycles without queue, prefill and decode. ours: the recursion loop. http: the client's
    time without all of these: sockets, parsing, chat template, JSON."""

    policy: str
    concurrency: int
    requests: int
    cycles: float
    tokens: float
    queue: float
    prefill: float
    decode: float
    engine: float
    scoring: float
    ours: float
    http: float

    @property
    def total(self) -> float:
        """Latency at the client."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True, slots=True)
class Start:
    """ready_seconds: from the command to /ready. gibibytes: resident, of all processes. idle_share: of one core."""

    ready_seconds: float
    gibibytes: float
    idle_share: float


@dataclass(frozen=True, slots=True)
class CycleCost:
    """Means of the k-th cycle, from 1. recomputed: prompt tokens outside the prefix cache."""

    cycle: int
    tokens: float
    prompt_tokens: float
    recomputed: float
    write_ms: float
    score_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Raises SystemExit when a request failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="latency_breakdown.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--requests", type=int, nargs="+", default=[60, 480], help="for each concurrency")
    parser.add_argument("--max-cycles", type=int, default=4)
    parser.add_argument("--cost-cycles", type=int, default=8, help="cycles whose cost is measured")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=RESULTS / "where")
    args = parser.parse_args(arguments)
    started = datetime.now(UTC)
    questions = next(iter(load_questions([MODELS / "eval" / "countdown.jsonl"]).values()))
    launched = time.perf_counter()
    with running_server(serve_command(None, None, []), log=LOGS / "where.log", ready_seconds=READY_SECONDS) as url:
        start = _start(url, time.perf_counter() - launched)
        splits = asyncio.run(_measure(url, questions, args))
        costs = asyncio.run(_costs(url, questions, args.cost_cycles, args.requests[0]))
    info = run_info(__file__, arguments, started)
    content = {
        "setting": info,
        "start": asdict(start),
        "splits": list(map(asdict, splits)),
        "cycles": list(map(asdict, costs)),
    }
    write_report(args.output, "where", content, to_markdown(info, start, splits, costs))
    return 0


async def _measure(url: str, questions: Sequence[Question], args: argparse.Namespace) -> list[Split]:
    splits: list[Split] = []
    for concurrency, count in zip(args.concurrency, args.requests, strict=True):
        server = await RtapServer(url, api_key=None, timeout_seconds=120).connect()
        chosen = [questions[i % len(questions)] for i in range(count)]
        load = Load(concurrency, 1.0, 0, args.max_cycles)
        for spec in (RunSpec(SINGLE), RunSpec(CONFIDENCE, args.threshold)):
            await server.run("warm-up", chosen[: 2 * concurrency], spec, load)
            before = metric_sums(url, SUMS)
            run = await server.run("countdown", chosen, spec, load)
            spent = {name: 1000 * (after - before[name]) / count for name, after in metric_sums(url, SUMS).items()}
            if len(run.answered) < count:
                raise SystemExit(f"{count - len(run.answered)} of {count} requests failed")
            engine = spent[CYCLES] - spent[QUEUE] - spent[PREFILL] - spent[DECODE]
            splits.append(
                Split(
                    policy=spec.rule,
                    concurrency=concurrency,
                    requests=count,
                    cycles=sum(len(o.cycles) for o in run.answered) / count,
                    tokens=sum(o.policy_tokens for o in run.answered) / count,
                    queue=spent[QUEUE],
                    prefill=spent[PREFILL],
                    decode=spent[DECODE],
                    engine=engine,
                    scoring=spent[SCORING],
                    ours=spent[REQUESTS] - spent[CYCLES] - spent[SCORING],
                    http=1000 * sum(o.seconds for o in run.answered) / count - spent[REQUESTS],
                )
            )
    return splits


def _start(url: str, ready_seconds: float) -> Start:
    processes = processes_of(url)

    def cpu_seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before = cpu_seconds()
    time.sleep(IDLE_SECONDS)
    resident = sum(process.memory_info().rss for process in processes)
    return Start(ready_seconds, resident / 2**30, (cpu_seconds() - before) / IDLE_SECONDS)


async def _costs(url: str, questions: Sequence[Question], cycles: int, count: int) -> list[CycleCost]:
    server = await RtapServer(url, api_key=None, timeout_seconds=120).connect()
    spec, load = RunSpec(CONFIDENCE, 1.0), Load(1, 1.0, 0, cycles)  # no score reaches the threshold
    run = await server.run("countdown", questions[:count], spec, load)
    costs: list[CycleCost] = []
    for index in range(cycles):
        found = [o.cycles[index] for o in run.answered if len(o.cycles) > index]
        if not found:  # no request had room for it
            break

        def mean(figure: Callable[[CycleRecord], float], found: Sequence[CycleRecord] = found) -> float:
            return sum(map(figure, found)) / len(found)

        costs.append(
            CycleCost(
                cycle=index + 1,
                tokens=mean(lambda c: c.tokens),
                prompt_tokens=mean(lambda c: c.prompt_tokens),
                recomputed=mean(lambda c: c.prompt_tokens - (c.cached_tokens or 0)),
                write_ms=1000 * mean(lambda c: c.seconds - (c.confidence_seconds or 0.0)),
                score_ms=1000 * mean(lambda c: c.confidence_seconds or 0.0),
            )
        )
    return costs


def to_markdown(info: Mapping[str, Any], start: Start, splits: Sequence[Split], costs: Sequence[CycleCost]) -> str:
    """The report."""
    lines = [
        "# Latency breakdown of a request",
        "",
        "Mean milliseconds of a request and their share, from the server's histograms and the client's clock. Client, "
        "server and both engines share the cores. *engine*: vLLM from arrival to its queue, and from the last token "
        "to our loop. *ours*: the recursion loop, its events and outputs. *http*: sockets, request parsing, chat "
        "template and JSON, in vLLM's routes and our middleware.",
        "",
        *list_info(info),
        f"- ready after {start.ready_seconds:.0f} s, {start.gibibytes:.1f} GiB resident in all processes, "
        f"{start.idle_share:.1%} of one core while idle",
        "",
        f"| policy | at a time | cycles | tokens | total | {' | '.join(PARTS)} | ms a token |",
        f"|---|---|---|---|---|{'---|' * len(PARTS)}---|",
    ]
    for split in splits:
        shares = [f"{getattr(split, part):.1f} ({getattr(split, part) / split.total:.1%})" for part in PARTS]
        cells = [split.policy, str(split.concurrency), f"{split.cycles:.2f}", f"{split.tokens:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{split.total:.1f}', *shares])} | {split.total / split.tokens:.2f} |")
    lines += [
        "",
        "## Cost of cycle k",
        "",
        "One request at a time, with a threshold that no score reaches. *recomputed*: prompt tokens outside the prefix "
        "cache.",
        "",
        "| cycle | tokens | prompt | recomputed | ms to write | ms a token | ms to score |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.cycle} | {c.tokens:.1f} | {c.prompt_tokens:.1f} | {c.recomputed:.1f} | {c.write_ms:.1f} "
        f"| {c.write_ms / c.tokens:.2f} | {c.score_ms:.1f} |"
        for c in costs
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
