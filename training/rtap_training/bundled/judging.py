"""Held-out evaluation of a confidence generator: AUROC, calibration, and best-of-k against free baselines.

The generator is evaluated as served (calibrated, by default with the policy's log-probabilities) and alone. The free
baselines are the majority vote and the policy's own log-probabilities.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from rtap_core.artifact import Logistic
from rtap_core.features import LogprobFeatures
from rtap_core.format import RTAP
from rtap_training.bundled.choice import Sample, compare
from rtap_training.bundled.classifier import confidences
from rtap_training.calibration import Bools, Floats, figures, fit_confidence, intervals, rounded
from rtap_training.evaluation.statistics import global_auroc, within_question_auroc
from rtap_training.huggingface import token_id
from rtap_training.rollout import SampledCycle, Trajectory

GENERATOR, ALONE = "generator", "generator_alone"
"""Names of the served confidence and of the generator's own score."""
LOGPROB_RULES = ("logprob_mean", "logprob_min", "logprob_answer")
"""Mean and minimum log-probability of a cycle's tokens, and the mean between the answer tags."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores, labels and questions of all cycles with an answer, and the first cycles of each question."""

    scores: Floats
    labels: Bools
    questions: list[int]
    first_cycles: list[list[Sample]]


@dataclass(frozen=True, slots=True)
class CycleScores:
    """Generator probability and log-probability scores of each cycle with an answer, in trajectory order."""

    cycles: list[tuple[Trajectory, SampledCycle]]
    probabilities: Floats
    logprobs: list[dict[str, float]]

    @property
    def labels(self) -> Bools:
        """True for each right cycle."""
        return np.array([c.is_right for _, c in self.cycles], dtype=np.bool_)

    def confidences(self, logistic: Logistic) -> Floats:
        """Confidences as served."""
        return np.array([logistic.confidence(*seen) for seen in self._seen()])

    def fit(self, names: Sequence[str]) -> Logistic:
        """A logistic regression on the features ``names`` of these cycles."""
        return fit_confidence(list(self._seen()), self.labels, names)

    def _seen(self) -> Iterator[tuple[float, LogprobFeatures]]:
        """Inputs of the regression for each cycle: it uses the mean and the lowest log-probability alone."""
        for probability, known in zip(self.probabilities.tolist(), self.logprobs, strict=True):
            mean, lowest = known["logprob_mean"], known["logprob_min"]
            yield probability, LogprobFeatures(mean, lowest, lowest, known["logprob_answer"], 1)


def score_cycles(
    model: Qwen3ForSequenceClassification,
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    trajectories: Sequence[Trajectory],
    batch_tokens: int,
) -> CycleScores:
    """Score each cycle with the generator (question and cycle only) and the policy (whole context)."""
    cycle_open = token_id(tokenizer, RTAP.cycle_open)
    cycles: list[tuple[Trajectory, SampledCycle]] = []
    sampled: list[tuple[list[int], tuple[int, ...]]] = []
    for trajectory in trajectories:
        context = list(trajectory.prompt)
        for depth, cycle in enumerate(trajectory.cycles):
            if cycle.answer is not None:
                cycles.append((trajectory, cycle))
                # The loop writes the opening of later cycles; the policy sampled the rest.
                sampled.append(([*context, cycle_open], cycle.ids[1:]) if depth else (context[:], cycle.ids))
            context += cycle.ids
    logprobs = logprob_scores(policy, sampled, token_id(tokenizer, RTAP.answer_open or ""), batch_tokens)
    probabilities = confidences(model, [(*t.prompt, *c.ids) for t, c in cycles], batch_tokens)
    return CycleScores(cycles, np.array(probabilities, dtype=np.float64), logprobs)


def judge_task(
    model: Qwen3ForSequenceClassification,
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    trajectories: Sequence[Trajectory],
    batch_tokens: int,
    logistic: Logistic,
) -> Judged:
    """Confidences of all cycles, and the scores of every rule on first cycles."""
    known = score_cycles(model, policy, tokenizer, trajectories, batch_tokens)
    scores = known.confidences(logistic)
    rules = {
        id(cycle): free | {GENERATOR: float(score), ALONE: float(alone)}
        for (_, cycle), free, score, alone in zip(
            known.cycles, known.logprobs, scores, known.probabilities, strict=True
        )
    }
    samples: dict[int, list[Sample]] = {}
    for trajectory in trajectories:
        first = trajectory.cycles[0]
        sample = Sample(first.answer, first.is_right, rules.get(id(first), {}))
        samples.setdefault(trajectory.question, []).append(sample)
    return Judged(scores, known.labels, [t.question for t, _ in known.cycles], list(samples.values()))


def report(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Metrics of each task, and of ``all`` tasks together."""
    return {name: _figures(part) for name, part in {**judged, "all": pool(list(judged.values()))}.items()}


def pool(parts: Sequence[Judged]) -> Judged:
    """Merge tasks; question indices stay distinct."""
    questions: list[int] = []
    for part in parts:
        start = 1 + max(questions, default=-1)
        questions += [start + q for q in part.questions]
    return Judged(
        np.concatenate([p.scores for p in parts]),
        np.concatenate([p.labels for p in parts]),
        questions,
        [q for p in parts for q in p.first_cycles],
    )


def _figures(judged: Judged) -> dict[str, Any]:
    if not len(judged.scores):
        return {"cycles": 0}
    own = asdict(figures(judged.scores, judged.labels, judged.questions))
    return own | {
        "intervals": intervals(judged.scores, judged.labels, judged.questions),
        "first_cycles": _rankings(judged.first_cycles),
        "choice": compare(judged.first_cycles, generator=GENERATOR, baselines=(ALONE, *LOGPROB_RULES)),
    }


def _rankings(questions: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """AUROCs of every rule over first cycles with an answer."""
    rows = [(index, s) for index, samples in enumerate(questions) for s in samples if s.answer is not None]
    labels = np.array([s.is_right for _, s in rows], dtype=np.bool_)
    ranked: dict[str, Any] = {}
    for rule in (GENERATOR, ALONE, *LOGPROB_RULES):
        scores = np.array([s.scores[rule] for _, s in rows], dtype=np.float64)
        within = within_question_auroc([index for index, _ in rows], scores, labels)
        ranked[rule] = {
            "within_auroc": None if within is None else round(within.auroc.value, 4),
            "global_auroc": rounded(global_auroc(scores, labels)),
        }
    return ranked


@torch.inference_mode()
def logprob_scores(
    policy: Qwen3ForCausalLM, rows: Sequence[tuple[Sequence[int], tuple[int, ...]]], answer_open: int, batch_tokens: int
) -> list[dict[str, float]]:
    """Log-probability scores of (prompt, cycle) rows; equal rows are read once."""
    policy.eval()
    distinct = sorted(dict.fromkeys((tuple(p), c) for p, c in rows), key=lambda row: len(row[0]) + len(row[1]))
    scores: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, float]] = {}
    while distinct:
        size = max(1, min(len(distinct), batch_tokens // (len(distinct[-1][0]) + len(distinct[-1][1]))))
        batch, distinct = distinct[-size:], distinct[:-size]  # longest rows first; the last row sets the width
        width = max(len(p) + len(c) for p, c in batch)
        ids = torch.tensor([[*p, *c, *[0] * (width - len(p) - len(c))] for p, c in batch])  # right-padded, unread
        logps = policy(input_ids=ids[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        sampled = cast(torch.Tensor, logps).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T - 1)
        for (prompt, cycle), row in zip(batch, sampled, strict=True):
            own = row[len(prompt) - 1 : len(prompt) + len(cycle) - 1].double().numpy()
            scores[prompt, cycle] = _rule_scores(own, cycle, answer_open)
    return [scores[tuple(p), c] for p, c in rows]


def _rule_scores(logps: Floats, cycle: Sequence[int], answer_open: int) -> dict[str, float]:
    """Scores from logps (T,) of ``cycle``, which ends with its closing tag. Without an answer all tokens count."""
    opened = max((i for i, token in enumerate(cycle) if token == answer_open), default=-1)
    answer = logps[opened + 1 : -1] if opened < len(cycle) - 2 else logps
    values = (logps.mean(), logps.min(), answer.mean())
    return {rule: float(value) for rule, value in zip(LOGPROB_RULES, values, strict=True)}
