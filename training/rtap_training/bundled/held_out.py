"""TensorBoard events of held-out evaluation: means per task and a table of trajectories."""

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
