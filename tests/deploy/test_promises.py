"""Tables of promises in docs/ name tests that exist, and no row is without one."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = [ROOT / "docs" / name for name in ("reliability.md", "security.md", "supply-chain.md")]
FILES = sorted((ROOT / "tests").rglob("test_*.py"))
FUNCTIONS = {
    name for file in FILES for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
}
_CODE = re.compile(r"`([^`\n]+)`")
_HELD_BY = re.compile(r"^(test|held by)\b", re.IGNORECASE)


def named_tests(text: str) -> Iterator[str]:
    """Files and functions of tests that a text names as code."""
    for code in _CODE.findall(text):
        name = code.partition("::")[0]
        if re.fullmatch(r"(?:[\w/]+/)?test_\w+(?:\.py)?", name):
            yield name
            yield from re.findall(r"::(test_\w+)", code)


def exists(name: str) -> bool:
    """Whether there is such a test: a file by its path or by its name alone, or a function."""
    if not name.endswith(".py"):
        return name in FUNCTIONS
    return any(str(file.relative_to(ROOT)) == name or ("/" not in name and file.name == name) for file in FILES)


def promises(text: str) -> Iterator[tuple[str, str]]:
    """(promise, what holds it) of every row of tables whose last column is one of tests."""
    is_table_of_tests = False
    for line in text.splitlines():
        if not line.startswith("|"):
            is_table_of_tests = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if _HELD_BY.match(cells[-1]):
            is_table_of_tests = True
        elif is_table_of_tests and set(cells[0]) != {"-"}:
            yield cells[0], cells[-1]


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.name)
def test_every_test_that_is_named_exists(file):
    named = list(named_tests(file.read_text()))
    assert len(named) > 5
    assert [name for name in named if not exists(name)] == []


def test_no_promise_of_reliability_is_without_a_test():
    rows = list(promises((ROOT / "docs" / "reliability.md").read_text()))
    assert len(rows) > 15
    assert [
        promise for promise, held_by in rows if not list(named_tests(held_by)) and "security.md" not in held_by
    ] == []


def test_a_row_without_a_test_and_a_test_that_is_not_there_would_be_seen():
    text = "| promise | test |\n|---|---|\n| a | `tests/server/test_gone.py` |\n| b | by hand |\n"
    assert [name for name in named_tests(text) if not exists(name)] == ["tests/server/test_gone.py"]
    assert list(promises(text)) == [("a", "`tests/server/test_gone.py`"), ("b", "by hand")]
    assert exists("tests/deploy/test_promises.py")
    assert exists("test_promises.py")
    assert exists("test_no_promise_of_reliability_is_without_a_test")


@pytest.mark.parametrize("name", ["soak", "overload"])
def test_figures_were_measured_and_say_when_and_how(name):
    text = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    for said in ("- date: `", "- command: `python scripts/", "- seed: `"):
        assert said in text
    assert (ROOT / "docs" / "results" / f"{name}.json").is_file()
    assert f"results/{name}.md" in (ROOT / "docs" / "reliability.md").read_text()
