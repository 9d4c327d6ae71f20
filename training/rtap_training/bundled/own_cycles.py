"""Sampling and checking of a policy's cycles on training questions; samples stay on disk until the run succeeds."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_training.config import SamplerKind, run_dir
from rtap_training.rollout import (
    Continue,
    Sampler,
    Trajectory,
    TransformersSampler,
    VllmSampler,
    sample_trajectories,
    sampler_kind,
)
from rtap_training.run_state import States
from rtap_training.samples import header, read_or_sample
from rtap_training.tasks import TASKS, parse_mix
from rtap_training.tasks.base import Problem, Split, sample_split


class SamplingConfig(Protocol):
    """Sampling settings: ``samples`` trajectories of at most ``max_cycles`` cycles per question."""

    @property
    def policy(self) -> Path: ...
    @property
    def output(self) -> Path: ...
    @property
    def samples_file(self) -> Path | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def tasks(self) -> str: ...
    @property
    def questions(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def max_cycles(self) -> int: ...
    @property
    def sampler(self) -> SamplerKind: ...
    @property
    def threads(self) -> int: ...


Config = TypeVar("Config", bound=SamplingConfig)


@dataclass(frozen=True, slots=True)
class PolicySetup(Generic[Config]):
    """A policy, its tokenizer and the sampling settings."""

    policy: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    config: Config


def training_problems(config: SamplingConfig) -> tuple[list[Problem], list[str]]:
    """Training problems of all tasks, and one phrasing of each."""
    rng, shares = Random(config.seed), parse_mix(config.tasks)
    problems: list[Problem] = []
    questions: list[str] = []
    for _ in range(config.questions):
        name = rng.choices(list(shares), list(shares.values()))[0]
        problem = sample_split(TASKS[name], rng, Split.TRAIN)
        problems.append(problem)
        questions.append(problem.phrase(rng))
    return problems, questions


def build_sampler(setup: PolicySetup[Config]) -> Sampler:
    """Sampler that the config selects on this machine."""
    if sampler_kind(setup.config.sampler) is SamplerKind.VLLM:
        return VllmSampler(setup.config.policy, threads=setup.config.threads)
    return TransformersSampler(setup.policy)


def sample_training(setup: PolicySetup[Config], sampler: Sampler, questions: Sequence[str]) -> list[Trajectory]:
    """Trajectories of the training questions, kept in a file until the run succeeds; ``samples_file`` is kept after."""
    config = setup.config
    file = config.samples_file or run_dir(config.output) / "samples.jsonl"
    return sample(setup, sampler, file, questions, config.samples, config.seed)


def sampled_turns(setup: PolicySetup[Config]) -> tuple[list[Problem], list[Trajectory]]:
    """Training problems and their trajectories; trajectory ``t`` answers ``problems[t.question]``."""
    problems, questions = training_problems(setup.config)
    with closing(build_sampler(setup)) as sampler:
        return problems, sample_training(setup, sampler, questions)


def sample(
    setup: PolicySetup[Config], sampler: Sampler, file: Path, questions: Sequence[str], samples: int, seed: int
) -> list[Trajectory]:
    """Trajectories from ``file``; missing ones are sampled and appended."""
    kind = sampler_kind(setup.config.sampler)
    first = header(
        setup.config.policy, questions, sampler=kind, samples=samples, max_cycles=setup.config.max_cycles, seed=seed
    )

    def chunk(indices: Sequence[int], chunk_seed: int) -> list[Trajectory]:
        return sample_chunk(setup, sampler.seeded(chunk_seed), questions, indices, samples)

    return read_or_sample(file, first, chunk)


def sample_chunk(
    setup: PolicySetup[Config], write: Continue, questions: Sequence[str], indices: Sequence[int], samples: int
) -> list[Trajectory]:
    """Trajectories of ``questions[i]`` for i in ``indices``; ``Trajectory.question`` is i."""

    def check(index: int, answer: str) -> bool:
        return any(task.check(questions[indices[index]], answer) for task in TASKS.values())

    trajectories = sample_trajectories(
        write, setup.tokenizer, [questions[i] for i in indices], check,
        samples=samples, max_cycles=setup.config.max_cycles, max_positions=setup.policy.config.max_position_embeddings,
    )  # fmt: skip
    for trajectory in trajectories:
        trajectory.question = indices[trajectory.question]
    return trajectories


def clean_up(states: States) -> None:
    """Remove states and samples after success; logs and plot stay."""
    states.remove()
    for file in (*states.folder.glob("samples.jsonl"), *states.folder.glob("held_out-*.jsonl")):
        file.unlink()
