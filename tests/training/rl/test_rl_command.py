"""RL command on a tiny policy in one process, without vLLM: outputs, resuming, refusals.

The runs test mechanics, not learning; docs/results/training.md has results.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from rtap_core.adapters import merge_adapter, read_backbone
from rtap_core.errors import ConfigError
from rtap_training.config.rl import GrpoConfig, KdrlConfig, RladConfig, RlConfig, RtapConfig
from rtap_training.data.questions import load_questions
from rtap_training.models.huggingface import load_tokenizer
from rtap_training.models.loading import load_for_training
from rtap_training.models.teacher import LocalTeacher
from rtap_training.rl import command
from rtap_training.rl.checkpoints import last_checkpoint
from rtap_training.rl.lockstep import Completion
from rtap_training.tasks.base import Split
from rtap_training.training_errors import TeacherError, TrainingError
from tests.other_checkpoints import save_generator_adapter
from tests.training.rl.tiny import BUNDLED, save_policy

SMALL = {
    "max_steps": 4, "save_steps": 2, "questions_per_step": 2, "group_size": 4, "micro_batch": 4, "num_questions": 16,
    "max_tokens": 48, "length_cache": 16, "max_cycle_tokens": 20, "num_iterations": 2, "learning_rate": 1e-3,
}  # fmt: skip
RECURSIVE = SMALL | {
    "max_tokens": 200, "max_cycle_tokens": 80, "max_cycles": 3, "learning_rate": 1e-4, "generator_rate": 1e-4,
    "generator_iterations": 2, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "model", seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("teacher") / "model", seed=2)


def curve(config: RlConfig) -> list[dict[str, float]]:
    """Logged figures that do not depend on the clock."""
    lines = [json.loads(line) for line in (config.run_dir / "train.jsonl").read_text().splitlines()]
    keep = ("step", "loss", "grad_norm", "reward", "entropy", "kl", "clip_ratio/region_mean", "generator/loss")
    return [{k: line[k] for k in keep if k in line} for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RtapConfig:
    """On the bundled models: an untrained policy never completes a cycle, so nothing recurs."""
    config = RtapConfig(
        policy=BUNDLED / "policy", confidence=BUNDLED / "confidence", output=tmp_path_factory.mktemp("rtap") / "out",
        **RECURSIVE,
    )  # fmt: skip
    command.run(config)
    return config


def test_policy_and_generator_are_written_in_the_layout_of_the_server(finished: RtapConfig) -> None:
    config = json.loads((finished.output / "config.json").read_text())
    assert (config["dtype"], config["rtap"]) == ("bfloat16", {"format": "rtap", "recursion": "continue"})
    assert isinstance(load_tokenizer(finished.output), PreTrainedTokenizerFast)
    beside = finished.output.with_name("out-confidence")
    generator = Qwen3ForSequenceClassification.from_pretrained(beside).config
    assert generator.num_labels == 1
    assert generator.rtap == {"format": "rtap", "kind": "confidence"}  # what was fitted to the policy before is gone
    assert {"model.safetensors", "tokenizer.json", "manifest.json"} <= {p.name for p in beside.iterdir()}


def test_manifest_tells_how_the_checkpoint_came_about(finished: RtapConfig) -> None:
    record = json.loads((finished.output / "manifest.json").read_text())
    assert record["command"] == "rtap train rtap"
    assert record["config"]["policy"] == str(finished.policy)
    assert len(record["data_sha256"]) == 64
    assert {"torch", "transformers", "trl", "accelerate", "python"} <= set(record["versions"])


def test_logs_hold_every_reward_and_the_rollouts_figures(finished: RtapConfig) -> None:
    first = json.loads((finished.run_dir / "train.jsonl").read_text().splitlines()[0])
    wanted = {f"rewards/{name}/mean" for name in ("increase", "final", "format", "answer", "length")}
    wanted |= {"cycles/mean", "cycles/first_right", "oops/per_1000_tokens", "confidence/brier"}
    shares = [first[f"advantage_share/{name}"] for name in ("increase", "final", "format", "answer", "length")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)
    assert wanted <= set(first)
    assert first["cycles/mean"] > 1
    assert list((finished.run_dir / "tensorboard").glob("events.*"))


def test_policy_and_generator_have_moved(finished: RtapConfig) -> None:
    for before, after in ((finished.policy, finished.output), (finished.confidence, f"{finished.output}-confidence")):
        kind = Qwen3ForCausalLM if before == finished.policy else Qwen3ForSequenceClassification
        a, b = kind.from_pretrained(before), kind.from_pretrained(after)
        assert not all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_lora_writes_an_adapter_and_merge_the_same_model_as_a_checkpoint(tmp_path: Path) -> None:
    policy = BUNDLED / "policy"
    settings = SMALL | {"max_steps": 2, "beta": 0.04, "lora_rank": 4, "policy": str(policy), "questions_per_step": 4,
                        "max_tokens": 80, "max_cycle_tokens": 80}  # fmt: skip
    adapter = GrpoConfig(output=tmp_path / "a", **settings)
    whole = GrpoConfig(output=tmp_path / "b", merge=True, **settings)
    command.run(adapter)
    assert curve(adapter)[0]["kl"] == 0  # the reference is the model without the adapter, which begins as nothing
    described = json.loads((adapter.output / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["r"]) == (str(policy), 4)
    written = {path.name for path in adapter.output.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "manifest.json"} <= written
    command.run(whole)
    base = Qwen3ForCausalLM.from_pretrained(policy)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    joined = PeftModel.from_pretrained(base, adapter.output).merge_and_unload().state_dict()
    merged = Qwen3ForCausalLM.from_pretrained(whole.output, dtype=torch.bfloat16).state_dict()
    assert all(value.equal(joined[name].bfloat16()) for name, value in merged.items())
    assert not all(joined[name].equal(value) for name, value in before.items())


def test_a_generator_that_is_an_adapter_is_trained_and_written_as_one(tmp_path: Path) -> None:
    generator = save_generator_adapter(tmp_path / "generator")
    settings = RECURSIVE | {"max_steps": 2, "bf16": True, "policy": BUNDLED / "policy", "confidence": generator}
    config = RtapConfig(output=tmp_path / "out", **settings)
    command.run(config)
    state = torch.load(last_checkpoint(config.run_dir) / "generator.pt", weights_only=True)
    assert all("lora_" in name or "score" in name for name in state["model"])  # no frozen backbone
    written = tmp_path / "out-confidence"
    assert read_backbone(written) == str(BUNDLED / "policy")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (generator, written))
    assert before.keys() == after.keys()
    assert not all(weight.bfloat16().equal(after[name]) for name, weight in before.items())
    block = json.loads((written / "config.json").read_text())["rtap"]
    assert block == {"kind": "confidence", "input": "token_ids"}
    assert merge_adapter(written, read_backbone(written)).num_labels == 1


def test_a_generator_that_reads_chats_is_refused(tmp_path: Path) -> None:
    generator = save_generator_adapter(tmp_path / "generator")
    config = json.loads((generator / "config.json").read_text())
    config["rtap"]["input"] = "chat"
    (generator / "config.json").write_text(json.dumps(config))
    settings = RECURSIVE | {"policy": BUNDLED / "policy", "confidence": generator, "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match="reads chats: train one of this policy, without backbone"):
        command.run(RtapConfig(**settings))


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_curve(finished: RtapConfig, tmp_path: Path) -> None:
    """After kill -9 the second run resumes from the first checkpoint, log included."""
    config = replace(finished, output=tmp_path / "out")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RECURSIVE.items()]
    flags += [f"--policy={config.policy}", f"--confidence={config.confidence}", f"--output={config.output}"]
    child = subprocess.Popen([sys.executable, "-m", "rtap_training", "rtap", *flags], env=os.environ)
    deadline = time.monotonic() + 240
    while last_checkpoint(config.run_dir) is None and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert last_checkpoint(config.run_dir) is not None
    with (config.run_dir / "train.jsonl").open("a") as log:
        log.write('{"step": 4, "loss"')  # what a kill in the middle of a line leaves
    command.run(config)
    assert curve(config) == curve(finished)
    resumed = Qwen3ForCausalLM.from_pretrained(config.output).state_dict()
    whole = Qwen3ForCausalLM.from_pretrained(finished.output).state_dict()
    assert all(resumed[name].equal(whole[name]) for name in whole)


def test_a_checkpoint_without_its_last_file_is_not_used(finished: RtapConfig, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(finished.run_dir) == finished.run_dir / "checkpoint-4"


def test_resuming_with_other_settings_is_refused(finished: RtapConfig) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate: was 0\.0001, is 0\.002"):
        command.run(replace(finished, learning_rate=2e-3))


def first_update(config: RlConfig) -> dict[str, float]:
    command.run(config)
    return curve(config)[0]


def test_alpha_one_is_grpo_and_a_teacher_changes_the_update(teacher: Path, tmp_path: Path) -> None:
    common = SMALL | {"policy": BUNDLED / "policy", "num_iterations": 1, "max_steps": 1, "save_steps": 1,
                      "questions_per_step": 4, "max_tokens": 80, "max_cycle_tokens": 80}  # fmt: skip
    grpo = first_update(GrpoConfig(output=tmp_path / "grpo", **common))
    assert grpo["grad_norm"] > 0
    same = first_update(RladConfig(output=tmp_path / "one", teacher=str(teacher), alpha=1.0, **common))
    assert same["grad_norm"] == grpo["grad_norm"]
    half = first_update(RladConfig(output=tmp_path / "half", teacher=str(teacher), **common))
    assert half["grad_norm"] != grpo["grad_norm"]
    kdrl = first_update(KdrlConfig(output=tmp_path / "kdrl", teacher=str(teacher), **common))
    assert kdrl["grad_norm"] not in (grpo["grad_norm"], half["grad_norm"])


@pytest.mark.parametrize("boundary_advantage", [0.0, 1.0])
def test_rows_that_the_teacher_need_not_score_change_no_update(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boundary_advantage: float
) -> None:
    common = RECURSIVE | {"policy": BUNDLED / "policy", "teacher": str(teacher), "questions_per_step": 4,
                          "boundary_advantage": boundary_advantage}  # fmt: skip
    rows: list[int] = []
    original = LocalTeacher.logps

    def count(self: LocalTeacher, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        rows.append(ids.size(0))
        return original(self, ids, mask, keep)

    monkeypatch.setattr(LocalTeacher, "logps", count)
    some = RladConfig(output=tmp_path / "some", **common)
    command.run(some)
    logged = [json.loads(line) for line in (some.run_dir / "train.jsonl").read_text().splitlines()]
    shares = [line["teacher/scored"] for line in logged if "teacher/scored" in line]
    assert [16 * share for share in shares if share] == rows  # without a row to score the teacher is not called
    assert (len(shares), min(shares) < 1) == (2, True)
    monkeypatch.setattr("rtap_training.rl.trainer.needs_teacher", lambda _, __, mask: torch.ones(mask.size(0)) > 0)
    monkeypatch.setattr("rtap_training.rl.trainer.distinct_rows", lambda ids, _: (torch.arange(len(ids)),) * 2)
    rows.clear()
    everything = RladConfig(output=tmp_path / "all", **common)
    command.run(everything)
    assert rows == [16, 16]
    assert curve(some)[0]["grad_norm"] > 0
    for less, more in zip(curve(some), curve(everything), strict=True):
        assert less == pytest.approx(more, rel=1e-4, abs=1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_the_checkpoint(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GrpoConfig(policy=policy, output=tmp_path / "out", **SMALL)
    questions = load_questions("countdown", Split.TRAIN, seed=1, count=16)
    trainer = command.build_trainer(config, load_for_training(policy), questions)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    # What it wrote before it broke: weights that are NaN cannot be sampled from.
    monkeypatch.setattr(trainer, "_generate_batch", lambda requests, _: [Completion([5, 6], None) for _ in requests])
    with pytest.raises(TrainingError, match="the loss is nan at update 1; no checkpoint was saved yet"):
        trainer.train()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    finished: RtapConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(finished, output=tmp_path / "out")
    saves: list[str] = []
    original = torch.save

    def save(state: object, path: object) -> None:
        saves.append(str(path))
        if str(path).endswith("generator.pt") and "checkpoint-4" in str(path):
            raise RuntimeError("No space left on device")
        original(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TrainingError, match=r"cannot save update 4: No space left.*checkpoint-2"):
        command.run(config)
    assert last_checkpoint(config.run_dir) == config.run_dir / "checkpoint-2"


def test_a_teacher_with_other_tokens_is_refused(policy: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(policy)
    tokenizer.add_tokens(["<extra>"])
    other = save_policy(tmp_path / "student", seed=1)
    tokenizer.save_pretrained(other)
    config = RladConfig(policy=other, teacher=str(policy), output=tmp_path / "out", **SMALL)
    with pytest.raises(TeacherError, match="id 448 is '<extra>' to the student and None to the teacher"):
        command.run(config)


def test_a_missing_teacher_is_a_sentence(policy: Path, tmp_path: Path) -> None:
    config = RladConfig(policy=policy, teacher=str(tmp_path / "none"), output=tmp_path / "out", **SMALL)
    with pytest.raises(TeacherError, match="cannot load the teacher"):
        command.run(config)
