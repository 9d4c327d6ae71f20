"""Held-out evaluation: trajectories, their accuracy, and TensorBoard events of both."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_core.lexicon import OopsCounter, load_lexicon
from rtap_training.bundled.architecture import MAX_POSITIONS
from rtap_training.config import run_dir
from rtap_training.events import FOLDER, TAG, Sample, add_events, scalars_of
from rtap_training.huggingface import decode_ids, encode_text
from rtap_training.questions import held_out_questions
from rtap_training.rollout import Trajectory, TransformersSampler, sample_trajectories
from rtap_training.tasks import TASKS, parse_mix

EVAL_CYCLES = 3


@dataclass(frozen=True, slots=True)
class HeldOutTrajectories:
    """Held-out questions and their trajectories. ``trajectories[i].question`` is an index into ``questions``."""

    questions: Sequence[str]
    trajectories: Sequence[Trajectory]


def show_held_out(
    output: Path,
    step: int,
    turns: Mapping[str, HeldOutTrajectories],
    tokenizer: PreTrainedTokenizerFast,
    *,
    confidences: Mapping[str, Sequence[float | None]] | None = None,
    more: Mapping[str, float] | None = None,
) -> None:
    """Write TensorBoard events of the run that makes ``output``.

    confidences: by task, of the last cycle of each trajectory. more: additional scalars by full name.
    """
    counter = OopsCounter(load_lexicon(), lambda text: encode_text(tokenizer, text))
    scalars: dict[str, float] = dict(more or {})
    tables: dict[str, list[Sample]] = {}
    for task, part in turns.items():
        texts = ["".join(decode_ids(tokenizer, c.ids) for c in t.cycles) for t in part.trajectories]
        figures = scalars_of(part.trajectories, texts, counter.count)
        scalars |= {f"held_out/{task}/{name}": value for name, value in figures.items()}
        scores = confidences[task] if confidences else [None] * len(texts)
        tables[f"{TAG}/{task}"] = [
            Sample(
                part.questions[t.question], text, len(t.cycles), sum(len(c.ids) for c in t.cycles),
                t.cycles[-1].is_right, score,
            )
            for t, text, score in zip(part.trajectories, texts, scores, strict=True)
        ]  # fmt: skip
    add_events(run_dir(output) / FOLDER, step, scalars, tables)


def write_held_out(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, tasks: str, count: int, seed: int
) -> dict[str, HeldOutTrajectories]:
    """One trajectory on each of ``count`` held-out questions per task. A wrong cycle is followed by another."""
    model.eval()
    turns: dict[str, HeldOutTrajectories] = {}
    for name in parse_mix(tasks):
        questions = [q.question for q in held_out_questions(TASKS[name], count)]
        trajectories = sample_trajectories(
            TransformersSampler(model).seeded(seed), tokenizer, questions,
            lambda index, answer, task=TASKS[name], asked=questions: task.check(asked[index], answer),
            samples=1, max_cycles=EVAL_CYCLES, max_positions=MAX_POSITIONS,
        )  # fmt: skip
        turns[name] = HeldOutTrajectories(questions, trajectories)
    return turns


def held_out_figures(turns: Mapping[str, HeldOutTrajectories]) -> dict[str, Any]:
    """Accuracy per task: first cycle (also by level), and each later cycle among the questions that reached it."""
    figures: dict[str, Any] = {}
    for name, part in turns.items():
        rights: defaultdict[int, list[bool]] = defaultdict(list)
        by_level: defaultdict[int, list[bool]] = defaultdict(list)
        for trajectory in part.trajectories:
            level = TASKS[name].level(part.questions[trajectory.question])
            by_level[level].append(trajectory.cycles[0].is_right)
            for depth, cycle in enumerate(trajectory.cycles):
                rights[depth].append(cycle.is_right)
        by_cycle = [_share(r) for r in rights.values()]
        figures[name] = {
            "questions": len(part.questions), "accuracy": by_cycle[0], "accuracy_by_cycle": by_cycle,
            "accuracy_by_level": {level: _share(by_level[level]) for level in sorted(by_level)},
        }  # fmt: skip
    return figures


def _share(rights: list[bool]) -> float:
    return round(sum(rights) / len(rights), 4)
