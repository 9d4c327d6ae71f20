"""Architecture of the bundled policy: a Qwen3 with about three million parameters."""

from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rtap_training.bundled.config import Architecture
from rtap_training.models.huggingface import pad_id, token_id
from rtap_training.tasks.trajectory import TURN_END

MAX_POSITIONS = 1024


def policy_config(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Qwen3 config with tied embeddings, full attention, and the ``rtap`` block that the server reads."""
    settings = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=pad_id(tokenizer),
    )
    settings.rtap = {"format": "rtap"}
    return settings


def build_policy(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Policy with random weights from torch's global generator."""
    model = Qwen3ForCausalLM(policy_config(architecture, tokenizer))
    model.generation_config = generation_config(tokenizer)
    return model


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Sampling at temperature 1 until the end of turn."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=pad_id(tokenizer),
    )
