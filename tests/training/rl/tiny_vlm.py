"""A tiny vision-language checkpoint: the bundled policy as language model, a random CLIP encoder in front of it."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from rtap_training.models.huggingface import load_tokenizer
from tests.training.rl.tiny import BUNDLED

SIZE, PATCH = 28, 14
IMAGE = "<image>"
# Content is a text, or parts of text and images.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{{- '<image>' if part.type == 'image' else part.text }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def save_vlm(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    language = AutoModelForCausalLM.from_pretrained(BUNDLED / "policy", dtype=torch.float32)
    tokenizer = load_tokenizer(BUNDLED / "policy")
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language.config, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1, image_seq_length=(SIZE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    config.rtap = {"format": "rtap"}
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor: Any = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (shade, 255 - shade, 128))


def encoded(shade: int) -> str:
    """The picture as base64 of a PNG."""
    buffer = io.BytesIO()
    picture(shade).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
