"""Import directions that import-linter cannot say: rules with exceptions by name, binding for new modules too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT_VLLM = {
    "server.__main__",
    "server.app",
    "server.confidence",
    "server.cycles",
    "server.engines",
    "server.executor",
    "server.outputs",
    "server.reasoning_parser",
    "server.recursive_engine",
    "server.serving",
    "server.supervision",
    "training.rollout",
}


def modules_of(package: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module under a top-level package of this repository."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, source: str, *, is_package: bool) -> set[str]:
    """Dotted names of all it imports, wherever in the file; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    return found


def imports_in_file(module: str, path: Path) -> set[str]:
    return imports(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_vllm_is_imported_only_where_the_design_says() -> None:
    found = {
        module
        for package in ("server", "training", "clients")
        for module, path in modules_of(package)
        if any(within(name, "vllm") for name in imports_in_file(module, path))
    }
    assert found <= MAY_IMPORT_VLLM


def test_server_rtap_imports_nothing_else_of_server() -> None:
    found = {
        (module, name)
        for module, path in modules_of("server")
        if within(module, "server.rtap")
        for name in imports_in_file(module, path)
        if within(name, "server") and not within(name, "server.rtap")
    }
    assert not found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import vllm.config as c", {"vllm.config"}),
        ("def f():\n    from vllm import LLM", {"vllm.LLM"}),
        ("from .. import metrics", {"server.metrics"}),
        ("from ..metrics import Metrics", {"server.metrics.Metrics"}),
        ("from . import types", {"server.rtap.types"}),
    ],
)
def test_imports_are_found_however_they_are_written(line: str, expected: set[str]) -> None:
    assert imports("server.rtap.recursion", line, is_package=False) == expected


def test_a_relative_import_in_a_package_starts_at_the_package() -> None:
    assert imports("server.rtap", "from .types import Cycle", is_package=True) == {"server.rtap.types.Cycle"}


def test_no_init_file_under_tests() -> None:
    """`tests/server/__init__.py` would shadow the real server package."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
