"""Labelled samples of a model: sampled here on questions, or kept in a file by ``rtap eval`` or ``rtap calibrate``.

Samples stay in the run's folder until the run succeeds; a resumed run samples only missing questions.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # pyright: ignore[reportMissingTypeStubs]
from transformers import AutoModelForCausalLM, PreTrainedModel

from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.config.settings import SamplerKind, run_dir
from rtap_training.config.supervised import SupervisedConfig
from rtap_training.data.questions import is_right, message
from rtap_training.evaluation.question_files import Question as FileQuestion
from rtap_training.evaluation.records import CycleRecord
from rtap_training.evaluation.samples import sample_rows
from rtap_training.models.loading import loading
from rtap_training.rl.rollouts import Dialect, RolledCycle, Rollout, RolloutQuestion, roll_out
from rtap_training.sampling.files import header, read_or_make, weights_sha256
from rtap_training.sampling.samplers import Sampler, TransformersSampler, VllmSampler, sampler_kind
from rtap_training.tasks.base import Question


@dataclass(frozen=True, slots=True)
class SampledTrajectory:
    """One sampled trajectory. question: index. tokens: completion length, cycle openings included."""

    question: int
    prompt_ids: tuple[int, ...]
    cycles: tuple[RolledCycle, ...]
    tokens: int

    @property
    def is_right(self) -> bool:
        """True if the last cycle is right."""
        return self.cycles[-1].is_right


def sample_parts(
    model: str,
    dialect: Dialect,
    parts: Mapping[str, Sequence[Question]],
    config: SupervisedConfig,
    *,
    max_cycles: int,
) -> list[list[SampledTrajectory]]:
    """``config.samples`` trajectories of ``model`` per question of each part, grouped by question. The keys of
    ``parts`` name the files. Processes of a distributed run sample a share of each part, and read those of all."""
    prompts = {name: [prompt_ids(dialect, message(q, config.prompt)) for q in part] for name, part in parts.items()}
    longest = max(len(ids) for part in prompts.values() for ids in part) + max_cycles * config.max_cycle_tokens
    kind, digest = sampler_kind(config.sampler), weights_sha256(model)
    sampler = _open_sampler(kind, model, dialect, config, max_length=longest)
    shared = {"policy_sha256": digest, "sampler": kind, "samples": config.samples, "max_cycles": max_cycles}
    state = PartialState()

    def sample(rank: int) -> list[list[SampledTrajectory]]:
        share = Share(rank, state.num_processes)
        return [
            _sample(sampler, shared, dialect, part, prompts[name], share, config, name, config.seed + i)
            for i, (name, part) in enumerate(parts.items())
        ]

    with closing(sampler):
        own = sample(state.process_index)
    state.wait_for_everyone()
    shares = [own if rank == state.process_index else sample(rank) for rank in range(state.num_processes)]
    by_part = (chain.from_iterable(rows) for rows in zip(*shares, strict=True))
    return [sorted(rows, key=lambda turn: turn.question) for rows in by_part]


@dataclass(frozen=True, slots=True)
class Share:
    """Every ``of``-th question from ``rank`` on: those that one process samples."""

    rank: int
    of: int


def _open_sampler(
    kind: SamplerKind, model: str, dialect: Dialect, config: SupervisedConfig, *, max_length: int
) -> Sampler:
    ends = dialect.end_of_turn_ids | dialect.cycle_end_ids
    if kind is SamplerKind.VLLM:
        return VllmSampler(model, ends, max_length=max_length, threads=config.threads)

    def load() -> PreTrainedModel:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        with loading(model):
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            return loaded.to(device)

    return TransformersSampler(load, ends, batch_rows=config.batch_rows)


def _sample(
    sampler: Sampler,
    shared: Mapping[str, Any],
    dialect: Dialect,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    share: Share,
    config: SupervisedConfig,
    part: str,
    seed: int,
) -> list[SampledTrajectory]:
    """Trajectories of a share of the questions, read from its file, or sampled into it."""
    own = range(share.rank, len(questions), share.of)
    identities = [json.dumps([prompts[i], questions[i].answer]) for i in own]
    first, max_cycles = header(questions=identities, seed=seed + share.rank, **shared), shared["max_cycles"]

    def make(indices: Sequence[int], chunk_seed: int) -> list[str]:
        sampler.seed(chunk_seed)
        asked = [RolloutQuestion(str(own[i]), prompts[own[i]], partial(is_right, questions[own[i]])) for i in indices]
        rollouts = roll_out(
            [one for one in asked for _ in range(config.samples)],
            sampler.generate,
            dialect,
            max_cycles=max_cycles,
            max_tokens=max_cycles * config.max_cycle_tokens,
            max_cycle_tokens=config.max_cycle_tokens,
        )
        return [_render(rollouts[k : k + config.samples]) for k in range(0, len(rollouts), config.samples)]

    name = part if share.of == 1 else f"{part}-{share.rank + 1}-of-{share.of}"
    file = run_dir(config.output) / f"samples-{name}.jsonl"
    first |= {"max_cycle_tokens": config.max_cycle_tokens}
    if config.template_kwargs:
        first["chat_template_kwargs"] = config.template_kwargs
    return [turn for line in read_or_make(file, first, make) for turn in _parse(line)]


def kept_trajectories(dialect: Dialect, path: Path) -> list[tuple[Question, list[SampledTrajectory]]]:
    """The samples of each question in a file of ``rtap eval`` or ``rtap calibrate``, as trajectories of one cycle.

    ``question`` of a trajectory is 0 until ``numbered`` sets it. The server strips thought and answer, so a sample of a
    thinking model lacks the white space next to its tags. Raises ConfigError for lines that are no samples."""
    found: dict[str, tuple[Question, list[SampledTrajectory]]] = {}
    for question, cycle, row in sample_rows([path]):
        asked, prompt, text = rendered_sample(dialect, question, cycle, row)
        features = None if cycle.logprobs is None else LogprobFeatures.from_shown(cycle.logprobs)
        ids = tuple(dialect.encode(text))
        rolled = RolledCycle(ids, text, cycle.answer, cycle.is_correct, cycle.oops_tokens, features)
        _, rows = found.setdefault(asked, (Question(asked, question.answer, question.task), []))
        rows.append(SampledTrajectory(0, tuple(dialect.encode(prompt)), (rolled,), cycle.tokens))
    return list(found.values())


def rendered_sample(
    dialect: Dialect,
    question: FileQuestion,
    cycle: CycleRecord,
    row: Mapping[str, Any],
) -> tuple[str, str, str]:
    """(message, prompt in the chat template, text of the cycle) of a kept sample. Raises ConfigError."""
    if dialect.format.has_think_tags and cycle.think is None:
        raise ConfigError(f"the sample {row['text']!r:.80} has no think, but the policy writes thoughts")
    if cycle.answer is not None and not (cycle.text or "").strip():
        raise ConfigError(f"the sample with the answer {cycle.answer!r:.80} has no text")
    asked = str(row.get("prompt") or question.text)
    prompt = _rendered(dialect, asked)
    return asked, prompt, dialect.format.render_cycle(cycle.think or "", cycle.text or "", prompt=prompt)


def numbered(parts: Sequence[Sequence[SampledTrajectory]]) -> list[SampledTrajectory]:
    """Trajectories of several questions, with the question's position."""
    return [replace(one, question=index) for index, rows in enumerate(parts) for one in rows]


def remove_samples(output: Path) -> None:
    """Remove the samples of the run that wrote ``output``."""
    for file in run_dir(output).glob("samples-*.jsonl"):
        file.unlink()


def _render(rollouts: Sequence[Rollout]) -> str:
    """Line of one question."""
    rows = [
        [
            len(r.completion_ids),
            [
                [c.ids, c.text, c.answer, c.is_right, c.oops_tokens, None if c.logprobs is None else c.logprobs.shown()]
                for c in r.cycles
            ],
        ]
        for r in rollouts
    ]
    return json.dumps({"question": int(rollouts[0].question), "prompt": rollouts[0].prompt_ids, "samples": rows})


def _parse(line: str) -> list[SampledTrajectory]:
    content = json.loads(line)

    def cycle(entry: list[Any]) -> RolledCycle:
        ids, text, answer, is_right, oops_tokens, shown = entry
        features = None if shown is None else LogprobFeatures.from_shown(shown)
        return RolledCycle(tuple(ids), text, answer, is_right, oops_tokens, features)

    return [
        SampledTrajectory(content["question"], tuple(content["prompt"]), tuple(map(cycle, cycles)), tokens)
        for tokens, cycles in content["samples"]
    ]


def prompt_ids(dialect: Dialect, question: str) -> list[int]:
    """Prompt ids of a question in the model's chat template."""
    return dialect.encode(_rendered(dialect, question))


def _rendered(dialect: Dialect, question: str) -> str:
    return dialect.render([{"role": "user", "content": question}])
