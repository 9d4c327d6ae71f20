"""The bundled policy in tests: its tokens, and prompts in its chat template."""

from pathlib import Path

from rtap_training.rl.loading import load_dialect
from rtap_training.trajectories import prompt_ids

MODELS = Path(__file__).parents[2] / "deploy" / "models"


def encode_question(question: str) -> list[int]:
    """Prompt ids of a question."""
    _, tokenizer, dialect = load_dialect(MODELS / "policy")
    return prompt_ids(tokenizer, dialect, question)
