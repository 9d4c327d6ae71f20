"""Checkpoints that would run something are refused in one sentence, unless a flag asks for them."""

import json
from pathlib import Path

import pytest

from rtap_core.errors import ConfigError
from rtap_server.engine.checkpoint_safety import check_folder, load_format, refuse_custom_code
from tests.other_checkpoints import MODELS


def checkpoint(folder: Path, *names: str, **config: object) -> str:
    for name in names:
        (folder / name).write_bytes(b"x")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


def check(model: str, given: str = "auto", *, pickles: bool = False, code: bool = False) -> None:
    check_folder(model, given, allows_pickles=pickles, trusts_code=code)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-00001-of-2.bin", "consolidated.pt", "a.pth", "adapter_model.bin"]
)
def test_pickled_weights_are_refused_unless_asked_for(tmp_path, name):
    model = checkpoint(tmp_path, name, "training_args.bin")
    with pytest.raises(ConfigError) as refused:
        check(model)
    assert f"only pickled weights ({name})" in str(refused.value)
    assert "--allow-pickled-weights" in str(refused.value)
    check(model, pickles=True)
    check(model, "npcache")  # a flag of vLLM's that asks for them


def test_safetensors_pass_and_pickles_beside_them_are_not_looked_at(tmp_path):
    check(checkpoint(tmp_path, "model.safetensors", "pytorch_model.bin", "training_args.bin"))
    for name in ("policy", "confidence", "student"):
        check(str(MODELS / name))
    check("some/hub-name")


def test_vllm_is_told_to_load_nothing_else(tmp_path):
    assert load_format("auto", allows_pickles=False) == "safetensors"
    assert load_format("auto", allows_pickles=True) == "auto"
    assert [load_format(name, allows_pickles=False) for name in ("pt", "dummy", "mistral")] == [
        "pt",
        "dummy",
        "mistral",
    ]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_of_a_checkpoint_is_refused_unless_asked_for(tmp_path, file):
    model = checkpoint(tmp_path, "model.safetensors")
    (tmp_path / file).write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}}), "utf-8")
    with pytest.raises(ConfigError) as refused:
        check(model)
    assert f"auto_map in its {file}" in str(refused.value)
    assert "--trust-remote-code" in str(refused.value)
    assert "\n" not in str(refused.value)
    check(model, code=True)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"auto_map": null}', "\udcff"])
def test_a_broken_config_is_vllms_to_refuse(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    check(str(tmp_path))


def test_a_configuration_from_the_hub_is_looked_at_too():
    with pytest.raises(ConfigError, match="has custom Python code"):
        refuse_custom_code("some/hub-name", {"auto_map": {"AutoModel": "a.B"}})
    refuse_custom_code("some/hub-name", {"model_type": "qwen3"})
