"""Test checkpoints: the bundled ones in the `think` format, a LoRA adapter, models of other families."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rtap_core.artifact import BUNDLED_MODELS as MODELS

RANK = 4
END_ID = 447  # `</answer>` in the bundled tokenizer
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


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
    _change(folder / "config.json", rtap={"format": "think", "recursion": "continue"})
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


def save_generator_adapter(folder: Path) -> Path:
    """Save a random adapter of a generator on the bundled policy's body, as ``rtap train generator`` writes one."""
    torch.manual_seed(1)
    body = AutoModelForSequenceClassification.from_pretrained(MODELS / "policy", num_labels=1, dtype=torch.float32)
    lora = LoraConfig(task_type="SEQ_CLS", r=RANK, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(body, lora)
    adapted.save_pretrained(folder)
    body.config.rtap = {"kind": "confidence", "input": "token_ids", "logistic": {"bias": 0.0, "generator": 1.0}}
    body.config.architectures = ["Qwen3ForSequenceClassification"]
    body.config.save_pretrained(folder)
    return folder


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


@dataclass(frozen=True, slots=True)
class Family:
    """Models with one chat template and architecture.

    template: file of the PyPI package trl, which has the templates of the Hub unchanged (Apache-2.0).
    tokens: special tokens of the template; the first ends the turn. replies: what the model writes after a prompt that
    ends with a token; no token twice in all of them. ``TURN_END`` ends the turn.
    """

    template: str
    config: Callable[..., PreTrainedConfig]
    tokens: tuple[str, ...]
    replies: Mapping[str, Sequence[str]]


TURN_END = ""
FAMILIES = {
    "qwen3": Family(
        "qwen3.jinja",
        Qwen3Config,
        ("<|im_end|>", "<|im_start|>", "<think>", "</think>", "\n\n"),
        {"\n": ("<think>", "t", "</think>", "7", TURN_END), "\n\n": ("8", TURN_END)},
    ),
    "deepseek-r1": Family(
        "deepseek_r1_distill.jinja",
        Qwen2Config,
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        {"\n": ("t", "</think>", "7", TURN_END)},
    ),
    "llama-3": Family(
        "llama3.jinja",
        LlamaConfig,
        ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "\n\n"),
        {"\n\n": (*"<think>", "7", TURN_END)},
    ),
    "gpt-oss": Family(
        "gptoss.jinja",
        GptOssConfig,
        ("<|return|>", "<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        {},
    ),
}


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """One token a byte, the family's special tokens and its chat template."""
    alphabet = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    raw = Tokenizer(BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    raw.add_tokens([AddedToken(t, special=t[:2] in ("<|", "<｜"), normalized=False) for t in family.tokens])
    template = (files("trl") / "chat_templates" / family.template).read_text("utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=template, eos_token=family.tokens[0], bos_token=family.tokens[1]
    )


def save_family(name: str, folder: Path) -> Path:
    """Save a small model of a family that writes its ``replies``: attention and MLP add nothing, and the last token
    alone chooses the next one. Weights of gpt-oss are left out, because it is refused before they are read."""
    family, size = FAMILIES[name], 512
    tokenizer = family_tokenizer(family)
    config = family.config(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, dtype=torch.float32,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    if not family.replies:
        config.architectures = ["GptOssForCausalLM"]
        config.save_pretrained(folder)
        return folder
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for last, reply in family.replies.items():
            texts = [last, *(text or family.tokens[0] for text in reply)]
            for before, after in pairwise(tokenizer.encode(text)[0] for text in texts):
                model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, *, labels: int = 1, seed: int = 0) -> Path:
    """Save a classifier with a random head, its own tokenizer and its own chat template.

    Its body is SmolLM2-135M-Instruct where ``~/models`` has it, else a tiny random Llama."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    smollm = Path("~/models/smollm2-135m-instruct").expanduser()
    kind: Any = AutoModelForSequenceClassification
    if (smollm / "model.safetensors").is_file():
        tokenizer = AutoTokenizer.from_pretrained(smollm)
        model = kind.from_pretrained(smollm, num_labels=labels, dtype=torch.float32)
    else:
        tokenizer = small_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, num_labels=labels,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = kind.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=1.0 / model.score.in_features**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer with a few merges and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|start|>", "<|stop|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the user asks the assistant to make a number from other numbers"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|stop|>", pad_token="<|pad|>")
    made.chat_template = template
    return made
