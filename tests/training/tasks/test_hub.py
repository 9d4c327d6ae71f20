"""Dataset recipes on datasets in memory. Nothing is downloaded."""

from typing import Any

import datasets
import pytest

from rtap_core.errors import ConfigError
from rtap_training.tasks.base import Question, Split
from rtap_training.tasks.hub import RECIPES, after_hashes, last_boxed, load_dataset_questions

Key = tuple[str, str | None, str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[Key, list[dict[str, Any]]]:
    """What ``load_dataset`` finds, by name, config and split."""
    stored: dict[Key, list[dict[str, Any]]] = {}

    def load_dataset(name: str, config: str | None = None, *, split: str) -> datasets.Dataset:
        if (name, config, split) not in stored:
            raise ConnectionError(f"no {name}\nin two lines")
        return datasets.Dataset.from_list(stored[name, config, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stored


def test_gsm8k_answers_follow_the_hashes(hub: dict[Key, list[dict[str, Any]]]) -> None:
    hub["openai/gsm8k", "main", "train"] = [{"question": "How many?", "answer": "2*600=<<2*600=1200>>\n#### 1,200"}]
    hub["openai/gsm8k", "main", "test"] = [{"question": "And now?", "answer": "so #### -3"}]
    assert load_dataset_questions("openai/gsm8k", Split.TRAIN) == [Question("How many?", "1200", "gsm8k")]
    assert load_dataset_questions("openai/gsm8k", Split.HELD_OUT) == [Question("And now?", "-3", "gsm8k")]
    assert after_hashes("no answer") is None


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $x=\boxed{5}$.", "5"),
        (r"$\boxed{1}$, no: $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\text{a {nested} one}}", r"\text{a {nested} one}"),
        (r"is $\boxed 2$.", "2"),
        (r"\boxed{never closed", None),
        (r"\boxed{}", None),
        ("none", None),
    ],
)
def test_math_answers_are_boxed(solution: str, answer: str | None) -> None:
    assert last_boxed(solution) == answer


def test_math_is_read_over_all_subjects(hub: dict[Key, list[dict[str, Any]]]) -> None:
    name = "EleutherAI/hendrycks_math"
    for subject in RECIPES[name].configs:
        hub[name, subject, "train"] = [{"problem": f"{subject}?", "solution": rf"\boxed{{{len(subject or '')}}}"}]
    questions = load_dataset_questions(name, Split.TRAIN)
    assert [q.question for q in questions] == [f"{s}?" for s in RECIPES[name].configs]
    assert questions[0] == Question("algebra?", "7", "hendrycks_math")


def test_any_dataset_with_the_two_columns_is_split_by_hash(hub: dict[Key, list[dict[str, Any]]]) -> None:
    hub["me/mine", None, "train"] = [{"question": f"q{n % 400}?", "answer": str(n)} for n in range(500)]
    trained, held_out = (load_dataset_questions("me/mine", split) for split in Split)
    assert len(trained) + len(held_out) == 400
    assert 20 < len(held_out) < 60
    assert not {q.question for q in trained} & {q.question for q in held_out}


def test_what_cannot_be_read_is_refused_in_one_sentence(hub: dict[Key, list[dict[str, Any]]]) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the dataset me/none \(no me/none\); this needs .* network"):
        load_dataset_questions("me/none", Split.TRAIN)
    with pytest.raises(ConfigError, match="has no train split, only held_out"):
        load_dataset_questions("HuggingFaceH4/MATH-500", Split.TRAIN)
    hub["me/other", None, "train"] = [{"prompt": "q", "target": "a"}]
    with pytest.raises(ConfigError, match=r"has the columns \['prompt', 'target'\], but needs 'question' and 'answer'"):
        load_dataset_questions("me/other", Split.TRAIN)
    hub["openai/gsm8k", "main", "train"] = [{"question": "How many?", "answer": "many"}]
    with pytest.raises(ConfigError, match="row 0 of the dataset openai/gsm8k has no question or no readable answer"):
        load_dataset_questions("openai/gsm8k", Split.TRAIN)
