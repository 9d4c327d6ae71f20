"""The `rtap` command: fast help, usage errors, and arguments passed on unchanged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtap_client import cli
from tests.costs import child_cpu_seconds

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from rtap_client.cli import main; sys.exit(main())"


def rtap(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process, with `path` first on sys.path."""
    paths = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT / "clients" / "python")])}
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A distribution that registers the command `echo`, which prints its arguments and exits with 7."""
    (tmp_path / "echo_plugin.py").write_text("def main(argv=None):\n    print(argv)\n    return 7\n")
    metadata = tmp_path / "echo_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[rtap.commands]\necho = echo_plugin:main\n")
    return tmp_path


def test_help_names_every_command_and_takes_under_a_second() -> None:
    result = rtap("--help")
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {name} " in result.stdout for name in ("serve", "train", "eval"))
    assert max(map(len, result.stdout.splitlines())) <= 120
    assert child_cpu_seconds(lambda: rtap("--help")) < 1


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rtap_client.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'vllm', 'transformers', 'openai', 'pydantic', 'numpy'}\n"
        "heavy |= {'rtap_core', 'rtap_server', 'rtap_training'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python")}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("heavy: []\n")


def test_arguments_reach_the_command_unchanged_and_its_exit_code_is_returned(plugin: Path) -> None:
    result = rtap("echo", "model name", "--help", "--threshold=0.5", "--", "-x", path=plugin)
    assert result.stdout == "['model name', '--help', '--threshold=0.5', '--', '-x']\n"
    assert result.returncode == 7


def test_help_lists_commands_of_other_distributions(plugin: Path) -> None:
    assert "  echo       from echo_plugin" in rtap("--help", path=plugin).stdout


def test_unknown_command_exits_2_with_close_matches() -> None:
    result = rtap("srve")
    assert result.returncode == 2
    assert result.stderr == "rtap: unknown command 'srve'; did you mean serve?\n"
    assert "lists the commands" in rtap("zzz").stderr


def test_no_command_shows_the_help_and_exits_2() -> None:
    result = rtap()
    assert result.returncode == 2
    assert result.stdout.startswith("usage: rtap COMMAND")


def test_version_is_printed() -> None:
    result = rtap("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("rtap 0")


def test_a_command_whose_extra_is_missing_is_marked_in_the_help_and_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = cli.Command("serve things", "cpu", "no_such_module_anywhere")
    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, "serve": missing})
    assert cli.main(["--help"]) == 0
    assert f"serve things (not installed: {cli.install('cpu')})" in capsys.readouterr().out
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == f"rtap: serve is not installed: run {cli.install('cpu')}\n"


def test_a_hint_names_make_in_a_checkout_and_pip_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    monkeypatch.chdir(ROOT)
    assert cli.install("train") == "make setup EXTRA=train"
    assert cli.install("cpu,train") == "make setup EXTRA='cpu train'"
    monkeypatch.setattr(sys, "prefix", "/other")
    assert cli.install("train") == "make setup EXTRA=train VENV=/other"
    monkeypatch.chdir(tmp_path)
    assert cli.install("train") == f"make -C {ROOT} setup EXTRA=train VENV=/other"
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.install("train") == "pip install 'rtap[train]'"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ask", "--treshold", "1", "hi"], "unrecognized arguments: --treshold (did you mean --threshold?)"),
        (["ask"], "the following arguments are required: question"),
        (["ask", "hi", "--threshold", "3"], "argument --threshold: '3' must be a number from 0 to 1"),
        (["chat", "--max-cycles", "0"], "argument --max-cycles: '0' must be a whole number of at least 1"),
    ],
)
def test_wrong_flags_of_ask_and_chat_are_one_sentence(arguments: list[str], sentence: str) -> None:
    result = rtap(*arguments)
    assert result.returncode == 2
    assert result.stderr == (f"rtap {arguments[0]}: {sentence}; `rtap {arguments[0]} --help` lists the flags\n")


@pytest.mark.parametrize("name", ["ask", "chat", "doctor", "models", "serve", "train", "eval", "calibrate"])
def test_the_help_of_every_command_takes_under_a_second(name: str) -> None:
    def show() -> None:
        result = rtap(name, "--help", path=ROOT / "server")
        assert result.returncode == 0, result.stderr

    assert child_cpu_seconds(show) < 1
