"""What server/executor.py is worth: `rtap serve` on our executor against itself on vLLM's executor of one process.

One server lives at a time, because what is measured, threads that wake up without need, would disturb another one too.
Both are started in turns, several times, and asked the same under policy ``single``; ratios are over pooled starts,
with 95 % intervals by paired bootstrap over them. Writes docs/results/executor.{json,md}.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from bench_load import Load, load, open_session
from bench_overhead import percentile_ms, requests_per_second
from bench_servers import (
    ROOT,
    SERVED_NAME,
    STREAMED,
    VLLM_EXECUTOR,
    bench_questions,
    chat_body,
    cpu_seconds,
    drawn,
    interval_text,
    machine,
    processes_of,
    ratio_over_rounds,
    run_of,
)
from rich.console import Console

from training.evaluation.records import write_atomically
from training.evaluation.server_process import running_server, serve_command

GENERATOR_FLAG = ["--confidence-engine-args", json.dumps({"distributed_executor_backend": VLLM_EXECUTOR})]
FIGURES = {"requests/s": requests_per_second, "first chunk, median ms": percentile_ms("first_chunk", 50)}
FLAGS = {"ours": [], "vLLM's": ["--distributed-executor-backend", VLLM_EXECUTOR, *GENERATOR_FLAG]}


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the server. idle_percent: of a core, while nothing is asked. loads: by concurrency."""

    idle_percent: float
    loads: dict[int, Load]

    @property
    def num_errors(self) -> int:
        """Requests that failed."""
        return sum(len(one.errors) for one in self.loads.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Result: 0, or 1 when a request failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="bench_executor.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--starts", type=int, default=6, help="of each; even: each is first equally often")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--requests", type=int, default=384, help="at each concurrency; 48 one at a time")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args(arguments)
    console, began = Console(), datetime.now(UTC)
    starts: dict[str, list[Start]] = {name: [] for name in FLAGS}
    for number in range(args.starts):
        for name in list(FLAGS)[:: 1 if number % 2 == 0 else -1]:
            console.print(f"start {number + 1} of {args.starts}, {name} executor")
            starts[name].append(_start(FLAGS[name], number, args))
    setting = run_of([f"scripts/{Path(__file__).name}", *arguments], began) | {"seed": args.seed, **machine()}
    results = {name: [_figures(start) for start in of_one] for name, of_one in starts.items()}
    write_atomically(
        args.output / "executor.json", json.dumps({"setting": setting, "starts": results}, indent=1) + "\n"
    )
    markdown = to_markdown(setting, starts["ours"], starts["vLLM's"])
    write_atomically(args.output / "executor.md", markdown)
    console.print(markdown, markup=False, soft_wrap=True)
    return 1 if any(start.num_errors for of_one in starts.values() for start in of_one) else 0


def _start(flags: Sequence[str], number: int, args: argparse.Namespace) -> Start:
    """Start the server, see what it takes while it is idle, load it. The number decides what is asked."""
    command = serve_command(None, None, ["--served-model-name", SERVED_NAME, *flags])
    log = ROOT / "build" / "bench" / "executor.log"
    with running_server(command, log=log, ready_seconds=300, ready_path="/ready") as url:
        processes = processes_of(url)
        before = cpu_seconds(processes)
        time.sleep(args.idle_seconds)
        idle = 100 * (cpu_seconds(processes) - before) / args.idle_seconds
        return Start(idle, uvloop.run(_loads(url, number, args)))


async def _loads(url: str, number: int, args: argparse.Namespace) -> dict[int, Load]:
    rng = np.random.default_rng([args.seed, number])
    questions = bench_questions([])
    loads: dict[int, Load] = {}
    async with open_session() as session:
        for concurrency in [args.concurrency[-1], *args.concurrency]:  # the first warms up
            count = 48 if concurrency == 1 else args.requests
            pairs = drawn(questions, rng, count)
            bodies = [chat_body(q, s, 1.0, rtap={"policy": "single"}, **STREAMED) for q, s in pairs]
            loads[concurrency] = await load(session, url, bodies, concurrency)
    return loads


def _figures(start: Start) -> dict[str, Any]:
    levels = {c: {name: figure([one]) for name, figure in FIGURES.items()} for c, one in start.loads.items()}
    return {"idle_percent": start.idle_percent, "at_a_time": levels, "errors": start.num_errors}


def to_markdown(setting: dict[str, Any], ours: Sequence[Start], others: Sequence[Start]) -> str:
    """The report."""
    lines = [
        "# Our executor against vLLM's",
        "",
        "`rtap serve` with the bundled models, policy `single`, on server/executor.py and on vLLM's executor of one "
        f"process; one server alive at a time, {len(ours)} starts of each in turns. Ratios are ours over vLLM's, with "
        "95 % intervals by paired bootstrap over starts.",
        "",
        *(f"- {name}: `{value}`" for name, value in setting.items()),
        "",
        "| at a time | requests/s, ours | vLLM's | ratio [95 %] | first chunk, median ms | vLLM's | ratio [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for concurrency in sorted(ours[0].loads):
        cells = [str(concurrency)]
        our_loads, other_loads = ([start.loads[concurrency] for start in starts] for starts in (ours, others))
        for figure in FIGURES.values():
            ratio = ratio_over_rounds(figure, our_loads, other_loads)
            cells += [f"{figure(our_loads):.1f}", f"{figure(other_loads):.1f}", interval_text(ratio)]
        lines.append(f"| {' | '.join(cells)} |")
    idle = [sum(start.idle_percent for start in starts) / len(starts) for starts in (ours, others)]
    failed = sum(start.num_errors for start in (*ours, *others))
    lines += [
        "",
        f"While nothing is asked: {idle[0]:.1f} % of a core on ours, {idle[1]:.1f} % on vLLM's. {failed} failed.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
