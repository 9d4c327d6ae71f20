"""Dataset and reward function for verl: answer and format rewards, as in `rtap train rlad`.

`python -m rtap_training.recipes.verl.dataset_and_reward --questions countdown --output FOLDER` writes train.parquet and
val.parquet.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]

from rtap_core.format import PRESETS, parse_cycle
from rtap_training import rewards
from rtap_training.data.questions import load_questions
from rtap_training.tasks import check
from rtap_training.tasks.base import Question, Split


def rows(questions: Sequence[Question], format_name: str) -> list[dict[str, Any]]:
    """Rows in verl's columns. format_name: trajectory format of the policy."""
    return [
        {
            "data_source": q.task,
            "prompt": [{"role": "user", "content": q.question}],
            "reward_model": {"style": "rule", "ground_truth": q.answer},
            "extra_info": {"question": q.question, "format": format_name},
        }
        for q in questions
    ]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]) -> float:
    """Reward of one response: 1 for a right answer plus 1 for the right format."""
    del data_source
    fmt = PRESETS[extra_info["format"]]
    # The chat template may have written the opening.
    text = solution_str if fmt.think_open in solution_str else fmt.think_open + solution_str
    answer = parse_cycle(text, fmt, ended_by_model=True)[1]
    is_right = answer is not None and check(extra_info["question"], answer, ground_truth)
    return rewards.answer_reward(is_right) + rewards.well_formed([text], fmt)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the dataset; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", default="countdown", help="task, mix, JSONL file, or hf:NAME")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=4096, help="training questions; a tenth as many held-out ones")
    parser.add_argument("--format", choices=sorted(PRESETS), default="think", help="trajectory format of the policy")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, split, count in (("train", Split.TRAIN, args.count), ("val", Split.HELD_OUT, args.count // 10)):
        questions = load_questions(args.questions, split, seed=1, count=max(1, count))
        Dataset.from_list(rows(questions, args.format)).to_parquet(args.output / f"{name}.parquet")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
