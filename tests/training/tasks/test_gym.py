"""Questions of reasoning-gym and their verifiers, on a small stand-in for the package."""

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtap_core.errors import ConfigError
from rtap_training.evaluation.question_files import GYM_PROMPT, load_questions
from rtap_training.tasks.gym import Counts, Verifier, read_dataset

PACKAGE = """
    import os
    import re
    import time
    from dataclasses import dataclass

    @dataclass
    class Config:
        top: int = 5
        seed: int = 0
        size: int = 500

    class Sums:
        def __init__(self, config):
            assert config.top > 1, "top must be above 1"
            self.config = config

        def __getitem__(self, index):
            a, b = self.config.seed + index // 2, self.config.top
            return {"question": f"{a} + {b}?", "answer": str(a + b), "metadata": {"sum": a + b}}

        def score_answer(self, answer, entry):
            if answer == "loop":
                time.sleep(60)
            if answer == "exit":
                os._exit(1)
            if answer == "fail":
                raise ValueError
            return 1.0 if answer == f"={entry['metadata']['sum']}" else 0.5

    class Countdown(Sums):
        def score_answer(self, answer, entry):
            numbers = sorted(re.findall(r"\\d+", answer))
            is_allowed = numbers in (["1", "2", "2"], ["1", "1", "2", "2"])
            return 1.0 if is_allowed and eval(answer) == entry["metadata"]["sum"] else 0.0
"""
EVALUATING = """
    from reasoning_gym.datasets import Sums

    class Queens(Sums):
        def score_answer(self, answer, entry):
            return 1.0 if answer in ("Q _", "_ Q") or eval(answer) else 0.0
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "reasoning_gym"
    folder.mkdir()
    (folder / "datasets.py").write_text(textwrap.dedent(PACKAGE))
    (folder / "evaluating.py").write_text(textwrap.dedent(EVALUATING))
    (folder / "factory.py").write_text(
        "from reasoning_gym.datasets import *\nfrom reasoning_gym.evaluating import *\n"
        "DATASETS = {'sums': (Sums, Config), 'countdown': (Countdown, Config), 'n_queens': (Queens, Config)}\n"
    )
    (folder / "__init__.py").write_text(
        "from reasoning_gym.factory import DATASETS\n"
        "def create_dataset(name, **options):\n    made, config = DATASETS[name]\n    return made(config(**options))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


@pytest.fixture
def verifier() -> Iterator[Verifier]:
    verifier = Verifier(limit_seconds=5)
    yield verifier
    verifier.close()


def test_a_dataset_gives_distinct_questions_named_after_it() -> None:
    questions = read_dataset("rg:sums?top=3&size=6&seed=1")
    assert [(q.question, q.answer, q.task) for q in questions] == [
        ("1 + 3?", "4", "sums?top=3"), ("2 + 3?", "5", "sums?top=3"), ("3 + 3?", "6", "sums?top=3"),
    ]  # fmt: skip
    assert len(read_dataset("rg:sums")) == 100  # 200 entries, each twice
    by_task = load_questions(["rg:sums?size=4", "rg:sums?top=3&size=2"], limit=1)
    assert {task: len(rows) for task, rows in by_task.items()} == {"sums": 1, "sums?top=3": 1}
    assert by_task["sums"][0].prompt == GYM_PROMPT.replace("{question}", "0 + 5?")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("rg:sum", "reasoning-gym has no dataset 'sum'; choose from sums"),
        ("rg:sums?terms=3", "sums has no option 'terms'; choose from top, seed, size"),
        ("rg:sums?top=1", "sums refuses these options: top must be above 1"),
        ("rg:sums?size=many", "size must be an integer of at least 0, not many"),
        ("rg:composite", "mixes other datasets; name these instead, each as rg:NAME"),
        ("rg:sums?top", "'top' must be option=value"),
    ],
)
def test_a_wrong_source_gets_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_dataset(source)
    assert repr(source) in str(caught.value)
    assert sentence in str(caught.value)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"needs reasoning-gym; install it with `pip install 'rtap\[rg\]'`"):
        read_dataset("rg:sums")


def test_only_a_full_score_is_right_and_a_verifier_that_hangs_is_ended(verifier: Verifier) -> None:
    question, *_ = read_dataset("rg:sums?size=2")
    assert verifier.is_right(question, "=5")
    assert verifier.is_right(question, "5.0")  # the reference number in another notation
    assert not verifier.is_right(question, "6")
    assert not verifier.is_right(question, "fail")
    assert not verifier.is_right(question, "loop")
    assert verifier.is_right(question, "=5")
    assert not verifier.is_right(question, "5" * 10_000)
    assert not verifier.is_right(question, "exit")
    assert verifier.counts == Counts(judged=5, errors=1, timeouts=1, crashes=1)


def test_a_verifier_that_does_not_start_is_one_sentence(verifier: Verifier, tmp_path: Path) -> None:
    question, *_ = read_dataset("rg:sums?size=2")
    package = tmp_path / "reasoning_gym" / "__init__.py"
    for code, reason in (("raise ImportError('no')", "ImportError: no"), ("import os; os._exit(1)", "process crashed")):
        package.write_text(code)
        with pytest.raises(ConfigError, match=f"the verifier of sums does not start: .*{reason}"):
            verifier.start(question)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("2 * 2 + 1", True),
        (r"2 \times 2 + 1 = 5", True),
        (r"\left(2 \cdot 2\right) + 1", True),
        ("2 × 2 + 1 = 5.", True),
        (r"\frac{2 \times 2}{1} + 1", True),
        (r"2 \div \frac{1}{2} + 1", True),
        (r"1 + \dfrac{2}{\frac{1}{2}}", True),
        (r"10 \div 2", False),  # other numbers
        (r"5 \times 1 = 5", False),
        ("5", False),
        ("= 5", False),
        ("x = 5", False),
        ("2**2 + 1", False),
        ("9**9**9**9", False),
    ],
)
def test_a_formula_is_judged_by_its_verifier_alone(verifier: Verifier, answer: str, is_right: bool) -> None:
    question, *_ = read_dataset("rg:countdown?size=2")
    assert verifier.is_right(question, answer) is is_right


def test_answers_are_never_evaluated_as_python(verifier: Verifier, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for source in ("rg:countdown?size=2", "rg:n_queens?size=2"):
        question, *_ = read_dataset(source)
        assert not verifier.is_right(question, f"open({str(made)!r}, 'w') and 7")
    assert not made.exists()
    assert verifier.is_right(question, "Q _")  # one of several right answers, none of them the reference
    assert verifier.is_right(question, "_ Q")
