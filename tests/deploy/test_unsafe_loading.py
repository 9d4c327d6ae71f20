"""No source file loads formats that can run code; torch.load needs weights_only=True.

ruff's S rules find direct calls of pickle. This test also finds imports, aliases and torch.load.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("server", "training", "clients", "scripts", "benchmarks", "deploy")
SOURCES = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle"}
PICKLING = {"read_pickle", "to_pickle"}


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def is_torch_load(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "load"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    )


def unsafe(source: str) -> list[str]:
    """Each use that could run code from a file, as `line: name`."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # `cast(Any, torch.load)(path, weights_only=True)` is safe too.
    safe = {id(n) for call in calls if is_true(call, "weights_only") for n in ast.walk(call.func) if is_torch_load(n)}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in PICKLES or "torch.load" in names:
                found.append(f"{node.lineno}: from {node.module}")
        elif is_torch_load(node) and id(node) not in safe:
            found.append(f"{node.lineno}: torch.load")
        elif isinstance(node, ast.Attribute) and node.attr in PICKLING:
            found.append(f"{node.lineno}: {node.attr}")
        elif isinstance(node, ast.Call):
            flags = ("allow_pickle", "trust_remote_code")
            found += [f"{node.lineno}: {flag}" for flag in flags if is_true(node, flag)]
    return found


def test_no_source_loads_files_that_can_run_code() -> None:
    assert len(SOURCES) > 80
    assert not {str(path.relative_to(ROOT)): uses for path in SOURCES if (uses := unsafe(path.read_text("utf-8")))}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import joblib.numpy_pickle as j",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "load = torch.load",
        "from torch import load",
        "load(torch.load, weights_only=True)",
        "numpy.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_unsafe_code_is_found(code: str) -> None:
    assert len(unsafe(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "cast(Any, torch.load)(path, weights_only=True)",
        "json.load(file)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_safe_code_is_not_found(code: str) -> None:
    assert not unsafe(code)
