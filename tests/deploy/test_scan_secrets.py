"""The scan of `make check` finds what it is there for. What is planted here is put together when the test runs."""

import subprocess
from pathlib import Path

import pytest
import scan_secrets

PASSWORD = 'password = "hunter' + '2-and-more"'
KEYS = [
    'REGION, KEY = "eu", "AKIA' + 'QYLPMN5HFIQR7XYA"',
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    'header = "ghp_' + 'wWPw5k4aXcaT4fNP0UcnZwJUVFk6LO0pINUx"',
    'salt = "c3VwZXIgbG9uZyBzdHJpbmcgc2hvdWxkIGNhdXNl' + 'IGVub3VnaCBlbnRyb3B5"',
]
PLACES = ["server/settings.py", "tests/server/test_settings.py", "docs/use.md"]


def write(root: Path, name: str, *lines: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([*lines, ""]))


def test_planted_keys_are_found_wherever_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for place in PLACES:
        write(tmp_path, place, *KEYS)
    write(tmp_path, "server/app.py", PASSWORD)
    assert scan_secrets.main([str(tmp_path)]) == 1
    told = capfd.readouterr().out
    every = {f"{place}:{line}" for place in PLACES for line in range(1, len(KEYS) + 1)} | {"server/app.py:1"}
    assert {where for where in every if f"Location:    {where}\n" in told} == every


def test_what_holds_no_key_passes(tmp_path: Path) -> None:
    """Tests may call something a password; a line can say that it holds none; "none" is no key."""
    write(tmp_path, "tests/server/test_app.py", PASSWORD)
    write(tmp_path, "server/app.py", PASSWORD + "  # pragma: allowlist secret", 'api_key = "none"')
    assert scan_secrets.main([str(tmp_path)]) == 0


def test_git_says_which_files_there_are(tmp_path: Path) -> None:
    """Ignored ones are not read, those not yet added are."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    for name in ("kept.py", "local.env"):
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text("*.env\n")
    assert scan_secrets.files(tmp_path) == [".gitignore", "kept.py"]
