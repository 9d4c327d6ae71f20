"""Fixtures are made once: what shares one runs in one process."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LONGEST, group_of

TESTS = Path(__file__).resolve().parents[1]


def test_no_server_of_e2e_is_shared_by_two_groups(request: pytest.FixtureRequest) -> None:
    """Over all tests that are collected with this one. If it fails, tests/conftest.py has to name another group."""
    groups: dict[str, set[str]] = defaultdict(set)
    for item in request.session.items:
        known: dict[str, Any] = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        for name, definitions in known.items():
            made = definitions[-1]
            if made.scope == "session" and made.baseid.endswith("tests/e2e"):
                groups[name].add(group_of(item.nodeid))
    assert not {name: where for name, where in groups.items() if len(where) > 1}


def test_every_group_that_begins_early_has_a_file() -> None:
    groups = {group_of(str(path.relative_to(TESTS.parent))) for path in TESTS.rglob("test_*.py")}
    assert set(LONGEST) <= groups


def test_a_group_runs_in_one_process_and_long_ones_begin_first(tmp_path: Path) -> None:
    """Two real processes. Each group sleeps in its first test, so that the other process would take the second."""
    text = "import time, pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_it(n):\n    time.sleep(0.1)\n"
    names = ["tests/a/test_first.py", "tests/e2e/test_chat.py", "tests/e2e/test_load.py", "tests/z/test_last.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tests/conftest.py").write_text((TESTS / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-v", "--numprocesses", "2", "--import-mode=importlib"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in [name for name in env if name.startswith("PYTEST_XDIST")]:
        del env[name]
    result = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "tests"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    ran = re.findall(r"^\[(gw\d)\].*PASSED (\S+?)::", result.stdout, re.MULTILINE)
    assert len(ran) == 16, result.stdout + result.stderr
    processes = {group: {process for process, name in ran if group_of(name) == group} for group in map(group_of, names)}
    assert all(len(found) == 1 for found in processes.values())
    assert processes["e2e"] != processes["tests/a/test_first.py"]
    assert next(name for process, name in ran if process in processes["e2e"]).startswith("tests/e2e/")
