"""The demo's commands end to end on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rtap_training.__main__ import main

BUNDLED_POLICY = Path(__file__).parents[2] / "deploy" / "models" / "policy"
TINY = ["--hidden-size", "32", "--num-layers", "2", "--num-heads", "2", "--num-kv-heads", "1", "--ffn-size", "64"]
SPEED = ["--batch-tokens", "512", "--threads", "1"]


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


def test_a_generator_of_the_demo_learns_from_its_policys_cycles_and_corrupted_workings(tmp_path: Path) -> None:
    output = tmp_path / "confidence"
    flags = ["--policy", str(BUNDLED_POLICY), "--questions", "countdown=0.6,arithmetic=0.4", "--samples", "3",
             "--num-questions", "60", "--eval-questions", "16", "--max-cycle-tokens", "96", "--corruptions", "20",
             "--epochs", "1", "--learning-rate", "1e-4", "--matrix-rate", "2e-4"]  # fmt: skip
    assert main(["generator", "--output", str(output), *flags]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert (model.config.num_labels, model.dtype) == (1, torch.bfloat16)
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(output).pad_token_id
    block = model.config.rtap
    assert (block["format"], block["kind"]) == ("rtap", "confidence")
    assert 0 < block["threshold"] < 1
    assert block["logistic"]["log_tokens"] != 0  # joined with the log-probabilities of the sampled tokens
    assert len(block["calibration"]["reference"]) == block["calibration"]["bins"] == 20
    assert {"within_auroc", "ece", "brier"} <= set(block["calibration"]["held_out"])
    held_out = json.loads((output / "manifest.json").read_text())["figures"]["held_out"]
    assert set(held_out) == {"countdown", "arithmetic", "all"}
    run = tmp_path / "confidence.run"
    assert (run / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("samples-*"))
