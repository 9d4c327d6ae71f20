"""Metrics of a policy, from hand-made trajectories and from the bundled models."""

from pathlib import Path

import pytest

from rtap_core.types import Cycle, Policy, StopReason, Trajectory
from rtap_training.data.questions import held_out_questions
from rtap_training.models.loading import load_for_training
from rtap_training.models.online_generator import load_online_generator
from rtap_training.rl.measure import MeasureConfig, forced_figures, measure, own_figures
from rtap_training.tasks import TASKS
from rtap_training.tasks.base import Question
from tests.training.demo import load_policy

BUNDLED = Path(__file__).parents[3] / "deploy" / "models"
QUESTION = Question("make 6 from 1, 2, 3", "1+2+3", "countdown")
RIGHT, WRONG = "1+2+3", "1+2*3"


def cycle(answer: str | None, confidence: float | None = None, tokens: int = 10, oops: int = 0) -> Cycle:
    return Cycle(0, "", answer, confidence, False, tokens, 0, oops, 0, 0, 0.0, None, 0)


def trajectory(*cycles: Cycle) -> Trajectory:
    complete = [i for i, c in enumerate(cycles) if c.answer is not None]
    selected = complete[-1] if complete else None
    return Trajectory(Policy.MODEL, StopReason.MODEL, cycles, selected, None, None, 0.0, None, None)


def test_own_figures_are_of_the_answer_that_the_policy_returns() -> None:
    runs = [[trajectory(cycle(WRONG, oops=1), cycle(RIGHT)), trajectory(cycle(RIGHT)), trajectory(cycle(None))]]
    found = own_figures(runs, [QUESTION])
    assert found["first"] == pytest.approx(1 / 3)
    assert found["model"] == pytest.approx(2 / 3)
    assert found["model_vote"] == 1.0
    assert (found["model_cycles"], found["model_tokens"]) == (4 / 3, pytest.approx(40 / 3))
    assert (found["oops"], found["oops_per_1000"]) == (pytest.approx(1 / 3), 25.0)


@pytest.mark.parametrize(("threshold", "accuracy", "tokens"), [(0.3, 0.0, 10), (0.5, 1.0, 20), (0.95, 1.0, 30)])
def test_confidence_stops_at_the_first_cycle_that_clears_the_threshold(
    threshold: float, accuracy: float, tokens: float
) -> None:
    """A threshold below all confidences selects the first cycle; one above all selects the best."""
    runs = [[trajectory(cycle(WRONG, 0.4), cycle(RIGHT, 0.9), cycle(WRONG, 0.1))]]
    found = forced_figures(runs, [QUESTION], threshold, is_scored=True)
    assert (found["confidence"], found["confidence_tokens"]) == (accuracy, tokens)
    assert (found["last"], found["ever"], found["within_auroc"]) == (0.0, 1.0, 1.0)


def test_without_a_generator_there_is_nothing_to_stop_by() -> None:
    assert set(forced_figures([[trajectory(cycle(RIGHT))]], [QUESTION], 0.5, is_scored=False)) == {"last", "ever"}


def test_a_question_without_contrast_has_no_within_question_auroc() -> None:
    assert forced_figures([[trajectory(cycle(RIGHT, 0.5))]], [QUESTION], 0.5, is_scored=True)["within_auroc"] is None


@pytest.mark.slow
def test_the_bundled_models_measured_twice_give_the_same() -> None:
    model, _ = load_policy(BUNDLED / "policy")
    dialect = load_for_training(BUNDLED / "policy").dialect
    generator = load_online_generator(BUNDLED / "confidence")
    questions = held_out_questions(TASKS["countdown"], 12)
    config = MeasureConfig(max_cycles=3, samples=2, forced=1)
    first = measure(model, dialect, generator, questions, config)
    assert first == measure(model, dialect, generator, questions, config)
    assert first["model_cycles"] <= 3
    assert first["first_tokens"] <= first["model_tokens"]
    assert first["last"] <= first["ever"]
    assert first["ever"] >= 0.3


def test_the_end_of_the_turn_is_no_cycle() -> None:
    """The bundled policy is right nine times in ten in arithmetic and then ends its turn."""
    model, _ = load_policy(BUNDLED / "policy")
    dialect = load_for_training(BUNDLED / "policy").dialect
    found = measure(
        model, dialect, None, held_out_questions(TASKS["arithmetic"], 12), MeasureConfig(samples=1, forced=0)
    )
    assert found["model_cycles"] < 2
