"""Promises in docs/reliability.md and docs/security.md name tests that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = [ROOT / "docs" / name for name in ("reliability.md", "security.md")]
FILES = [*sorted((ROOT / "tests").rglob("test_*.py")), *sorted((ROOT / "tests" / "stress").glob("*.py"))]
FUNCTIONS = {
    name for file in FILES for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
}
_CODE = re.compile(r"`([^`\n]+)`")
_TEST_COLUMN = re.compile(r"^test\b", re.IGNORECASE)


def named_tests(text: str) -> Iterator[str]:
    """Test files and functions that a text names as code."""
    for code in _CODE.findall(text):
        name = code.partition("::")[0]
        if re.fullmatch(r"(?:[\w/]+/)?test_\w+(?:\.py)?|tests/stress/\w+\.py", name):
            yield name
            yield from re.findall(r"::(test_\w+)", code)


def exists(name: str) -> bool:
    """True for a test file, by path or name, and for a test function."""
    if not name.endswith(".py"):
        return name in FUNCTIONS
    return any(str(file.relative_to(ROOT)) == name or ("/" not in name and file.name == name) for file in FILES)


def promises(text: str) -> Iterator[tuple[str, str]]:
    """(promise, tests) of every row in tables whose last column is ``test``."""
    is_table_of_tests = False
    for line in text.splitlines():
        if not line.startswith("|"):
            is_table_of_tests = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if _TEST_COLUMN.match(cells[-1]):
            is_table_of_tests = True
        elif is_table_of_tests and set(cells[0]) != {"-"}:
            yield cells[0], cells[-1]


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.name)
def test_every_named_test_exists(file):
    named = list(named_tests(file.read_text()))
    assert len(named) > 5
    assert [name for name in named if not exists(name)] == []


def test_every_promise_of_reliability_has_a_test():
    rows = list(promises((ROOT / "docs" / "reliability.md").read_text()))
    assert len(rows) > 15
    assert [promise for promise, tests in rows if not list(named_tests(tests))] == []


def test_a_row_without_a_test_and_a_missing_test_are_found():
    text = "| promise | test |\n|---|---|\n| a | `tests/server/test_gone.py` |\n| b | by hand |\n"
    assert [name for name in named_tests(text) if not exists(name)] == ["tests/server/test_gone.py"]
    assert list(promises(text)) == [("a", "`tests/server/test_gone.py`"), ("b", "by hand")]
    assert exists("tests/deploy/test_promises.py")
    assert exists("test_promises.py")
    assert exists("test_every_promise_of_reliability_has_a_test")


@pytest.mark.parametrize("name", ["soak", "overload"])
def test_figures_have_date_command_and_seed(name):
    text = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    for line in ("- date: `", "- command: `python ", "- seed: `"):
        assert line in text
    assert (ROOT / "docs" / "results" / f"{name}.json").is_file()
    assert f"results/{name}.md" in (ROOT / "docs" / "reliability.md").read_text()
