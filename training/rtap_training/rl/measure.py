"""Held-out evaluation of a policy without a server: the same loop and stop rules, on transformers.

For studies of many small runs, where starting vLLM takes longer than the measurement. ``rtap eval`` measures through
the real server.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from transformers import PreTrainedModel

from rtap_core.recursion import FinalEvent, Recursion
from rtap_core.types import Confidence, Cycle, Judged, Limits, Policy, Score, Select, Trajectory
from rtap_core.voting import majority
from rtap_training.data.questions import Question
from rtap_training.data.trajectories import prompt_ids
from rtap_training.evaluation.statistics import within_question_auroc
from rtap_training.models.online_generator import score_rows
from rtap_training.rl.lockstep import Lockstep, RowEngine, in_lockstep
from rtap_training.rl.rollouts import Dialect
from rtap_training.sampling.samplers import TransformersSampler
from rtap_training.tasks import check

NEVER = 2.0  # a threshold that no confidence reaches
BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """Settings of a measurement.

    samples: trajectories per question under policy ``model``. forced: trajectories per question that run all
    ``max_cycles`` cycles, to evaluate stopping at the confidence ``threshold``.
    """

    max_cycles: int = 4
    samples: int = 8
    forced: int = 2
    threshold: float = 0.55
    max_cycle_tokens: int = 160
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Scorer:
    """The generator as ``rtap_core.types.Confidence``, one row at a time."""

    generator: PreTrainedModel

    async def score(self, judged: Judged) -> Score:
        ids = (*judged.question_token_ids, *judged.cycle_token_ids)
        return Score(score_rows(self.generator, [ids])[0], len(ids))


def measure(
    model: PreTrainedModel,
    dialect: Dialect,
    generator: PreTrainedModel | None,
    questions: Sequence[Question],
    config: MeasureConfig,
) -> dict[str, float | None]:
    """Metrics by name. Shares are over questions or trajectories; tokens and cycles are means per trajectory."""
    model.eval()
    own = _run(model, dialect, None, questions, config.samples,
               Limits(Policy.MODEL, max_cycles=config.max_cycles, select=Select.LAST), config)  # fmt: skip
    figures = own_figures(own, questions)
    if config.forced:
        scorer = None if generator is None else _Scorer(generator)
        limits = Limits(Policy.CONFIDENCE, threshold=NEVER, max_cycles=config.max_cycles)
        forced = _run(model, dialect, scorer, questions, config.forced, limits, config)
        figures |= forced_figures(forced, questions, config.threshold, is_scored=generator is not None)
    return figures


def _run(
    model: PreTrainedModel,
    dialect: Dialect,
    confidence: Confidence | None,
    questions: Sequence[Question],
    samples: int,
    limits: Limits,
    config: MeasureConfig,
) -> list[list[Trajectory]]:
    """Run ``samples`` trajectories per question."""
    prompts = [prompt_ids(dialect, q.question) for q in questions for _ in range(samples)]
    ends = dialect.end_of_turn_ids | dialect.cycle_end_ids
    sampler = TransformersSampler(lambda: model, ends, batch_rows=BATCH_ROWS)
    sampler.seed(config.seed)

    async def follow(lockstep: Lockstep, row: int) -> Trajectory:
        engine = RowEngine(
            lockstep, row, ends, dialect.end_of_turn_ids, dialect.decode, dialect.encode,
            config.max_cycle_tokens,
        )  # fmt: skip
        async for event in Recursion(engine, dialect.format, confidence, dialect.count_oops).run(prompts[row], limits):
            if isinstance(event, FinalEvent):
                return event.trajectory
        raise AssertionError("a trajectory ends with its final event")

    flat = in_lockstep(sampler.generate, len(prompts), follow)
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def _is_right(question: Question, cycle: Cycle | None) -> bool:
    return cycle is not None and cycle.answer is not None and check(question.question, cycle.answer, question.answer)


def own_figures(runs: Sequence[Sequence[Trajectory]], questions: Sequence[Question]) -> dict[str, float | None]:
    """Metrics of policy ``model``, and of a vote over its samples."""
    pairs = [(q, t) for q, row in zip(questions, runs, strict=True) for t in row]
    cycles = [c for _, t in pairs for c in t.cycles]
    tokens = sum(c.tokens for c in cycles)
    oops = sum(c.oops_tokens for c in cycles)

    def vote(question: Question, candidates: Sequence[Cycle]) -> bool:
        place = majority(candidates)
        return place is not None and _is_right(question, candidates[place])

    def returned(t: Trajectory) -> Cycle | None:
        return None if t.selected is None else t.cycles[t.selected]

    return {
        "first": fmean(_is_right(q, t.cycles[0]) for q, t in pairs),
        "first_tokens": fmean(t.cycles[0].tokens for _, t in pairs),
        "first_vote": fmean(vote(q, [t.cycles[0] for t in row]) for q, row in zip(questions, runs, strict=True)),
        "model": fmean(_is_right(q, returned(t)) for q, t in pairs),
        "model_vote": fmean(
            vote(q, [c for c in map(returned, row) if c is not None]) for q, row in zip(questions, runs, strict=True)
        ),
        "model_cycles": len(cycles) / len(pairs),
        "model_tokens": tokens / len(pairs),
        "oops": oops / len(pairs),
        "oops_per_1000": 1000 * oops / tokens,
    }


def forced_figures(
    runs: Sequence[Sequence[Trajectory]], questions: Sequence[Question], threshold: float, *, is_scored: bool
) -> dict[str, float | None]:
    """Metrics of forced trajectories: the last answer, and policy ``confidence`` at ``threshold``."""
    pairs = [(q, t.cycles) for q, row in zip(questions, runs, strict=True) for t in row]
    figures: dict[str, float | None] = {
        "last": fmean(_is_right(q, cycles[-1]) for q, cycles in pairs),
        "ever": fmean(any(_is_right(q, c) for c in cycles) for q, cycles in pairs),
    }
    if not is_scored:
        return figures
    chosen: list[bool] = []
    spent: list[int] = []
    for question, cycles in pairs:
        kept = next((i + 1 for i, c in enumerate(cycles) if (c.confidence or 0.0) >= threshold), len(cycles))
        best = max(range(kept), key=lambda i: (cycles[i].confidence or -1.0, i))
        chosen.append(_is_right(question, cycles[best]))
        spent.append(sum(c.tokens for c in cycles[:kept]))
    scored = [
        (i, c, _is_right(q, c)) for i, (q, cycles) in enumerate(pairs) for c in cycles if c.confidence is not None
    ]
    samples = len(runs[0])
    within = within_question_auroc(
        [i // samples for i, _, _ in scored],
        np.array([c.confidence for _, c, _ in scored], dtype=np.float64),
        [right for _, _, right in scored],
    )
    return figures | {
        "confidence": fmean(chosen),
        "confidence_tokens": fmean(spent),
        "within_auroc": None if within is None else within.auroc.value,
    }
