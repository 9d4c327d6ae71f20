"""Sampling of a Hugging Face model on a user's questions, in its chat template and trajectory format.

Samples stay in the run's folder until the run succeeds; a resumed run samples only missing questions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.config import run_dir
from rtap_training.evaluation.question_files import Question as FileQuestion
from rtap_training.evaluation.records import CycleRecord
from rtap_training.evaluation.samples import sample_rows
from rtap_training.generator_config import GeneratorConfig
from rtap_training.huggingface import cast_to
from rtap_training.questions import is_right, message
from rtap_training.rl.loading import Loaded
from rtap_training.rl.lockstep import Completion, Request
from rtap_training.rl.rollouts import Dialect, RolledCycle, Rollout, RolloutQuestion, roll_out
from rtap_training.run_state import States
from rtap_training.samples import header, read_or_make
from rtap_training.tasks.base import Question

CHUNK_ROWS = 256  # trajectories lost by a kill, at most


@dataclass(frozen=True, slots=True)
class SampledTrajectory:
    """One sampled trajectory. question: index. tokens: completion length, cycle openings included. logprobs: features
    of the only cycle of a kept sample that has them."""

    question: int
    prompt_ids: tuple[int, ...]
    cycles: tuple[RolledCycle, ...]
    tokens: int
    logprobs: LogprobFeatures | None = None

    @property
    def is_right(self) -> bool:
        """True if the last cycle is right."""
        return self.cycles[-1].is_right


def sample(
    loaded: Loaded, questions: Sequence[Question], config: GeneratorConfig, part: str, seed: int
) -> list[SampledTrajectory]:
    """``samples`` trajectories per question, grouped by question. part: name of the samples file."""
    prompts = [prompt_ids(loaded, message(q, config.prompt)) for q in questions]
    identities = [json.dumps([p, q.answer]) for p, q in zip(prompts, questions, strict=True)]
    first = header(
        config.policy, identities, sampler="transformers", samples=config.samples, max_cycles=config.max_cycles,
        seed=seed,
    )  # fmt: skip
    _to_device(loaded)

    def ask(index: int) -> RolloutQuestion:
        return RolloutQuestion(str(index), prompts[index], partial(is_right, questions[index]))

    def make(indices: Sequence[int], chunk_seed: int) -> list[str]:
        torch.manual_seed(chunk_seed)
        rollouts = roll_out(
            [ask(i) for i in indices for _ in range(config.samples)],
            lambda requests: write(loaded, requests, config.batch_rows),
            loaded.dialect,
            max_cycles=config.max_cycles,
            max_tokens=config.max_cycles * config.max_cycle_tokens,
            max_cycle_tokens=config.max_cycle_tokens,
        )
        return [_render(rollouts[k : k + config.samples]) for k in range(0, len(rollouts), config.samples)]

    file = run_dir(config.output) / f"samples-{part}.jsonl"
    first |= {"max_cycle_tokens": config.max_cycle_tokens}
    return [turn for line in read_or_make(file, first, make, chunk_rows=CHUNK_ROWS) for turn in _parse(line)]


def kept_trajectories(
    tokenizer: PreTrainedTokenizerBase, dialect: Dialect, path: Path
) -> list[tuple[Question, list[SampledTrajectory]]]:
    """The samples of each question in a file of ``rtap eval`` or ``rtap calibrate``, as trajectories of one cycle.

    ``question`` of a trajectory is 0 until ``numbered`` sets it. The server strips thought and answer, so a sample of a
    thinking model lacks the white space next to its tags. Raises ConfigError for lines that are no samples."""
    found: dict[str, tuple[Question, list[SampledTrajectory]]] = {}
    for question, cycle, row in sample_rows([path]):
        asked, prompt, text = rendered_sample(tokenizer, dialect, question, cycle, row)
        rolled = RolledCycle(tuple(dialect.encode(text)), text, cycle.answer, cycle.is_correct, cycle.oops_tokens)
        _, rows = found.setdefault(asked, (Question(asked, question.answer, question.task), []))
        features = None if cycle.logprobs is None else LogprobFeatures.from_shown(cycle.logprobs)
        rows.append(SampledTrajectory(0, tuple(dialect.encode(prompt)), (rolled,), cycle.tokens, features))
    return list(found.values())


def rendered_sample(
    tokenizer: PreTrainedTokenizerBase,
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
    prompt = _rendered(tokenizer, asked)
    return asked, prompt, dialect.format.render_cycle(cycle.think or "", cycle.text or "", prompt=prompt)


def numbered(parts: Sequence[Sequence[SampledTrajectory]]) -> list[SampledTrajectory]:
    """Trajectories of several questions, with the question's position."""
    return [replace(one, question=index) for index, rows in enumerate(parts) for one in rows]


def clean_up(states: States) -> None:
    """Remove states and samples after success; the log stays."""
    states.remove()
    for file in states.folder.glob("samples-*.jsonl"):
        file.unlink()


def _render(rollouts: Sequence[Rollout]) -> str:
    """Line of one question."""
    rows = [
        [len(r.completion_ids), [[c.ids, c.text, c.answer, c.is_right, c.oops_tokens] for c in r.cycles]]
        for r in rollouts
    ]
    return json.dumps({"question": int(rollouts[0].question), "prompt": rollouts[0].prompt_ids, "samples": rows})


def _parse(line: str) -> list[SampledTrajectory]:
    content = json.loads(line)
    return [
        SampledTrajectory(
            content["question"],
            tuple(content["prompt"]),
            tuple(RolledCycle(tuple(ids), *rest) for ids, *rest in cycles),
            tokens,
        )
        for tokens, cycles in content["samples"]
    ]


def prompt_ids(loaded: Loaded, question: str) -> list[int]:
    """Prompt ids of a question in the model's chat template."""
    return loaded.dialect.encode(_rendered(loaded.tokenizer, question))


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _to_device(loaded: Loaded) -> None:
    """Move the model to the GPU in bfloat16, if there is a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cast(Any, loaded.model).to(device).eval()
    if device == "cuda":
        cast_to(loaded.model, torch.bfloat16)


@torch.inference_mode()
def write(loaded: Loaded, requests: Sequence[Request], batch_rows: int) -> list[Completion]:
    """Generate every request at temperature 1, batched by length."""
    dialect, model = loaded.dialect, cast(Any, loaded.model)
    ends = sorted(dialect.end_of_turn_ids | dialect.cycle_end_ids)
    pad_id = cast(int, loaded.tokenizer.pad_token_id)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    written: dict[int, Completion] = {}
    for start in tqdm(range(0, len(order), batch_rows), desc="sampling", unit="batch", leave=False):
        rows = order[start : start + batch_rows]
        prompts = [requests[i].prompt_ids for i in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[*[pad_id] * (width - len(p)), *p] for p in prompts], device=model.device)
        mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            max_new_tokens=max(requests[i].max_tokens for i in rows), eos_token_id=ends, pad_token_id=pad_id,
        )  # fmt: skip
        fresh = cast(list[list[int]], output[:, width:].tolist())
        for i, row in zip(rows, fresh, strict=True):
            written[i] = Completion(_until(row, ends)[: requests[i].max_tokens], None)
    return [written[i] for i in range(len(requests))]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids up to and including the first end token."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]
