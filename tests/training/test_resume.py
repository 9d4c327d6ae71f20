"""``sft``, ``confidence`` and ``generator`` give the same losses and weights after a kill and a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rtap_training.__main__ import main
from rtap_training.bundled import sft
from rtap_training.bundled.config import SftConfig
from rtap_training.bundled.loop import Loop
from rtap_training.bundled.streams import Stream
from rtap_training.config import build_config, run_dir
from rtap_training.optim import build_adamw
from rtap_training.run_state import States, last_complete
from rtap_training.training_errors import TrainingError

BUNDLED_POLICY = Path(__file__).parents[2] / "deploy" / "models" / "policy"
SETTINGS: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "ffn_size": 32, "processes": 1,
    "tasks": "countdown", "batch_tokens": 256, "max_steps": 60, "save_steps": 4, "eval_questions": 2,
    "tokenizer": BUNDLED_POLICY,
}  # fmt: skip
ALONE = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
TOGETHER = [*ALONE, "--processes=2"]


def kill_after_a_state(command: str, flags: list[str], output: Path) -> None:
    """Start a run and kill it and its workers with SIGKILL once it has saved a state."""
    arguments = [sys.executable, "-m", "rtap_training", command, *flags, f"--output={output}"]
    child = subprocess.Popen(arguments, start_new_session=True)
    deadline = time.monotonic() + 240
    while last_complete(run_dir(output), "state") is None and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert last_complete(run_dir(output), "state") is not None
    assert not output.exists()
    with (run_dir(output) / "train.jsonl").open("a") as log:
        log.write('{"step": 20, "loss"')  # what a kill in the middle of a line leaves


def curve(output: Path) -> list[dict[str, float]]:
    """Logged figures that do not depend on the clock."""
    lines = [json.loads(line) for line in (run_dir(output) / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    assert curve(first) == curve(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert {p.name for p in run_dir(second).iterdir()} >= {"train.jsonl", "tensorboard"}
    assert last_complete(run_dir(second), "state") is None


@pytest.mark.slow
def test_sft_of_two_processes_resumes_to_the_last_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["demo-sft", *TOGETHER, f"--output={whole}"]) == 0
    assert [line["step"] for line in curve(whole)] == [20, 40, 60]
    kill_after_a_state("demo-sft", TOGETHER, killed)
    assert main(["demo-sft", *TOGETHER, f"--output={killed}"]) == 0
    assert_same_run(whole, killed)


GENERATOR = [
    f"--policy={BUNDLED_POLICY}", "--questions=countdown", "--num-questions=20", "--eval-questions=3", "--samples=3",
    "--max-cycles=1", "--max-cycle-tokens=48", "--epochs=6", "--questions-per-step=4", "--learning-rate=1e-4",
    "--save-steps=3",
]  # fmt: skip


@pytest.mark.slow
def test_a_generator_for_a_users_model_resumes_to_the_last_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["generator", *GENERATOR, f"--output={whole}"]) == 0
    assert [line["step"] for line in curve(whole)] == [20, 24]
    kill_after_a_state("generator", GENERATOR, killed)
    assert main(["generator", *GENERATOR, f"--output={killed}", "--learning-rate=1e-3"]) == 2
    assert "(learning_rate: was 0.0001, is 0.001)" in capsys.readouterr().err
    file = run_dir(killed) / "samples-fitting.jsonl"
    sampled = file.read_bytes()
    file.write_bytes(sampled[: len(sampled) // 2])  # as if it had been killed while sampling too
    assert main(["generator", *GENERATOR, f"--output={killed}"]) == 0
    assert_same_run(whole, killed)
    assert not list(run_dir(killed).glob("samples-*"))


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run whose disk was full while it saved step 12."""
    original = torch.save

    def save(state: dict[str, Any], file: Any) -> None:
        if state.get("steps") == 12:
            file.write(b"some")
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    assert main(["demo-sft", *ALONE, f"--output={tmp_path / 'policy'}"]) == 2
    monkeypatch.undo()
    folder = tmp_path / "policy.run"
    assert f"No space left on device; the last good state is {folder / 'state-8'}" in capsys.readouterr().err
    assert [p.name for p in folder.glob("state-*")] == ["state-8"]
    return tmp_path / "policy"


def test_another_config_is_refused_by_the_names_of_its_fields(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo-sft", *ALONE, f"--output={broken}", "--matrix-rate=0.5", "--eval-questions=3"]) == 2
    assert "(matrix_rate: was 0.02, is 0.5)" in capsys.readouterr().err
    settings = json.loads((run_dir(broken) / "state-8" / "complete.json").read_text())
    (run_dir(broken) / "state-8" / "complete.json").write_text(json.dumps(settings | {"data_sha256": "0"}))
    assert main(["demo-sft", *ALONE, f"--output={broken}"]) == 2
    assert "was made from other data" in capsys.readouterr().err


def test_a_state_without_its_last_file_is_not_used(broken: Path) -> None:
    (run_dir(broken) / "state-12").mkdir()
    (run_dir(broken) / "state-12" / "shared.pt").write_bytes(b"half")
    assert last_complete(run_dir(broken), "state") == run_dir(broken) / "state-8"
    assert main(["demo-sft", *ALONE, f"--output={broken}"]) == 0
    assert [line["step"] for line in curve(broken)] == [20, 40, 60]
    assert not list(run_dir(broken).glob("state-*"))


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sft.policy_loss
    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(sft, "policy_loss", lambda *given: original(*given) * next(losses))
    config = build_config(SftConfig, None, {"output": broken} | SETTINGS)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 10; the last good state is .*state-8\. Try"):
        sft.run(config)
    assert last_complete(run_dir(broken), "state") == run_dir(broken) / "state-8"


def test_minutes_used_before_the_kill_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(tmp_path, {}, data_sha256="x")
    layer = torch.nn.Linear(2, 2)

    def loop(minutes: float) -> Loop:
        config = SftConfig(output=tmp_path / "x", minutes=minutes, save_steps=1)
        optimisers = [build_adamw(layer.parameters(), learning_rate=0.1, weight_decay=0.0)]
        return Loop("test", config, states, model=layer, optimisers=optimisers, stream=Stream(lambda _: [0], seed=1))

    with loop(minutes=1) as first:
        assert first.should_continue()
        first.descend(layer(torch.ones(2)).sum(), rows=1, tokens=1)
        monkeypatch.setattr("rtap_training.optim.monotonic", lambda: time.monotonic() + 57)
        assert first.should_continue()
    monkeypatch.undo()
    with loop(minutes=1) as second:
        assert 56.9 < second.summary()["seconds"] < 60
        assert second.should_continue()
        monkeypatch.setattr("rtap_training.optim.monotonic", lambda: time.monotonic() + 4)
        assert not second.should_continue()
