"""HeldOutTrajectories on held-out questions as TensorBoard shows them: means of each task, and a table of some of the turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rtap_core.lexicon import OopsCounter, load_lexicon
from rtap_training.config import run_dir
from rtap_training.events import FOLDER, TAG, Sample, add_events, scalars_of
from rtap_training.huggingface import decode_ids, encode_text
from rtap_training.rollout import Trajectory


@dataclass(frozen=True, slots=True)
class HeldOutTrajectories:
    """What was asked, and what came. ``trajectories[i].question`` is an index of ``questions``."""

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
    """Write events of the run that makes ``output``.

    confidences: by task, of the last cycle of each trajectory. more: further scalars, by their full names.
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
