"""Cold start and ``demo-confidence`` end to end on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rtap_training.__main__ import main

BUNDLED_POLICY = Path(__file__).parents[2] / "deploy" / "models" / "policy"
TINY = ["--hidden-size", "32", "--num-layers", "2", "--num-heads", "2", "--num-kv-heads", "1", "--ffn-size", "64"]
SPEED = ["--batch-tokens", "512", "--threads", "1"]
BUNDLED_TASKS = ["--tasks", "countdown=0.6,arithmetic=0.4"]  # what the bundled policy was trained on


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    assert main(["demo-start", "--output", str(folder / "start"), "--num-texts", "3000", *TINY]) == 0
    flags = ["--policy", str(folder / "start"), "--data", str(folder / "start" / "texts.jsonl")]
    rates = ["--matrix-rate", "0.05", "--learning-rate", "0.01", "--batch-size", "20", "--micro-batch", "20"]
    assert main(["sft", *flags, *rates, "--output", str(folder / "policy")]) == 0
    return folder / "policy"


def test_a_cold_start_writes_a_loadable_bf16_checkpoint_and_its_story(policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert model.dtype == torch.bfloat16
    assert model.config.rtap == {"format": "rtap"}
    record = json.loads((policy / "manifest.json").read_text())
    assert record["command"] == "rtap train sft"
    assert record["figures"]["step"] == 150
    log = (policy.parent / "policy.run" / "train.jsonl").read_text()
    losses = [line["loss"] for line in map(json.loads, log.splitlines()) if "loss" in line]
    assert losses[-1] < losses[0] - 3


def test_a_policy_that_is_never_right_is_refused(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--policy", str(policy), "--output", str(tmp_path / "confidence"), "--questions", "12", "--samples", "2"]
    # Countdown alone: a puzzle of two people is guessed right every fourth time.
    assert main(["demo-confidence", *flags, *SPEED, "--tasks", "countdown"]) == 2
    assert "nothing to calibrate on" in capsys.readouterr().err
    assert not (tmp_path / "confidence").exists()


def test_confidence_trains_on_the_policys_own_cycles(tmp_path: Path) -> None:
    output, samples = tmp_path / "confidence", tmp_path / "samples.jsonl"
    flags = ["--policy", str(BUNDLED_POLICY), "--output", str(output), "--samples-file", str(samples)]
    sizes = ["--questions", "60", "--samples", "3", "--eval-questions", "8", *BUNDLED_TASKS]
    assert main(["demo-confidence", *flags, *sizes, "--max-steps", "5", *SPEED]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert (model.config.num_labels, model.dtype) == (1, torch.bfloat16)
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(output).pad_token_id
    block = model.config.rtap
    assert (block["format"], block["kind"]) == ("rtap", "confidence")
    assert 0 < block["threshold"] < 1
    assert len(block["calibration"]["reference"]) == block["calibration"]["bins"] == 20
    assert {"within_auroc", "ece", "brier"} <= set(block["calibration"]["held_out"])
    held_out = json.loads((output / "manifest.json").read_text())["figures"]["held_out"]
    assert set(held_out) == {"countdown", "arithmetic", "all"}
    assert {"best_of_2", "best_of_4", "best_of_8"} <= set(held_out["all"]["choice"])
    run = tmp_path / "confidence.run"
    assert (run / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in run.iterdir()} == {"reliability.png", "train.jsonl", "tensorboard"}
    # Reusing the samples gives the same generator; samples of another setting are refused.
    again = ["--output", str(tmp_path / "again"), "--max-steps", "5", *SPEED]
    assert main(["demo-confidence", *flags[:2], *flags[4:], *sizes, *again]) == 0
    first, second = (tmp_path / n / "model.safetensors" for n in ("confidence", "again"))
    assert first.read_bytes() == second.read_bytes()
    # Another loss from another start, on the same samples.
    other = ["--loss", "pairwise", "--init", "scratch", "--eval-samples", "2", "--output", str(tmp_path / "other")]
    assert main(["demo-confidence", *flags[:2], *flags[4:], *sizes, "--max-steps", "5", *SPEED, *other]) == 0
    assert first.read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()
    assert main(["demo-confidence", *flags, *sizes, "--seed", "9", *SPEED]) == 2
