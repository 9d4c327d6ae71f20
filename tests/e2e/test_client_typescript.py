"""The TypeScript client's own tests and the example of docs/clients.md, by node's test runner, on the real server."""

import os
import re
import shutil
import subprocess

import pytest

from tests.e2e.conftest import ROOT

FOLDER = ROOT / "clients" / "typescript"


def _node_major() -> int:
    if shutil.which("npm") is None or shutil.which("node") is None:
        return 0
    told = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.match(r"v(\d+)", told)[1])


@pytest.mark.skipif(_node_major() < 20, reason="node 20 or newer and npm are not installed")
def test_typescript(server, tmp_path):
    # In a copy: the checkout may be read-only, and a developer's own node_modules stay as they are.
    copy = shutil.copytree(FOLDER, tmp_path / "client", ignore=shutil.ignore_patterns("node_modules", "dist", "build"))
    example = re.search(r"```ts\n(.*?)```", (ROOT / "docs" / "clients.md").read_text("utf-8"), re.DOTALL)[1]
    (copy / "test" / "docs.test.ts").write_text(example.replace("'rtap-client'", "'../src/index.js'"), "utf-8")
    for command in (["npm", "ci", "--no-audit", "--no-fund"], ["npm", "test"]):
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "RTAP_URL": server.url}, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert re.search(r"^# pass (\d\d)$", done.stdout, re.MULTILINE), done.stdout[-3000:]
    assert (copy / "dist" / "index.d.ts").is_file()
