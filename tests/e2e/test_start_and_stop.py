"""Start-up: how long and how much memory; mistakes are one sentence. Stop: a signal ends everything, exit code 0."""

import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from tests.e2e.conftest import ENVIRONMENT, MODELS, ROOT, free_port, rtap_command, running
from tests.e2e.other_checkpoints import save_think


def _fails(*flags: str) -> str:
    """What a start that must fail prints."""
    done = subprocess.run(
        [sys.executable, "-m", "server", *flags], capture_output=True, text=True, timeout=180, cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return next(line for line in reversed(done.stderr.splitlines()) if line.startswith("rtap serve: "))


def test_ready_in_time_and_within_memory(server):
    assert server.start_seconds < 90
    process = psutil.Process(server.process.pid)
    resident = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    assert resident < 6 * 2**30


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["/nowhere/model"], "no model at /nowhere/model: give a folder with a config.json"),
        (["--confidence-model", str(MODELS / "policy")], "is no confidence generator"),
        (["--trajectory-format", "xml"], "unknown trajectory format 'xml'"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_sentence(flags, sentence):
    assert sentence in _fails(*flags)


def test_a_format_that_the_model_has_no_tokens_for_is_refused(tmp_path):
    sentence = _fails(str(save_think("policy", tmp_path / "policy")), "--trajectory-format", "rtap")
    assert "has no tokens <answer> </answer>, so it does not write the 'rtap' format" in sentence
    assert "its config.json says 'think'" in sentence


def test_a_generator_with_another_tokenizer_is_refused(tmp_path):
    other = tmp_path / "confidence"
    shutil.copytree(MODELS / "confidence", other)
    text = (other / "tokenizer.json").read_text()
    assert "<answer>" in text
    (other / "tokenizer.json").write_text(text.replace("<answer>", "<reply>"))
    assert "have different tokenizers" in _fails("--confidence-model", str(other))


def test_a_remote_generator_that_is_not_there_is_refused():
    address = f"http://127.0.0.1:{free_port()}"
    assert f"no vLLM classify server answers at {address}" in _fails("--confidence-model", address)


def test_a_signal_ends_all_processes_with_exit_code_0(tmp_path):
    port = free_port()
    with running(rtap_command(port, "--confidence", "none"), port, "/ready", tmp_path) as started:
        children = psutil.Process(started.process.pid).children(recursive=True)
        assert children
        assert httpx.get(f"{started.url}/v1/rtap/config").json()["defaults"]["policy"] == "model"
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(30) == 0
        deadline = time.monotonic() + 10
        while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
            assert time.monotonic() < deadline, children
            time.sleep(0.1)


def test_a_signal_while_loading_takes_the_engines_along():
    process = subprocess.Popen(
        rtap_command(free_port()), cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL
    )
    parent, began = psutil.Process(process.pid), time.monotonic()
    while len(children := parent.children(recursive=True)) < 3:  # both engines and multiprocessing's own helper
        assert time.monotonic() - began < 120
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 30
    while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)
