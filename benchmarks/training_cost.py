"""What a teacher costs: step times of grpo, kdrl and rlad in alternating short runs on one machine.

    python scripts/bench_training.py --policy runs/student --teacher deploy/models/policy

A step is one generation and its update (mu = 1, the worst case for the teacher: it scores every step). Ratios are of
medians within a round, with a bootstrap interval over rounds. Parts are measured by timing the trainer's own methods.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import fmean, median
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from rtap_training.checkpoint import git_commit, versions
from rtap_training.config import build_config
from rtap_training.questions import load_questions
from rtap_training.rl.config import CONFIGS
from rtap_training.runtime import configure_torch
from rtap_training.tasks.base import Split

METHODS = ("grpo", "kdrl", "rlad")
PARTS = {"rollout": "rollout_func", "teacher": "_teacher_logps"}  # attributes of the trainer
WARM_UP = 1  # steps of a run that are not counted


class Clock(TrainerCallback):
    """Seconds of every step, and of the timed methods within it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._started = 0.0

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method`` with its time added to the part ``name``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._parts[name] += perf_counter() - started

        return call

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start a step."""
        del args, state, control, kwargs
        self._started = perf_counter()
        self._parts.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it."""
        del args, state, control, kwargs
        total = perf_counter() - self._started
        parts = {name: self._parts[name] for name in PARTS}
        self.steps.append({"total": total, **parts, "update": total - sum(parts.values())})


def run_once(method: str, args: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, float]]:
    """Step times of one short run."""
    from rtap_training.rl import command
    from rtap_training.rl.loading import load_for_training

    teacher = {} if method == "grpo" else {"teacher": str(args.teacher)}
    config = build_config(CONFIGS[method], None, {
        "policy": args.policy, "output": folder / method, "questions": "countdown", "num_questions": 512,
        "questions_per_step": args.questions, "group_size": 8, "micro_batch": 64, "learning_rate": 1e-6,
        "max_tokens": 128, "length_cache": 16, "max_steps": args.steps + WARM_UP, "save_steps": 10_000, "seed": seed,
        **teacher,
    })  # fmt: skip
    configure_torch(1, seed)
    questions = load_questions(config.questions, Split.TRAIN, seed=seed, count=config.num_questions)
    trainer = command.build_trainer(config, load_for_training(config.policy), questions)
    clock = Clock()
    for name, attribute in PARTS.items():
        setattr(trainer, attribute, clock.timed(name, getattr(trainer, attribute)))
    trainer.add_callback(clock)
    trainer.train()
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return clock.steps[WARM_UP:]


def ratio(rounds: list[dict[str, float]], method: str, baseline: str) -> tuple[float, float, float]:
    """Mean over rounds of the ratio of medians, and its 95 % bootstrap interval."""
    values = [r[method] / r[baseline] for r in rounds]
    rng = Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(2000))
    return fmean(values), means[50], means[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results/training-cost"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a run")
    parser.add_argument("--questions", type=int, default=16, help="questions a step, 8 rollouts each")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    rounds: list[dict[str, float]] = []
    parts: dict[str, list[dict[str, float]]] = {m: [] for m in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            medians: dict[str, float] = {}
            for method in METHODS if number % 2 == 0 else reversed(METHODS):
                steps = run_once(method, args, seed=number + 1, folder=Path(folder))
                parts[method] += steps
                medians[method] = median(s["total"] for s in steps)
            rounds.append(medians)
    write(args, rounds, parts)


def write(args: argparse.Namespace, rounds: list[dict[str, float]], parts: dict[str, list[dict[str, float]]]) -> None:
    """``cost.json`` and ``cost.md``."""
    command = (
        f"python scripts/bench_training.py --policy {args.policy} --teacher {args.teacher} --rounds {args.rounds} "
        f"--steps {args.steps} --questions {args.questions}"
    )
    ratios = {f"{m}/{b}": ratio(rounds, m, b) for m, b in (("rlad", "grpo"), ("kdrl", "grpo"), ("rlad", "kdrl"))}
    lines = ["# What a teacher costs a training step", "", f"{datetime.now(UTC):%Y-%m-%d}, `{command}`", "",
             "| step time | ratio [95 %] |", "|---|---|"]  # fmt: skip
    lines += [f"| {name} | {r[0]:.3f} [{r[1]:.3f}, {r[2]:.3f}] |" for name, r in ratios.items()]
    names = ("total", *PARTS, "update")
    lines += ["", f"| median seconds | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for method in METHODS:
        cells = (f"{median(s[n] for s in parts[method]):.3f}" for n in names)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cost.md").write_text("\n".join(lines) + "\n")
    record = {
        "command": command,
        "versions": versions(),
        "git_commit": git_commit(),
        "rounds": rounds,
        "ratios": ratios,
    }
    (args.output / "cost.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
