"""Tiny untrained models on the bundled tokenizer."""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from rtap_training.bundled.architecture import build_policy
from rtap_training.bundled.config import Architecture
from rtap_training.models.huggingface import load_tokenizer, save_checkpoint

BUNDLED = Path(__file__).parents[3] / "deploy" / "models"


def save_policy(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(BUNDLED / "policy")
    shape = Architecture(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, ffn_size=32)
    save_checkpoint(folder, build_policy(shape, tokenizer), tokenizer, {})
    return folder


def save_generator(folder: Path, policy: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config.from_pretrained(policy)
    config.num_labels = 1
    save_checkpoint(folder, Qwen3ForSequenceClassification(config), load_tokenizer(policy), {})
    return folder
