"""Training on corrections of a policy's own wrong cycles (``rtap train demo-correct``).

The wrong cycles of a cold start are synthetic, so a policy learns to correct errors it does not make and copies its own
errors into the next cycle. Here wrong cycles are sampled from the policy and masked; each is followed by a right cycle.
The policy's own right trajectories are included to keep the rest of its behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerFast

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP
from rtap_training.bundled.config import CorrectConfig
from rtap_training.bundled.data import Encoded
from rtap_training.bundled.own_cycles import PolicySetup, sampled_turns
from rtap_training.bundled.rows import TrainingRows, learn
from rtap_training.huggingface import encode_text, load_policy, token_id
from rtap_training.rollout import Trajectory
from rtap_training.run_state import check_resumable
from rtap_training.runtime import configure_torch
from rtap_training.tasks.base import Problem
from rtap_training.tasks.trajectory import CONFIRMATIONS, TURN_END, cycle_segments


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows by kind.

    corrected: a right cycle after wrong ones. kept: the policy's own trajectories that end right. confirmed: a right
    cycle repeated after the loop has opened an unneeded one.
    """

    corrected: list[Encoded]
    kept: list[Encoded]
    confirmed: list[Encoded]

    def draw(self, config: CorrectConfig, rng: Random) -> list[Encoded]:
        """Rows of one epoch: all corrected rows and a random share of the others."""
        drawn = list(self.corrected)
        for part, share in ((self.kept, config.kept_share), (self.confirmed, config.confirmed_share)):
            drawn += rng.sample(part, min(len(part), round(share * len(self.corrected))))
        return drawn


def run(config: CorrectConfig) -> None:
    """Sample, train, evaluate on held-out questions before and after, save, and print the metrics.

    Resumes from saved samples and the last state.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    setup = PolicySetup(*load_policy(config.policy), config)
    problems, sampled = sampled_turns(setup)
    rows = build_rows(setup.tokenizer, problems, sampled, Random(f"{config.seed}:rows"))
    if not rows.corrected:
        raise ConfigError(
            f"{config.policy} answered {config.questions} questions without an error to correct; "
            "use more or harder questions"
        )
    parts = {"corrected": rows.corrected, "kept": rows.kept, "confirmed": rows.confirmed}
    ids = [[row.ids for row in part] for part in parts.values()]
    counts = {name: len(part) for name, part in parts.items()}
    learn("correct", setup, TrainingRows(ids, counts, lambda rng: rows.draw(config, rng)), evaluate_before=True)


def build_rows(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sampled: Sequence[Trajectory], rng: Random
) -> Rows:
    """Rows of all trajectories; trajectory ``t`` answers ``problems[t.question]``."""
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
    """The cycle repeated after ``doubt``. A first cycle may have been opened by the prompt."""
    opening = encode_text(tokenizer, RTAP.cycle_open)
    body = ids[len(opening) :] if ids[: len(opening)] == opening else ids
    return [*opening, *encode_text(tokenizer, doubt), *body]
