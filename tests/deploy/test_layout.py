"""Layout rules that import-linter cannot express: modules that may import vLLM, no __init__.py under tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "server", ROOT / "training", ROOT / "clients" / "python")
MAY_IMPORT_VLLM = {
    "rtap_server.__main__",
    "rtap_server.app",
    "rtap_server.run",
    "rtap_server.engine",
    "rtap_training.sampling.samplers",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module that the wheel contains."""
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_vllm(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "vllm" for name in names):
            return True
    return False


def test_vllm_is_imported_only_by_allowed_modules() -> None:
    found = {name for name, path in modules() if imports_vllm(path)}
    assert "rtap_server.engine.recursive_engine" in found
    allowed = tuple(f"{name}." for name in MAY_IMPORT_VLLM)
    assert not [name for name in found if name not in MAY_IMPORT_VLLM and not name.startswith(allowed)]


def test_no_init_file_under_tests() -> None:
    """`tests` is a namespace package; an __init__.py would shadow packages of the same name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
