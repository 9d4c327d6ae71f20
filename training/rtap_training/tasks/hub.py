"""Questions from Hugging Face datasets: GSM8K, MATH, and any dataset with ``question`` and ``answer`` columns.

The test split of known datasets is the held-out split; other datasets are split by hash, like a user's file.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from rtap_core.errors import ConfigError
from rtap_training.tasks.base import Question, Split
from rtap_training.tasks.jsonl import distinct, question_split

_OWN_SPLITS: Mapping[Split, str] = {Split.TRAIN: "train", Split.HELD_OUT: "test"}


def after_hashes(solution: str) -> str | None:
    """Answer of GSM8K: text after the last ``####``, without thousands separators."""
    _, found, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") or None if found else None


def last_boxed(solution: str) -> str | None:
    r"""Answer of MATH: content of the last ``\boxed{…}``, or the token after a bare ``\boxed``."""
    start = solution.rfind(r"\boxed")
    rest = solution[start + len(r"\boxed") :] if start >= 0 else ""
    if not rest.startswith("{"):
        bare = re.match(r" +([^\s$.,]+)", rest)
        return bare.group(1) if bare else None
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:index].strip() or None
    return None


def stripped(answer: str) -> str | None:
    """Answer without surrounding spaces."""
    return answer.strip() or None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Columns, configs and splits of a dataset. splits: its names for our splits; None: split ``train`` by hash."""

    question: str = "question"
    answer: str = "answer"
    extract: Callable[[str], str | None] = stripped
    configs: tuple[str | None, ...] = (None,)
    splits: Mapping[Split, str] | None = None


_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
RECIPES: Mapping[str, Recipe] = {
    "openai/gsm8k": Recipe(extract=after_hashes, configs=("main",), splits=_OWN_SPLITS),
    "EleutherAI/hendrycks_math": Recipe("problem", "solution", last_boxed, _MATH_SUBJECTS, _OWN_SPLITS),
    "DigitalLearningGmbH/MATH-lighteval": Recipe("problem", "solution", last_boxed, splits=_OWN_SPLITS),
    "HuggingFaceH4/MATH-500": Recipe("problem", splits={Split.HELD_OUT: "test"}),
}


def load_dataset_questions(name: str, split: Split) -> list[Question]:
    """Questions of ``split``. Raises ConfigError for a missing dataset, split, column or answer."""
    recipe = RECIPES.get(name, Recipe())
    own = "train" if recipe.splits is None else recipe.splits.get(split)
    if own is None:
        raise ConfigError(
            f"the dataset {name} has no {split.value} split, only {'/'.join(recipe.splits or ())}; use another dataset"
        )
    rows = (row for config in recipe.configs for row in _rows(name, config, own))
    questions = distinct(_questions(name, recipe, rows), source=name)
    if recipe.splits is None:
        questions = [q for q in questions if question_split(q.question) is split]
    return questions


def _questions(name: str, recipe: Recipe, rows: Iterable[Mapping[str, Any]]) -> Iterable[Question]:
    for number, row in enumerate(rows):
        if recipe.question not in row or recipe.answer not in row:
            raise ConfigError(
                f"the dataset {name} has the columns {sorted(row)}, but needs {recipe.question!r} and {recipe.answer!r}"
            )
        question, answer = str(row[recipe.question]), recipe.extract(str(row[recipe.answer]))
        if answer is None or not question.strip():
            raise ConfigError(f"row {number} of the dataset {name} has no question or no readable answer")
        yield Question(question, answer, name.rpartition("/")[2].lower())


def _rows(name: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # pyright: ignore  # the package has no types

        return cast(Any, datasets).load_dataset(name, config, split=split)
    except Exception as error:  # the library raises dozens of kinds, including HTTP and file errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"cannot load the dataset {name} ({reason}); this needs the datasets package, and network access or a copy "
            "in the Hugging Face cache"
        ) from error
