"""Tokenizer of the bundled models: byte-level BPE with single-token digits and punctuation.

Any UTF-8 text round-trips. The four R-TAP tags are added tokens but not special, so engines keep them in decoded text;
the ChatML markers are special.
"""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rtap_core.format import RTAP
from rtap_training.tasks.trajectory import TURN_END, Message

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TAGS = (RTAP.think_open, RTAP.think_close, RTAP.answer_open or "", RTAP.answer_close or "")

# Earlier assistant messages keep their content exactly, with or without tags.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def render_prompt(messages: Sequence[Message]) -> str:
    """Render messages and a generation prompt exactly as the chat template does."""
    turns = (f"{TURN_START}{m.role}\n{m.content}{TURN_END}\n" for m in messages)
    return "".join(turns) + f"{TURN_START}assistant\n"


def build_tokenizer(corpus: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train the merges on ``corpus``. vocab_size: bytes, merges and added tokens."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[\s\S]"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    specials = [PAD, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
