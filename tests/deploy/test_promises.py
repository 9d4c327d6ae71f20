"""Promises in docs/reliability.md and docs/security.md name tests that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELIABILITY, SECURITY = (ROOT / "docs" / name for name in ("reliability.md", "security.md"))
FILES = {
    str(path.relative_to(ROOT)): path
    for folder, pattern in (("tests", "test_*.py"), ("tests/stress", "*.py"), ("benchmarks", "*.py"))
    for path in sorted((ROOT / folder).rglob(pattern))
}
# Every property of the promises, in order; tests without a promise here are in other tables of the page.
PROPERTIES = (
    "authentication", "constant-time keys", "any input", "size and count limits", "no starvation", "linear parsing",
    "graceful shutdown", "shutdown keeps work", "disconnect", "backpressure", "deadline", "engine death", "overhead",
    "long runs", "true metrics", "alerts", "bounded labels", "privacy", "tenant isolation", "error hygiene", "streams",
    "image", "Kubernetes", "supply chain", "page", "Ray Serve",
)  # fmt: skip
_CODE = re.compile(r"`([^`\n]+)`")
_NAME = re.compile(r"((?:[\w/]+/)?\w+\.py)?(?:::(test_\w+))?")
_TEST_COLUMN = re.compile(r"^test\b", re.IGNORECASE)
_UNTESTED = re.compile(r"^not tested: \w.{20,}|^–$")


def named_tests(text: str) -> Iterator[tuple[str, str]]:
    """(file, function) of every test that a text names as code; the function is "" for a whole file.

    ``::test_name`` alone is in the file that was named before."""
    file = ""
    for code in _CODE.findall(text):
        name = _NAME.fullmatch(code)
        if name is None or not code:
            continue
        file = name[1] or file
        yield file, name[2] or ""


def exists(file: str, function: str) -> bool:
    """True for a test file, by path or by a name that only one file has, with this function."""
    paths = [path for name, path in FILES.items() if file and (name == file or name.endswith(f"/{file}"))]
    return len(paths) == 1 and (
        not function or re.search(rf"^(?:async )?def {function}\(", paths[0].read_text(), re.MULTILINE) is not None
    )


def rows(text: str) -> Iterator[tuple[str, str]]:
    """(first cell, last cell) of every row in tables whose last column is ``test``."""
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


@pytest.mark.parametrize("file", [RELIABILITY, SECURITY], ids=lambda file: file.name)
def test_every_named_test_exists(file):
    found = [(name, tests) for name, tests in rows(file.read_text()) if not _UNTESTED.match(tests)]
    assert len(found) > 15
    assert [name for name, tests in found if not list(named_tests(tests))] == []
    assert [one for _, tests in found for one in named_tests(tests) if not exists(*one)] == []


def test_every_property_is_promised_in_order():
    assert tuple(name for name, _ in rows(RELIABILITY.read_text()))[: len(PROPERTIES)] == PROPERTIES


def test_a_row_without_a_test_and_a_missing_test_are_found():
    text = (
        "| promise | test |\n|---|---|\n| a | `tests/server/test_gone.py` |\n| b | by hand |\n"
        "| c | `tests/deploy/test_promises.py::test_gone`, `::test_every_named_test_exists` |\n"
    )
    named = {promise: list(named_tests(tests)) for promise, tests in rows(text)}
    this = "tests/deploy/test_promises.py"
    assert named == {
        "a": [("tests/server/test_gone.py", "")],
        "b": [],
        "c": [(this, "test_gone"), (this, "test_every_named_test_exists")],
    }
    assert [exists(*one) for one in (*named["a"], *named["c"])] == [False, False, True]
    assert exists("test_promises.py", "")
    assert not exists("", "test_every_named_test_exists")
    assert _UNTESTED.match("not tested: the reason in some words")
    assert not _UNTESTED.match("not tested: no")


@pytest.mark.parametrize("name", ["soak", "overload"])
def test_figures_have_date_command_and_seed(name):
    text = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    for line in ("- date: `", "- command: `python ", "- seed: `"):
        assert line in text
    assert (ROOT / "docs" / "results" / f"{name}.json").is_file()
    assert f"results/{name}.md" in RELIABILITY.read_text()
