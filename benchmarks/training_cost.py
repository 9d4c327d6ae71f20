"""Step times of grpo, kdrl and rlad in alternating short runs on one machine: the cost of a teacher.

    python benchmarks/training_cost.py --policy runs/student --teacher deploy/models/policy

A step is one generation and its update (mu = 1, so the teacher scores once a step). Writes
docs/results/training-cost/cost.{json,md}.
"""

import argparse
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

from harness import RESULTS, interval_text, list_info, ratio_over_rounds, run_info, write_report
from transformers import TrainerCallback

from rtap_training.config.rl import CONFIGS
from rtap_training.config.settings import build_config
from rtap_training.data.questions import load_questions
from rtap_training.runtime import configure_torch
from rtap_training.tasks.base import Split

METHODS = ("grpo", "kdrl", "rlad")
PARTS = {"rollout": "rollout_func", "teacher": "_teacher_logps"}  # part: attribute of the trainer
WARM_UP = 1  # steps of a run that are not counted


class Clock(TrainerCallback):
    """Time every step, and the named methods within it."""

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
    from rtap_training.models.loading import load_for_training
    from rtap_training.rl import command

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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="training_cost.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "training-cost")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a run")
    parser.add_argument("--questions", type=int, default=16, help="questions of a step, 8 rollouts each")
    args, started = parser.parse_args(arguments), datetime.now(UTC)
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    rounds: list[dict[str, float]] = []
    parts: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            medians: dict[str, float] = {}
            for method in METHODS if number % 2 == 0 else reversed(METHODS):
                steps = run_once(method, args, seed=number + 1, folder=Path(folder))
                parts[method] += steps
                medians[method] = median(step["total"] for step in steps)
            rounds.append(medians)
    info = run_info(__file__, arguments, started)
    ratios = {
        f"{method}/{other}": ratio_over_rounds(fmean, [r[method] for r in rounds], [r[other] for r in rounds])
        for method, other in (("rlad", "grpo"), ("kdrl", "grpo"), ("rlad", "kdrl"))
    }
    lines = ["# Cost of a teacher in a training step", "", *list_info(info), ""]
    lines += ["| step time | ratio [95 %] |", "|---|---|"]
    lines += [f"| {name} | {interval_text(ratio)} |" for name, ratio in ratios.items()]
    names = ("total", *PARTS, "update")
    lines += ["", f"| median seconds | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for method in METHODS:
        cells = (f"{median(step[name] for step in parts[method]):.3f}" for name in names)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    content = {"setting": info, "rounds": rounds, "ratios": {name: asdict(ratio) for name, ratio in ratios.items()}}
    write_report(args.output, "cost", content, "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
