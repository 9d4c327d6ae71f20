"""Test checkpoints derived from the bundled ones: the `think` format and a LoRA adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rtap_core.artifact import BUNDLED_MODELS as MODELS

RANK = 4
END_ID = 447  # `</answer>` in the bundled tokenizer


def save_think(name: str, folder: Path) -> Path:
    """Save the bundled model ``name`` in the `think` format, with two tokens renamed.

    ``<answer>`` becomes an empty line and ``</answer>`` ends the turn."""
    shutil.copytree(MODELS / name, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    names = {"<answer>": "\n\n", "</answer>": "<|end|>"}
    for token in tokenizer["added_tokens"]:
        token["special"] |= token["id"] == END_ID
        token["content"] = names.get(token["content"], token["content"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    if (folder / "generation_config.json").exists():
        _change(folder / "generation_config.json", eos_token_id=[2, END_ID])
    _change(folder / "config.json", rtap={"format": "think"})
    return folder


def save_adapter(folder: Path, *, seed: int) -> Path:
    """Save a random LoRA adapter of the bundled policy in PEFT's format."""
    config = json.loads((MODELS / "policy" / "config.json").read_text("utf-8"))
    hidden, heads, head = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{module}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.1
        weights[f"{module}.lora_B.weight"] = torch.randn(heads * head, RANK, generator=generator) * 0.5
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"],
            "base_model_name_or_path": "rtap", "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(peft), "utf-8")
    return folder


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")
