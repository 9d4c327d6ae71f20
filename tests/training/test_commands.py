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


def sft(output: Path, steps: int, *more: str) -> None:
    flags = ["--output", str(output), "--max-steps", str(steps), "--eval-questions", "4", *TINY, *SPEED, *more]
    assert main(["demo-sft", *flags]) == 0


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "policy"
    sft(output, 150, "--processes", "1", "--matrix-rate", "0.05", "--learning-rate", "0.01")
    return output


def test_sft_writes_a_loadable_bf16_checkpoint_and_its_story(policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert model.dtype == torch.bfloat16
    assert model.config.rtap == {"format": "rtap"}
    record = json.loads((policy / "manifest.json").read_text())
    assert record["command"] == "rtap train demo-sft"
    assert record["figures"]["steps"] == 150
    assert set(record["figures"]["held_out"]) == {"countdown", "arithmetic", "knights"}
    losses = [
        json.loads(line)["loss"] for line in (policy.parent / "policy.run" / "train.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_two_processes_give_one_model(tmp_path: Path) -> None:
    sft(tmp_path / "policy", 2, "--processes", "2", "--tasks", "countdown", "--tokenizer", str(BUNDLED_POLICY))
    assert json.loads((tmp_path / "policy" / "manifest.json").read_text())["figures"]["steps"] == 2
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_training_can_go_on_from_a_checkpoint(policy: Path, tmp_path: Path) -> None:
    sft(tmp_path / "next", 2, "--processes", "1", "--initial", str(policy))
    losses = json.loads((tmp_path / "next" / "manifest.json").read_text())["figures"]
    assert losses["loss"] < 5  # a fresh model starts at log(448) = 6.1
    assert (tmp_path / "next" / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()


def test_a_fresh_student_shares_its_teachers_token_ids(tmp_path: Path) -> None:
    sft(tmp_path / "student", 2, "--processes", "1", "--tokenizer", str(BUNDLED_POLICY))
    figures = json.loads((tmp_path / "student" / "manifest.json").read_text())["figures"]
    assert figures["loss"] > 5  # fresh weights start at log(448) = 6.1
    model, teacher = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "student", BUNDLED_POLICY))
    assert model.get_vocab() == teacher.get_vocab()
    assert model.chat_template == teacher.chat_template


def test_a_tokenizer_that_cannot_write_cycles_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output", str(tmp_path / "student"), "--processes", "1", "--tokenizer"]
    assert main(["demo-sft", *flags, str(tmp_path), "--processes", "2"]) == 2  # a worker's error is the command's
    assert "has no tokenizer" in capsys.readouterr().err
    text = (BUNDLED_POLICY / "tokenizer.json").read_text().replace("</answer>", "</result>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text((BUNDLED_POLICY / "tokenizer_config.json").read_text())
    assert main(["demo-sft", *flags, str(tmp_path)]) == 2
    assert "lacks the tokens </answer>" in capsys.readouterr().err


def test_a_generator_of_the_demo_learns_from_its_policys_cycles_and_corrupted_workings(tmp_path: Path) -> None:
    output = tmp_path / "confidence"
    flags = ["--policy", str(BUNDLED_POLICY), "--questions", "countdown=0.6,arithmetic=0.4", "--samples", "3",
             "--num-questions", "60", "--eval-questions", "16", "--max-cycle-tokens", "96", "--corruptions", "20",
             "--epochs", "1", "--learning-rate", "1e-4"]  # fmt: skip
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
