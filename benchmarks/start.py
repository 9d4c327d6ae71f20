"""Start of `rtap serve MODEL` against plain `vllm serve MODEL` with the same flags: seconds until each is ready.

Each round starts both servers, one after the other and in turn first. The first start of all is not measured, because
it reads the weights from the disk. Writes docs/results/start.{json,md}. Returns 1 when the goal is missed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness import (
    LOGS,
    MODELS,
    READY_SECONDS,
    RESULTS,
    SERVED_NAME,
    common_flags,
    interval_text,
    list_info,
    ratio_over_rounds,
    run_info,
    vllm_command,
    write_report,
)

from rtap_training.evaluation.server_process import running_server, serve_command

GOAL = 1.1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    started = datetime.now(UTC)
    flags, environment = common_flags()
    flags += ["--served-model-name", SERVED_NAME, "--max-model-len", str(args.max_model_len), *args.flags.split()]
    commands = {
        "rtap": serve_command(str(args.model), None, flags),
        "vllm": vllm_command(args.model, flags),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with patch.dict(os.environ, environment):
        start_seconds("warm-up", commands["vllm"], args.ready_seconds)
        for number in range(args.rounds):
            for name in sorted(commands, reverse=number % 2 == 1):
                seconds[name].append(start_seconds(name, commands[name], args.ready_seconds))
    ratio = ratio_over_rounds(statistics.fmean, seconds["rtap"], seconds["vllm"])
    info = run_info(__file__, arguments, started, flags=" ".join(flags), environment=json.dumps(environment))
    content = {
        "setting": info,
        "seconds": seconds,
        "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
    }
    write_report(args.output, "start", content, to_markdown(info, args.model, seconds, interval_text(ratio)))
    return int(ratio.value > GOAL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="start.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODELS / "policy", help="default: the bundled policy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--flags", default="", help="more flags of both servers, in one argument")
    parser.add_argument("--ready-seconds", type=float, default=READY_SECONDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def start_seconds(name: str, command: Sequence[str], ready_seconds: float) -> float:
    """Seconds from the start of the process until /health answers 200. The server is stopped afterwards."""
    log = LOGS / f"start-{name}.log"
    began = time.monotonic()
    with running_server(command, log=log, ready_seconds=ready_seconds, ready_path="/health"):
        return time.monotonic() - began


def to_markdown(info: Mapping[str, Any], model: Path, seconds: Mapping[str, Sequence[float]], ratio: str) -> str:
    """The report."""
    lines = [
        "# Start against plain `vllm serve`",
        "",
        f"Seconds until `{model.name}` is ready, {len(seconds['rtap'])} alternating starts of each server. Mean of "
        f"`rtap serve` over mean of `vllm serve`, with a 95 % interval: **{ratio}** (goal: at most {GOAL}).",
        "",
        "| server | median | all starts |",
        "|---|---|---|",
    ]
    for name, all_of in seconds.items():
        lines.append(f"| {name} | {statistics.median(all_of):.1f} | {', '.join(f'{one:.1f}' for one in all_of)} |")
    return "\n".join([*lines, "", *list_info(info)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
