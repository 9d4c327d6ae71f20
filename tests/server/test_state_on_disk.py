"""The server keeps its state in memory. What vLLM keeps on disk beside it may be half of a file, or gone.

That nothing is written under traffic either is looked at from outside: tests/e2e/test_soak.py.
"""

import ast
from pathlib import Path

import pytest
import vllm.model_executor.models.registry as registry

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "server" / "rtap_core" / "adapters.py"  # writes merged generators to the cache, before it serves
SOURCES = sorted(file for file in (ROOT / "server").rglob("*.py") if file != ADAPTERS)
_WRITES = {
    "write_text", "write_bytes", "mkdir", "touch", "unlink", "rename", "symlink_to", "makedirs", "mkstemp", "mkdtemp",
    "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "rmtree", "copyfile", "copytree",
}  # fmt: skip
_MODULES = {"sqlite3", "shelve", "dbm", "diskcache", "tempfile"}


def writes(source: str) -> list[str]:
    """Names of what in it writes files."""
    found = list[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += sorted(_MODULES & {name.partition(".")[0] for name in names})
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            said = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            modes = [one.value for one in said if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            if called in _WRITES or (called == "open" and any(set("wax+") & set(mode) for mode in modes)):
                found.append(called)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_part_of_the_server_writes_a_file(source):
    assert writes(source.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["open(p, 'w')", "p.open(mode='ab')", "p.write_text('x')", "import sqlite3", "from tempfile import mkstemp"],
)
def test_it_would_be_seen(source):
    assert writes(source)
    assert writes("open(p)\np.open('rb')\np.read_text()") == []


@pytest.mark.parametrize("kept", [b"", b'{"hash": "', b"\xff\xfe", b"[]", b'{"hash": "h", "modelinfo": {"x": 1}}'])
def test_what_vllm_remembers_of_a_model_may_be_cut_anywhere(tmp_path, monkeypatch, kept):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    model = registry._LazyRegisteredModel(module_name="vllm.model_executor.models.qwen3", class_name="Qwen3ForCausalLM")
    folder, name = model._get_cache_dir(), model._get_cache_filename()
    assert folder.is_relative_to(tmp_path)
    folder.mkdir(parents=True)
    (folder / name).write_bytes(kept)
    assert model._load_modelinfo_from_cache("h") is None
