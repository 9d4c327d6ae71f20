"""Checkpoints that would run something are refused in one sentence, unless a flag asks for them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from rtap_core.errors import ConfigError
from rtap_server.engine.checkpoint_safety import check_folder, load_format
from rtap_server.engine.engine_config import engine_config
from tests.other_checkpoints import MODELS


def checkpoint(folder: Path, *names: str) -> str:
    for name in (*names, "config.json"):
        (folder / name).write_bytes(b"x")
    return str(folder)


def check(model: str, given: str = "auto", *, pickles: bool = False) -> None:
    check_folder(model, given, allows_pickles=pickles)


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


CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
Path(r"{marker}").write_text("the checkpoint's code has run")
class Config(PretrainedConfig):
    model_type = "custom"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAPS: dict[str, dict[str, Any]] = {
    "config.json": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Tokenizer", None]},
    "processor_config.json": {"AutoProcessor": "code.Processor"},
    "preprocessor_config.json": {"AutoImageProcessor": "code.Processor"},
}


def checkpoint_with_code(folder: Path, **config: Any) -> tuple[str, Path]:
    """The bundled policy with ``auto_map`` in all files, and the file that its code writes."""
    shutil.copytree(MODELS / "policy", folder / "model")
    marker = folder / "marker"
    (folder / "model" / "code.py").write_text(CODE.format(marker=marker), "utf-8")
    for name, auto_map in AUTO_MAPS.items():
        path = folder / "model" / name
        fields = json.loads(path.read_text("utf-8")) if path.exists() else {}
        fields |= {"auto_map": auto_map, **(config if name == "config.json" else {})}
        path.write_text(json.dumps(fields), "utf-8")
    return str(folder / "model"), marker


def load(model: str, **flags: Any) -> None:
    engine_config(AsyncEngineArgs(model=model, kv_cache_memory_bytes=2**20, **flags), model, allows_pickles=False)


def test_code_that_a_checkpoint_has_but_does_not_need_is_not_run(tmp_path):
    """Many checkpoints on the Hub are older than their model's support in transformers and vLLM."""
    model, marker = checkpoint_with_code(tmp_path)
    load(model)
    assert not marker.exists()


def test_code_that_a_checkpoint_needs_is_refused_unless_asked_for(tmp_path):
    model, marker = checkpoint_with_code(tmp_path, model_type="custom", architectures=["CustomForCausalLM"])
    with pytest.raises(ConfigError) as refused:
        load(model)
    assert str(refused.value) == (
        f"{model} needs Python code of its checkpoint (auto_map): allow it with --trust-remote-code"
    )
    assert not marker.exists()
    with pytest.raises(ConfigError):  # vLLM has no such model, but it has looked at the code
        load(model, trust_remote_code=True)
    assert marker.exists()
