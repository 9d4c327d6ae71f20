"""The demo's cold start and a generator give the same losses and weights after a kill and a resume."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from psutil import Process, wait_procs

from rtap_training.__main__ import main
from rtap_training.config.settings import run_dir
from rtap_training.run_state import last_complete

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


def losses_of(output: Path) -> list[float | None]:
    lines = map(json.loads, (run_dir(output) / "train.jsonl").read_text().splitlines())
    return [line.get("loss") for line in lines]


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
    assert losses_of(whole / "sft") == losses_of(killed / "sft")
    weights = [(folder / "sft" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1] != (whole / "start" / "model.safetensors").read_bytes()


GENERATOR = [
    f"--policy={BUNDLED_POLICY}", "--questions=countdown", "--num-questions=40", "--eval-questions=12", "--samples=4",
    "--max-cycles=2", "--max-cycle-tokens=64", "--epochs=6", "--batch-size=16", "--learning-rate=1e-4",
    "--save-steps=3",
]  # fmt: skip


@pytest.mark.slow
def test_a_generator_of_sampled_questions_resumes_to_the_last_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["generator", *GENERATOR, f"--output={whole}"]) == 0
    child = subprocess.Popen([sys.executable, "-m", "rtap_training", "generator", *GENERATOR, f"--output={killed}"])
    while last_complete(run_dir(killed), "checkpoint") is None and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not killed.exists()
    with (run_dir(killed) / "train.jsonl").open("a") as log:
        log.write('{"step": 20, "loss"')  # what a kill in the middle of a line leaves
    assert main(["generator", *GENERATOR, f"--output={killed}", "--learning-rate=1e-3"]) == 2
    assert "(learning_rate: was 0.0001, is 0.001)" in capsys.readouterr().err
    file = run_dir(killed) / "samples-fitting.jsonl"
    sampled = file.read_bytes()
    file.write_bytes(sampled[: len(sampled) // 2])  # as if it had been killed while sampling too
    assert main(["generator", *GENERATOR, f"--output={killed}"]) == 0
    assert losses_of(whole) == losses_of(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert not list(run_dir(killed).glob("samples-*"))
