"""The TypeScript client on the real server: its own tests by node's test runner, and the example of docs/clients.md on
the package as a user installs it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documents import blocks
from tests.e2e.conftest import ROOT

FOLDER = ROOT / "clients" / "typescript"
EXAMPLE = next(code for code in blocks(ROOT / "docs" / "clients.md", "ts"))


def _node_major() -> int:
    if shutil.which("npm") is None or shutil.which("node") is None:
        return 0
    told = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.match(r"v(\d+)", told)[1])


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_node_major() < 20, reason="node 20 or newer and npm are not installed"),
]


def run(folder: Path, *command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a copy: the checkout may be read-only, and a developer's own node_modules stay as they are."""
    copy = tmp_path_factory.mktemp("typescript") / "client"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("node_modules", "dist", "build"))
    run(copy, "npm", "ci", "--no-audit", "--no-fund")
    return copy


def test_typescript(server, client):
    (client / "test" / "docs.test.ts").write_text(EXAMPLE.replace("'rtap-client'", "'../src/index.js'"), "utf-8")
    told = run(client, "npm", "test", RTAP_URL=server.url)
    assert re.search(r"^# pass (\d\d)$", told, re.MULTILINE), told[-3000:]
    assert (client / "dist" / "index.d.ts").is_file()


def test_the_example_runs_on_the_packed_client_in_an_empty_folder(server, client, tmp_path):
    (packed,) = json.loads(run(client, "npm", "pack", "--json", "--ignore-scripts"))  # `npm ci` has built it
    openai = json.loads((client / "package-lock.json").read_text())["packages"]["node_modules/openai"]["version"]
    run(tmp_path, "npm", "install", "--no-audit", "--no-fund", "--prefer-offline", client / packed["filename"],
        f"openai@{openai}")  # fmt: skip
    assert {path.name for path in (tmp_path / "node_modules").iterdir()} >= {"rtap-client", "openai"}
    (tmp_path / "package.json").write_text(json.dumps({"type": "module"}))
    (tmp_path / "example.ts").write_text(EXAMPLE, "utf-8")
    tools = client / "node_modules" / ".bin"
    run(tmp_path, tools / "tsc", "--noEmit", "--strict", "--module", "nodenext", "--target", "es2022", "example.ts")
    run(tmp_path, tools / "esbuild", "example.ts", "--outfile=example.js")  # node 20 runs no TypeScript
    first, *cycles, last = run(tmp_path, "node", "example.js", RTAP_URL=server.url).splitlines()
    assert re.fullmatch(r"[\d+*()-]+ (threshold|max_cycles)", first)
    assert cycles
    assert re.fullmatch(r"[\d+*()-]+ [\d.]+", last)
