"""Go on training a policy on its own cycles: after a wrong one, a right one (``rtap train correct``).

A cold start's wrong cycles are made up, so a policy learns to mend faults it does not make, and copies its own into the
next cycle. Here the wrong cycles are those it samples itself on training questions, never trained on, and what follows
each is a right working of the task. Its own right cycles are kept in, so that nothing else changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerFast

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP
from rtap_training.config import CorrectConfig
from rtap_training.data import Encoded
from rtap_training.huggingface import encode_text, load_policy, token_id
from rtap_training.own_cycles import PolicySetup, sampled_turns
from rtap_training.rollout import Trajectory
from rtap_training.rows import TrainingRows, learn
from rtap_training.run_state import check_resumable
from rtap_training.runtime import configure_torch
from rtap_training.tasks.base import Problem
from rtap_training.tasks.trajectory import CONFIRMATIONS, TURN_END, cycle_segments


@dataclass(frozen=True, slots=True)
class Rows:
    """What is learnt. corrected: a right cycle after wrong ones. kept: the policy's own turns that end right.
    confirmed: a right cycle once more, after the server's loop has opened one that was not needed."""

    corrected: list[Encoded]
    kept: list[Encoded]
    confirmed: list[Encoded]

    def draw(self, config: CorrectConfig, rng: Random) -> list[Encoded]:
        """Those of an epoch: all that is corrected, and a fresh share of the rest."""
        drawn = list(self.corrected)
        for part, share in ((self.kept, config.kept_share), (self.confirmed, config.confirmed_share)):
            drawn += rng.sample(part, min(len(part), round(share * len(self.corrected))))
        return drawn


def run(config: CorrectConfig) -> None:
    """Sample, train, evaluate on held-out questions before and after, save, and print the figures.

    Goes on from the run's last state, and from what was sampled, where there is something.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    setup = PolicySetup(*load_policy(config.policy), config)
    problems, sampled = sampled_turns(setup)
    rows = build_rows(setup.tokenizer, problems, sampled, Random(f"{config.seed}:rows"))
    if not rows.corrected:
        raise ConfigError(
            f"{config.policy} answered {config.questions} questions without a fault to correct; "
            "take more, or harder ones"
        )
    parts = {"corrected": rows.corrected, "kept": rows.kept, "confirmed": rows.confirmed}
    ids = [[row.ids for row in part] for part in parts.values()]
    counts = {name: len(part) for name, part in parts.items()}
    lesson = TrainingRows(ids, counts, lambda rng: rows.draw(config, rng))
    learn("correct", setup, lesson, evaluate_before=True)


def build_rows(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sampled: Sequence[Trajectory], rng: Random
) -> Rows:
    """Rows of all trajectories; ``problems[t.question]`` is what trajectory ``t`` answers."""
    rows = Rows([], [], [])
    for trajectory in sampled:
        _add(rows, tokenizer, problems[trajectory.question], trajectory, rng)
    return rows


def _add(rows: Rows, tokenizer: PreTrainedTokenizerFast, problem: Problem, trajectory: Trajectory, rng: Random) -> None:
    end = token_id(tokenizer, TURN_END)
    before = Encoded(list(trajectory.prompt), [False] * len(trajectory.prompt))
    for cycle in trajectory.cycles:
        if cycle.answer is None:
            return
        if cycle.is_right:
            rows.kept.append(_followed(before, [*cycle.ids, end]))
            again = _again(tokenizer, list(cycle.ids), rng.choice(CONFIRMATIONS))
            shown = _followed(_followed(before, list(cycle.ids), is_trained=False), again[:1], is_trained=False)
            rows.confirmed.append(_followed(shown, [*again[1:], end]))  # the loop writes the opening
            return
        before = _followed(before, list(cycle.ids), is_trained=False)
        value = problem.value_of(cycle.answer)
        if value is not None:
            right = cycle_segments(problem.right_attempt(rng), problem.doubt(rng, value))
            ids = encode_text(tokenizer, "".join(segment.text for segment in right))
            rows.corrected.append(_followed(before, [*ids, end]))


def _followed(row: Encoded, ids: list[int], *, is_trained: bool = True) -> Encoded:
    return Encoded([*row.ids, *ids], [*row.is_trained, *[is_trained] * len(ids)])


def _again(tokenizer: PreTrainedTokenizerFast, ids: list[int], doubt: str) -> list[int]:
    """A cycle once more, begun with ``doubt``. A first cycle may have been opened by its prompt."""
    opening = encode_text(tokenizer, RTAP.cycle_open)
    body = ids[len(opening) :] if ids[: len(opening)] == opening else ids
    return [*opening, *encode_text(tokenizer, doubt), *body]
