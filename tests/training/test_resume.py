"""The cold start, ``demo-confidence`` and ``generator`` give the same losses and weights after a kill and a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from psutil import Process, wait_procs
from torch import Tensor

from rtap_core.errors import ConfigError
from rtap_training.__main__ import main
from rtap_training.bundled.config import ConfidenceConfig
from rtap_training.bundled.loop import Loop
from rtap_training.bundled.streams import Stream
from rtap_training.config import run_dir
from rtap_training.optim import build_adamw, build_muon
from rtap_training.run_state import States, check_resumable, last_complete, plain
from rtap_training.training_errors import TrainingError

BUNDLED_POLICY = Path(__file__).parents[2] / "deploy" / "models" / "policy"
RECIPE = """
stages:
  - name: start
    command: demo-start
    settings: {num_texts: 240, hidden_size: 32, num_layers: 1, num_heads: 1, num_kv_heads: 1, ffn_size: 32}
  - name: sft
    command: sft
    processes: 2
    settings: {policy: "@start", data: "@start/texts.jsonl", batch_size: 8, micro_batch: 4, matrix_rate: 0.02,
               learning_rate: 2.0e-3, save_steps: 5}
"""


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
def test_a_cold_start_of_two_processes_resumes_to_the_last_bit(tmp_path: Path) -> None:
    recipe, whole, killed = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "killed"
    recipe.write_text(RECIPE)
    flags = ["pipeline", f"--recipe={recipe}", "--folder"]
    assert main([*flags, str(whole)]) == 0
    child = subprocess.Popen([sys.executable, "-m", "rtap_training", *flags, str(killed)])
    while last_complete(run_dir(killed / "sft"), "checkpoint") is None and child.poll() is None:
        time.sleep(0.002)
    workers = Process(child.pid).children(recursive=True)
    child.kill()  # the pipeline alone: its processes must not outlive it
    assert child.wait() == -signal.SIGKILL
    assert len(wait_procs(workers, timeout=60)[0]) == len(workers) >= 2
    assert not (killed / "sft").exists()
    assert main([*flags, str(killed)]) == 0
    first, second = (run_dir(folder / "sft") / "train.jsonl" for folder in (whole, killed))
    losses = [[line.get("loss") for line in map(json.loads, log.read_text().splitlines())] for log in (first, second)]
    assert losses[0] == losses[1]
    weights = [(folder / "sft" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1] != (whole / "start" / "model.safetensors").read_bytes()


CONFIDENCE = [
    f"--policy={BUNDLED_POLICY}", "--tasks=countdown", "--questions=24", "--samples=3", "--eval-questions=3",
    "--eval-samples=2", "--max-cycles=2", "--batch-tokens=256", "--max-steps=40", "--save-steps=3",
]  # fmt: skip


@pytest.mark.slow
def test_confidence_resumes_to_the_last_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["demo-confidence", *CONFIDENCE, f"--output={whole}"]) == 0
    kill_after_a_state("demo-confidence", CONFIDENCE, killed)
    sampled = (run_dir(killed) / "samples.jsonl").read_bytes()
    # As if it had been killed while sampling too: what is missing is sampled again, to the same.
    (run_dir(killed) / "samples.jsonl").write_bytes(sampled[: len(sampled) // 2])
    assert main(["demo-confidence", *CONFIDENCE, f"--output={killed}"]) == 0
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


def run_loop(folder: Path, *, losses: Sequence[float] = (1.0,) * 12) -> Tensor:
    """Train a linear layer for a step a loss, with a state every fourth. Returns its weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    config = ConfidenceConfig(max_steps=len(losses), save_steps=4)
    optimisers = build_muon([("x.layers.0", layer.weight)], matrix_rate=0.1, learning_rate=0.1, weight_decay=0.0)
    stream = Stream(lambda random: [random.random() for _ in range(5)], seed=1)
    states = States(folder, {}, data_sha256="x")
    with Loop("test", config, states, model=layer, optimisers=optimisers, stream=stream) as loop:
        while loop.should_continue():
            factor = losses[loop.summary()["steps"]]
            loop.descend(layer(torch.full((2,), next(stream))).square().sum() * factor, rows=1, tokens=1)
    return layer.weight.detach()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose disk was full while it saved step 8."""
    original = torch.save

    def save(state: dict[str, Any], file: Any) -> None:
        if state.get("steps") == 8:
            file.write(b"some")
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TrainingError, match=r"No space left on device; the last good state is .*state-4"):
        run_loop(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-4"]
    return tmp_path


def test_a_run_continues_from_the_last_good_state_to_the_same_weights(broken: Path, tmp_path: Path) -> None:
    (broken / "state-8").mkdir()  # without its last file
    (broken / "state-8" / "shared.pt").write_bytes(b"half")
    assert last_complete(broken, "state") == broken / "state-4"
    assert run_loop(broken).equal(run_loop(tmp_path / "whole"))
    assert [path.name for path in broken.glob("state-*")] == ["state-12"]


def test_other_data_is_refused(broken: Path) -> None:
    settings = json.loads((broken / "state-4" / "complete.json").read_text())
    (broken / "state-4" / "complete.json").write_text(json.dumps(settings | {"data_sha256": "0"}))
    with pytest.raises(ConfigError, match="was made from other data"):
        run_loop(broken)


def test_another_config_is_refused_by_the_names_of_its_fields(tmp_path: Path) -> None:
    config = ConfidenceConfig(output=tmp_path / "x")
    States(run_dir(config.output), plain(config), data_sha256="x").save(4, {}, {})
    check_resumable(config.output, replace(config, eval_samples=2))
    with pytest.raises(ConfigError, match=r"\(matrix_rate: was 0.002, is 0.5\)"):
        check_resumable(config.output, replace(config, matrix_rate=0.5))


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(broken: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step 6; the last good state is .*state-4\. Try"):
        run_loop(broken, losses=[1.0] * 5 + [float("nan")] * 7)
    assert last_complete(broken, "state") == broken / "state-4"


def test_minutes_used_before_the_kill_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(tmp_path, {}, data_sha256="x")
    layer = torch.nn.Linear(2, 2)

    def loop(minutes: float) -> Loop:
        config = ConfidenceConfig(output=tmp_path / "x", minutes=minutes, save_steps=1)
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
