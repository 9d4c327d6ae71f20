"""Checkpoints and addresses that cannot work are refused before any engine is started, each in one sentence."""

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rtap_server.engine.reasoning_parser  # noqa: F401 - registers itself, as its plugin flag makes vLLM do
from rtap_core.errors import ConfigError
from rtap_server.__main__ import _parse
from rtap_server.engine.engine_config import check_classifier, cpu_defaults, emulates_bfloat16, reads_chat
from rtap_server.engine.loading import _generator_config, start_engines
from rtap_server.settings import Settings
from tests.other_checkpoints import MODELS, RANK, save_adapter, save_family, save_generator_adapter, save_think

POLICY = str(MODELS / "policy")


async def _refusal(*flags: str) -> str:
    """What starting the engines for these flags says; starting one would be a failure of the test."""
    args, settings, _ = _parse(list(flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtap_server.engine.loading._load", lambda *_, **__: pytest.fail("an engine was started"))
        with pytest.raises(ConfigError) as raised:
            async with start_engines(args, settings):
                pass
    return str(raised.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["/nowhere/model"], "no model at /nowhere/model: give a folder with a config.json"),
        ([POLICY, "--confidence-model", POLICY], "is not a confidence generator"),
        ([str(MODELS / "confidence")], "is a classifier and generates no text: give a generating model"),
        ([POLICY, "--oops-lexicon", "/nowhere"], "cannot read the Oops lexicon /nowhere"),
        ([POLICY, "--trajectory-format", "xml"], "unknown trajectory format 'xml'"),
        (
            [POLICY, "--confidence-model", str(MODELS / "confidence"), "--confidence-engine-args", '{"speed": 1}'],
            "--confidence-engine-args: ",
        ),
    ],
)
async def test_a_model_that_cannot_be_served_is_one_sentence(flags, sentence):
    refusal = await _refusal(*flags)
    assert sentence in refusal
    assert "\n" not in refusal


async def test_weights_that_were_cut_short_end_in_what_to_do(tmp_path):
    broken = tmp_path / "policy"
    shutil.copytree(MODELS / "policy", broken)
    (broken / "model.safetensors").write_bytes((MODELS / "policy" / "model.safetensors").read_bytes()[:1000])
    refusal = await _refusal(str(broken), "--confidence", "none")
    assert refusal.startswith(f"cannot start {broken}: ")
    assert refusal.endswith(f"; run `rtap doctor {broken}` to check its files and this machine")


async def test_a_format_that_the_model_has_no_tokens_for_is_refused(tmp_path):
    refusal = await _refusal(str(save_think("policy", tmp_path / "policy")), "--trajectory-format", "rtap")
    assert "has no tokens <answer> </answer>, so it does not write the 'rtap' format" in refusal
    assert "its config.json says 'think'" in refusal


async def test_a_gpt_oss_model_is_refused(tmp_path):
    refusal = await _refusal(str(save_family("gpt-oss", tmp_path / "model")))
    assert "is a gpt-oss model, whose channels vLLM separates itself" in refusal
    assert refusal.endswith("serve it with `vllm serve`")


@pytest.mark.parametrize(
    ("opening", "sentence"),
    [
        ("", "--cycle-open '' is blank"),
        (" \n", "--cycle-open ' \\n' is blank"),
        ("<|im_end|>Wait", "--cycle-open '<|im_end|>Wait' has '<|im_end|>' in it, which ends the model's turn"),
    ],
)
async def test_an_opening_after_which_nothing_is_written_is_refused(opening, sentence):
    refusal = await _refusal(POLICY, "--confidence", "none", "--cycle-open", opening)
    assert sentence in refusal
    assert refusal.endswith("give words that make the model check its answer")


async def test_an_adapter_is_told_where_it_belongs(tmp_path):
    adapter = str(save_adapter(tmp_path / "adapter", seed=1))
    refusal = await _refusal(adapter)
    assert f"{adapter} is an adapter: serve its base with --enable-lora" in refusal
    assert "a generator's with --confidence-model" in refusal
    refusal = await _refusal(POLICY, "--confidence-model", adapter)
    assert f"{adapter} is no generator's adapter: it needs" in refusal
    assert "a policy's adapter is served with --lora-modules" in refusal


def test_a_generators_adapter_is_served_as_the_checkpoint_that_it_is_merged_into(tmp_path, monkeypatch):
    adapter, cache = save_generator_adapter(tmp_path / "adapter"), tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    args, settings, _ = _parse([POLICY, "--confidence-model", str(adapter)])
    config = _generator_config(args, settings)
    assert config is not None
    (checkpoint,) = (cache / "rtap" / "generators").iterdir()
    assert config.model_config.model == str(checkpoint)
    assert check_classifier(config).input == "token_ids"
    name = "model.layers.0.self_attn.q_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    before = load_file(Path(POLICY) / "model.safetensors")[f"{name}.weight"].float()
    after = load_file(checkpoint / "model.safetensors")
    scale = 8 / RANK  # PEFT's default alpha over the rank
    torch.testing.assert_close(after[f"{name}.weight"].float(), before + scale * b @ a, atol=0.02, rtol=0.01)
    head = lora["base_model.model.score.weight"]
    torch.testing.assert_close(after["score.weight"].float(), head, atol=0.01, rtol=0.01)
    assert _generator_config(args, settings).model_config.model == str(checkpoint)


async def test_a_backbone_without_an_adapter_is_refused():
    refusal = await _refusal(POLICY, "--confidence-model", str(MODELS / "confidence"), "--confidence-backbone", POLICY)
    assert refusal.startswith(f"--confidence-backbone {POLICY} is for an adapter")


def test_an_adapter_of_a_backbone_that_is_not_there_is_one_sentence(tmp_path):
    adapter = save_generator_adapter(tmp_path / "adapter")
    flags = [POLICY, "--confidence-model", str(adapter), "--confidence-backbone", str(tmp_path / "none")]
    with pytest.raises(ConfigError, match=r"cannot load the adapter .* on .*none: ") as raised:
        _generator_config(*_parse(flags)[:2])
    assert "\n" not in str(raised.value)


async def test_a_generator_with_another_tokenizer_cannot_read_token_ids(tmp_path):
    other = tmp_path / "confidence"
    shutil.copytree(MODELS / "confidence", other)
    text = (other / "tokenizer.json").read_text()
    assert "<answer>" in text
    (other / "tokenizer.json").write_text(text.replace("<answer>", "<reply>"))
    refusal = await _refusal(POLICY, "--confidence-model", str(other), "--confidence-input", "token_ids")
    assert f"the generator {other} and the policy {POLICY} have different tokenizers" in refusal


@pytest.mark.parametrize(
    ("chosen", "same_tokenizer", "is_chat"),
    [
        ("auto", True, False),
        ("auto", False, True),
        ("chat", True, True),
        ("chat", False, True),
        ("token_ids", True, False),
    ],
)
def test_a_generator_reads_a_chat_when_its_tokenizer_is_another(chosen, same_tokenizer, is_chat):
    settings = Settings(confidence_model="generator", confidence_input=chosen)
    assert reads_chat(settings, "policy", same_tokenizer=same_tokenizer) is is_chat


@pytest.mark.parametrize(
    ("chosen", "trained", "is_chat"),
    [("auto", "chat", True), ("auto", "token_ids", False), ("token_ids", "chat", False), ("chat", "token_ids", True)],
)
def test_a_generator_of_the_same_tokenizer_reads_what_it_was_trained_on_unless_told_otherwise(chosen, trained, is_chat):
    settings = Settings(confidence_model="generator", confidence_input=chosen)
    assert reads_chat(settings, "policy", same_tokenizer=True, trained=trained) is is_chat
    assert reads_chat(Settings(confidence_model="generator"), "policy", same_tokenizer=False, trained=trained)


async def test_a_remote_generator_that_is_not_there_is_refused():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert f"no vLLM classify server answers at {address}" in await _refusal(POLICY, "--confidence-model", address)


@pytest.mark.parametrize(
    ("capabilities", "emulates"),
    [
        ({"architecture": "x86_64", "avx2": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bfloat16_is_not_computed_where_a_cpu_emulates_it(monkeypatch, capabilities, emulates):
    assert emulates_bfloat16(capabilities) is emulates
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    monkeypatch.setattr("os.environ", dict(os.environ))
    args, _, _ = _parse([POLICY])
    cpu_defaults(args, bundled=False)
    assert args.dtype == ("float32" if emulates else "auto")
    args, _, _ = _parse([POLICY, "--dtype", "bfloat16"])
    cpu_defaults(args, bundled=False)
    assert args.dtype == "bfloat16"


@pytest.mark.parametrize(("num_engines", "threads"), [(1, "8"), (2, "4"), (16, "1")])
def test_engines_share_the_cores(monkeypatch, num_engines, threads):
    monkeypatch.setattr("os.environ", {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    args, _, _ = _parse([POLICY])
    cpu_defaults(args, bundled=False, num_engines=num_engines)
    assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("allowed", [False, True])
def test_one_flag_allows_templates_of_requests_in_vllm_too(allowed):
    args, settings, _ = _parse([POLICY, *(["--allow-request-templates"] if allowed else [])])
    assert settings.allow_request_templates is args.trust_request_chat_template is allowed
