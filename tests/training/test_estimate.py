"""Expected peak memory of training runs: exact bytes of parameters, formulas against autograd, sums against runs."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rtap_training import estimate as module
from rtap_training.__main__ import main
from rtap_training.config.generator import GeneratorConfig
from rtap_training.config.rl import CONFIGS, GrpoConfig, RladConfig, RlConfig, RtapConfig
from rtap_training.config.sft import SftConfig
from rtap_training.data.trajectories import kept_trajectories
from rtap_training.estimate import Launch, MetaModel, Parts, estimate
from rtap_training.models.huggingface import load_tokenizer, save_checkpoint
from rtap_training.models.loading import load_dialect, lora_config
from rtap_training.models.online_generator import train_in_fp32
from tests.other_checkpoints import save_generator_adapter
from tests.training.rl.tiny import BUNDLED, save_generator, save_policy
from tests.training.rl.tiny_vlm import save_vlm
from tests.training.test_generator import kept_samples

Config = SftConfig | GeneratorConfig | RlConfig
CPU = Launch()
SHAPE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
MOE: dict[str, Any] = SHAPE | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
SMOLLM = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
QWEN = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "model", seed=1)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled policy with random weights, which writes to its limit."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BUNDLED / "policy"))
    folder = tmp_path_factory.mktemp("untrained") / "model"
    save_checkpoint(folder, model, load_tokenizer(BUNDLED / "policy"), {})
    return folder


def sft(policy: Path, **settings: Any) -> SftConfig:
    return replace(SftConfig(policy=str(policy), data="rows.jsonl", max_length=64), **settings)


def peak(config: Config, launch: Launch = CPU) -> float:
    return max(sum(parts.values()) for parts in estimate(config, launch).values())


def updating(config: Config, launch: Launch = CPU) -> Parts:
    return estimate(config, launch)["updating"]


def test_parameters_gradients_and_optimiser_are_exact(policy: Path) -> None:
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(policy).parameters())
    parts = updating(sft(policy))
    assert parts["policy: weights"] == parts["policy: gradients"] == 4 * count
    assert parts["policy: AdamW"] == 8 * count


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        (LlamaConfig(**SHAPE), 0),
        (LlamaConfig(**SHAPE), 4),
        (Qwen2Config(**SHAPE), 0),
        (Qwen3Config(**SHAPE, head_dim=32), 0),
        (Qwen3Config(**SHAPE, head_dim=32), 4),
        (Qwen3MoeConfig(**MOE), 0),
    ],
    ids=["llama", "llama lora", "qwen2", "qwen3", "qwen3 lora", "experts"],
)
def test_activations_are_near_what_autograd_saves(shape: PreTrainedConfig, rank: int, bf16: bool) -> None:
    dtype = torch.bfloat16 if rank and bf16 else torch.float32
    model: Any = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    body = model.model
    if rank:
        model = get_peft_model(model, lora_config(rank))
        train_in_fp32(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(4, 128, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # with padding, keys and values are repeated for all heads
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    expected = sum(storage.nbytes() for storage in saved.values())
    assert MetaModel(model, bf16).activations(ids.numel()) == pytest.approx(expected, rel=0.1)


def measured_peak(argv: list[str]) -> int:
    """Largest sum of the bytes that torch holds during a command."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert main(argv) == 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


@pytest.mark.parametrize("rank", [0, 8])
def test_a_supervised_run_uses_the_estimate(untrained: Path, tmp_path: Path, rank: int) -> None:
    texts = [("1 2 3 4 " * 8, "5 6 7 8 " * 8), ("1 2 3 4 " * 8, "5 6 7 8 " * 7)]  # padded, so that a mask is used
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows * 8))
    encode = load_dialect(untrained)[2].encode
    length = len(encode(texts[0][0])) + len(encode(texts[0][1])) + 1
    config = sft(untrained, lora_rank=rank, batch_size=8, micro_batch=4, max_length=length)
    flags = ["--policy", str(untrained), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    sizes = ["--batch-size", "8", "--micro-batch", "4", "--max-length", str(length), "--lora-rank", str(rank)]
    assert measured_peak(["sft", *flags, *sizes]) == pytest.approx(peak(config), rel=0.1)


def test_a_generators_run_uses_the_estimate(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = kept_samples(tmp_path / "samples.jsonl")
    _, _, dialect = load_dialect(untrained)
    turns = [turn for _, rows in kept_trajectories(dialect, samples) for turn in rows]
    longest = max(len(turn.prompt_ids) + len(turn.cycles[0].ids) for turn in turns)
    monkeypatch.setattr(module, "PROMPT_TOKENS", longest - 8)
    config = GeneratorConfig(policy=str(untrained), samples_file=samples, max_cycle_tokens=8, micro_batch=16)
    flags = ["--policy", str(untrained), "--samples-file", str(samples), "--output", str(tmp_path / "out")]
    sizes = ["--micro-batch", "16", "--epochs", "1"]
    assert measured_peak(["generator", *flags, *sizes]) == pytest.approx(peak(config), rel=0.15)


def test_a_run_of_reinforcement_learning_uses_at_most_the_estimate(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROMPT_TOKENS", 24)
    settings: dict[str, Any] = {
        "questions_per_step": 2, "group_size": 8, "micro_batch": 8, "num_iterations": 2, "max_steps": 2,
        "save_steps": 2, "num_questions": 2, "max_tokens": 48, "length_cache": 16, "beta": 0.1,
    }  # fmt: skip
    config = GrpoConfig(policy=str(untrained), **settings)
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    argv = ["grpo", "--policy", str(untrained), "--output", str(tmp_path / "out"), *flags]
    assert 0.7 < measured_peak(argv) / peak(config) < 1.05  # rows that end early need less


@pytest.mark.parametrize(("shape", "rank", "measured"), [(SMOLLM, 16, 1.67), (SMOLLM, 0, 3.04), (QWEN, 16, 4.37)])
def test_it_is_near_what_runs_of_real_models_used(
    tmp_path: Path, shape: PreTrainedConfig, rank: int, measured: float
) -> None:
    """GiB in use of docs/results/memory.md."""
    shape.save_pretrained(tmp_path)
    config = sft(tmp_path, lora_rank=rank, batch_size=4, micro_batch=2, max_length=256)
    assert peak(config) / 2**30 == pytest.approx(measured, rel=0.1)


def test_the_flags_that_save_memory_lower_the_estimate(policy: Path) -> None:
    full, gpu = sft(BUNDLED / "policy"), Launch(is_gpu=True)
    assert peak(replace(full, lora_rank=2)) < peak(full)
    assert peak(replace(full, lora_rank=2, bf16=True), gpu) < peak(replace(full, lora_rank=2), gpu)
    assert peak(replace(full, micro_batch=4)) < peak(full)
    assert peak(replace(full, gradient_checkpointing=True)) < peak(full)
    assert peak(full, gpu) < peak(full)
    shallow = GeneratorConfig(policy=str(BUNDLED / "policy"), questions="countdown", num_layers=1)
    assert peak(shallow) < peak(replace(shallow, num_layers=0))


def test_more_shards_hold_less_and_copies_do_not(policy: Path) -> None:
    config = sft(policy, batch_size=64)
    one, two, four = (updating(config, Launch(processes=n, shards=n)) for n in (1, 2, 4))
    for name in ("policy: weights", "policy: gradients", "policy: AdamW"):
        assert one[name] == 2 * two[name] == 4 * four[name]
    assert sum(four.values()) < sum(two.values())
    copied = updating(config, Launch(processes=2))
    assert copied["policy: weights"] == one["policy: weights"]
    assert copied["policy: gradients"] == 2 * one["policy: gradients"]  # and the buckets


def test_reinforcement_learning_holds_generator_reference_and_teacher(policy: Path, tmp_path: Path) -> None:
    generator = save_generator(tmp_path / "generator", policy, seed=3)
    judge = sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(generator).parameters())
    small: dict[str, Any] = {"policy": str(policy), "max_tokens": 64, "length_cache": 8}
    rtap = updating(RtapConfig(**small, confidence=generator))
    assert rtap["generator: weights"] == rtap["generator: gradients"] == 4 * judge
    assert rtap["reference: weights"] == rtap["policy: weights"]
    assert "reference: weights" not in updating(RtapConfig(**small, confidence=generator, lora_rank=2))
    teacher = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(BUNDLED / "policy").parameters())
    rlad = RladConfig(**small, teacher=str(BUNDLED / "policy"))
    assert updating(rlad)["teacher: weights"] == 4 * teacher
    assert "sampling" in estimate(rlad, CPU)
    assert estimate(RladConfig(**small, teacher="http://127.0.0.1:1", vllm="colocate"), CPU).keys() == {"updating"}


def test_an_adapter_of_a_generator_is_trained_alone(tmp_path: Path) -> None:
    adapter = save_generator_adapter(tmp_path / "generator")
    parts = updating(RtapConfig(policy=str(BUNDLED / "policy"), confidence=adapter, max_tokens=64, length_cache=8))
    assert 0 < parts["generator: gradients"] < parts["generator: weights"] / 4


def test_adapters_are_merged_beside_the_model_they_were_trained_on(policy: Path) -> None:
    config = GeneratorConfig(policy=str(policy), questions="countdown", max_cycle_tokens=64)
    assert estimate(config, CPU).keys() == {"updating"}
    assert "generator: merged" in estimate(replace(config, lora_rank=2), CPU)["evaluating"]
    assert "policy: merged" in estimate(sft(policy, lora_rank=2, merge=True), CPU)["merging"]


@pytest.mark.parametrize("command", ["sft", "generator", *CONFIGS])
def test_every_command_prints_a_table_and_writes_nothing(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    own = {
        "sft": ["--data", "none.jsonl"], "generator": ["--questions", "none.jsonl"],
        "rlad": ["--teacher", str(policy)], "kdrl": ["--teacher", str(policy)],
    }  # fmt: skip
    flags = ["--policy", str(policy), "--output", str(tmp_path / "out"), *own.get(command, [])]
    assert main([command, *flags, "--estimate"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("GiB a process")
    parts = [float(row.split()[-1]) for row in rows[: next(i for i, row in enumerate(rows) if row.startswith("peak"))]]
    assert sum(parts) == pytest.approx(float(rows[len(parts)].split()[-1]), abs=0.1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sft", "--data", "x.jsonl", "--estimate", "3"], "batch_size=16 cannot be split over 3 processes"),
        (["sft", "--data", "x.jsonl", "--estimate=-1"], "estimate=-1"),
        (["sft", "--data", "x.jsonl", "--estimate", "--policy", "{empty}"], "is not a checkpoint"),
        (["generator", "--questions", "countdown", "--estimate", "2"], "estimate=2"),
        (["generator", "--questions", "countdown", "--estimate", "--num-layers", "9"], "num_layers=9 is above the 1"),
        (["rtap", "--confidence", "{empty}", "--estimate"], "is not a checkpoint"),
        (["grpo", "--group-size", "3", "--estimate", "7"], "cannot be split"),
    ],
)
def test_wrong_use_is_refused(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    named = [] if "--policy" in flags else ["--policy", str(policy)]
    assert main([flags[0], *named, *(word.replace("{empty}", str(tmp_path)) for word in flags[1:])]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_attention_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50).save_pretrained(tmp_path)
    assert main(["grpo", "--policy", str(tmp_path), "--estimate"]) == 2
    assert "a mamba: it has no attention" in capsys.readouterr().err


def test_a_vision_encoder_is_not_trained(tmp_path: Path) -> None:
    parts = updating(GrpoConfig(policy=str(save_vlm(tmp_path / "model")), max_tokens=64, length_cache=8))
    assert parts["policy: gradients"] < parts["policy: weights"]


def test_other_commands_have_no_estimate() -> None:
    with pytest.raises(SystemExit):
        main(["demo-start", "--estimate"])
