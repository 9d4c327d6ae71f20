"""Confidences of kept samples from a generator's checkpoint, computed without a server."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rtap_core.adapters import backbone_of, is_adapter
from rtap_core.artifact import read_artifact
from rtap_core.classifier_input import chat_token_ids
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.samples import sample_rows
from rtap_training.generator_samples import rendered_sample
from rtap_training.rl.loading import load_dialect
from rtap_training.rl.online_generator import load_online_generator, score_rows


def score_samples(paths: Sequence[Path], *, policy: str, generator: Path, output: Path) -> None:
    """Write the samples of ``paths`` to the file ``output``, each finished answer with the confidence that a server of
    ``policy`` and ``generator`` would give it, and the number of tokens read for it. Raises ConfigError."""
    _, tokenizer, dialect = load_dialect(policy)
    model = load_online_generator(generator, policy)
    artifact = read_artifact(model.config.to_dict(), where=f"{generator}/config.json")
    body = backbone_of(generator, policy) if is_adapter(generator) else generator
    own: Any = AutoTokenizer.from_pretrained(body)
    if artifact.input != "chat" and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{generator} reads token ids, but its tokenizer differs from that of {policy}")

    def ids_of(asked: str, prompt: str, text: str) -> tuple[int, ...]:
        if artifact.input != "chat":
            return (*dialect.encode(prompt), *dialect.encode(text))
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        return tuple(chat_token_ids(own, chat, own.pad_token_id))

    samples = list(sample_rows(paths))
    read = [
        None if cycle.answer is None else ids_of(*rendered_sample(tokenizer, dialect, question, cycle, row))
        for question, cycle, row in samples
    ]
    scores = iter(score_rows(model, [ids for ids in read if ids is not None]))
    logistic = artifact.logistic
    lines: list[str] = []
    for (_, _, row), ids in zip(samples, read, strict=True):
        score = None if ids is None else next(scores)
        if score is not None and logistic is not None:
            known = LogprobFeatures.from_shown(row["logprobs"]) if logistic.reads_logprobs else None
            score = logistic.confidence(score, known)
        scored = {"confidence": score, "confidence_tokens": None if ids is None else len(ids)}
        kind = {"kind": "pooling", "logistic": None if logistic is None else logistic.model_dump()}
        lines.append(json.dumps({**row, **scored, **kind}, ensure_ascii=False) + "\n")
    write_atomically(output, "".join(lines))
