"""The bundled policy in tests: its weights, its tokens, and prompts in its chat template."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtap_training.data.trajectories import prompt_ids
from rtap_training.models.loading import load_dialect, load_for_training

MODELS = Path(__file__).parents[2] / "deploy" / "models"


def load_policy(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Policy in fp32 and evaluation mode, and its tokenizer."""
    loaded = load_for_training(path)
    return loaded.model.eval(), loaded.tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False)


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens included."""
    return str(tokenizer.decode(list(ids)))


def encode_question(question: str) -> list[int]:
    """Prompt ids of a question."""
    *_, dialect = load_dialect(MODELS / "policy")
    return prompt_ids(dialect, question)
