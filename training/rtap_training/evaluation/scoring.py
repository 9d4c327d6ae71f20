"""Confidences of kept samples from a generator's checkpoint, computed without a server."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rtap_core.adapters import is_adapter, merge_adapter, read_backbone
from rtap_core.artifact import read_artifact
from rtap_core.classifier_input import answer_ids
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.data.trajectories import rendered_sample
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.samples import sample_rows
from rtap_training.models.loading import load_dialect
from rtap_training.models.online_generator import load_online_generator, score_rows


def score_samples(
    paths: Sequence[Path], *, policy: str, generator: Path, output: Path, split: str | None = None
) -> None:
    """Write the samples of ``paths`` to the file ``output``, each finished answer with its confidence by ``generator``
    and the number of tokens read for it. split: only this half of the questions. Raises ConfigError."""
    if any(path.resolve() == output.resolve() for path in paths):
        raise ConfigError(f"{output} would be replaced by its samples with other confidences: give another --output")
    _, tokenizer, dialect = load_dialect(policy)
    backbone = read_backbone(generator) if is_adapter(generator) else None
    model: Any = load_online_generator(generator) if backbone is None else merge_adapter(generator, backbone)
    model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)  # the server's dtype
    artifact = read_artifact(model.config.to_dict(), where=f"{generator}/config.json")
    own: Any = AutoTokenizer.from_pretrained(backbone or generator)
    if artifact.input != "chat" and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{generator} reads token ids, but its tokenizer differs from that of {policy}")

    def ids_of(asked: str, prompt: str, text: str) -> tuple[int, ...]:
        if artifact.input != "chat":
            return (*dialect.encode(prompt), *dialect.encode(text))
        return answer_ids(own, asked, text, model.config.pad_token_id)

    samples = [one for one in sample_rows(paths) if split in (None, one[0].split)]
    read = [
        None if cycle.answer is None else ids_of(*rendered_sample(dialect, question, cycle, row))
        for question, cycle, row in samples
    ]
    scores = iter(score_rows(model, [ids for ids in read if ids is not None]))
    logistic = artifact.logistic
    lines: list[str] = []
    for (question, _, row), ids in zip(samples, read, strict=True):
        score = None if ids is None else next(scores)
        if score is not None and logistic is not None:
            score = logistic.confidence(score, _logprobs(row) if logistic.reads_logprobs else None)
        scored = {"confidence": score, "confidence_tokens": None if ids is None else len(ids)}
        kind = {"kind": "pooling", "logistic": None if logistic is None else logistic.model_dump()}
        lines.append(json.dumps({**row, "task": question.task, **scored, **kind}, ensure_ascii=False) + "\n")
    write_atomically(output, "".join(lines))


def _logprobs(row: Mapping[str, Any]) -> LogprobFeatures:
    try:
        return LogprobFeatures.from_shown(row["logprobs"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the sample {row['text']!r:.80} has no log-probability features, which the generator's calibration reads"
        ) from error
