"""The HTML report of `rtap eval`: small, accessible in both themes, readable at any width."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from rtap_training.evaluation.page import to_html
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Outcome, Run, RunSpec
from rtap_training.evaluation.replay import RuleParameters
from rtap_training.evaluation.results import Results, task_results
from tests.page.browser import open_page, violations

QUESTIONS = 500
MOST_BYTES = 400_000
TASKS = ("countdown", "arithmetic")
SPECS = [
    RunSpec("single"), *(RunSpec("confidence", threshold) for threshold in (0.5, 0.7, 0.9)), RunSpec("model"),
    RunSpec("vote", samples=8),
]  # fmt: skip


def run(task: str, spec: RunSpec) -> Run:
    """Two of three questions are answered correctly, most of them with a high confidence."""
    outcomes = []
    for i in range(QUESTIONS):
        right = i % 3 > 0
        confidence = (0.6 if right else 0.1) + (i * 37 % 400) / 1000
        cycle = CycleRecord(f"25*3+{i}" * 6, right, confidence, 30, 1, 60, 32)
        cycles = (cycle,) * (spec.samples or 2)
        outcomes.append(
            Outcome(i, None, cycle.answer, right, "threshold", 30 * len(cycles), 99, 0.1, 0.1, None, cycles)
        )
    return Run(task, spec, tuple(outcomes), 60.0)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two tasks of 500 questions each."""
    asked = {t: [Question(f"make {i} from 3, 7, 25", "25*3+7", t) for i in range(QUESTIONS)] for t in TASKS}
    parameters = RuleParameters((2, 4, 8), (0.8, 0.95), (0.5, 0.7, 0.9), 0.35)
    tasks = [task_results(t, [run(t, s) for s in SPECS], asked[t], parameters) for t in TASKS]
    setting = {
        "command": f"rtap eval --questions {' '.join(TASKS)} --output {'x' * 200}",
        "date": "2026-11-25T01:02:03",
        "server": {"models": ["rtap"]},
    }
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(to_html(Results(setting, tuple(tasks))), "utf-8")
    return file


def test_it_is_small_enough_to_mail(report: Path) -> None:
    assert report.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_axe_finds_nothing_and_it_fits(browser: Browser, report: Path, scheme: str, width: int) -> None:
    with open_page(browser, report.as_uri(), width=width, color_scheme=scheme) as page:
        page.get_by_text("Full setup").click()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tables = page.get_by_role("region")
        assert tables.count() == 6
        wider = tables.evaluate_all("all => all.filter(t => t.scrollWidth > t.clientWidth).length")
        # They scroll by themselves, by keyboard too: on a phone all that do not fit, else the two with every rule.
        assert wider > 2 if width == 320 else wider <= 2
