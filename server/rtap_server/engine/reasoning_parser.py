"""vLLM reasoning parser for text in which OutputWriter has put ANSWER_MARK between reasoning and content.

vLLM imports this file by path (``--reasoning-parser-plugin``) in the API process and in the engine process. Chat
completions, responses and Anthropic messages all split reasoning and content through it.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import msgspec
from typing_extensions import override
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser, ReasoningParserManager

from rtap_core.format import RTAP, THINK
from rtap_server.engine.output_writer import (
    ANSWER_MARK,
    DRAFT,
    DRAFT_MARK,
    REASONING,
    REASONING_CONTENT,
    REASONING_PARSER,
)


class RecursiveReasoningParser(ReasoningParser):
    """Split at the mark. ``engine_based_streaming`` makes vLLM pass deltas only, without the text so far."""

    engine_based_streaming = True

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        self._ended = False

    @cached_property
    def _close_id(self) -> int | None:
        """The token that ends reasoning. Cached lazily: vLLM makes three parsers a request."""
        vocab: dict[str, int] = self.vocab
        closing = RTAP.answer_open if RTAP.answer_open in vocab else THINK.think_close
        return vocab.get(closing or "")

    @property
    @override
    def reasoning_start_str(self) -> str:
        return RTAP.think_open

    @property
    @override
    def reasoning_end_str(self) -> str:
        return RTAP.think_close

    @override
    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self._ended

    @override
    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        reasoning, mark, content = model_output.partition(ANSWER_MARK)
        return reasoning or None, content if mark else None

    @override
    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        if delta_text.startswith(DRAFT_MARK):
            draft: dict[str, Any] = {DRAFT: msgspec.json.decode(delta_text[len(DRAFT_MARK) :])}
            return DeltaMessage(**draft)
        reasoning, mark, content = delta_text.partition(ANSWER_MARK)
        self._ended = self._ended or bool(mark)
        if not reasoning and not content:
            return None
        # Only fields that are set are sent; DeltaMessage accepts those that vLLM does not define.
        if not content:
            both: dict[str, Any] = {REASONING: reasoning, REASONING_CONTENT: reasoning}
            return DeltaMessage(**both)
        return DeltaMessage(reasoning=reasoning, content=content) if reasoning else DeltaMessage(content=content)

    def finish_streaming(self) -> DeltaMessage | None:
        """Nothing is buffered."""
        return None

    @override
    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        # Called for prompts; their tags say nothing about the text to come.
        return False

    # The engine process calls the next two for structured outputs, on the token ids of a cycle.

    @override
    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        return self._close_id in set(delta_ids)

    @override
    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        ids = list(input_ids)
        return ids[len(ids) - ids[::-1].index(self._close_id) :] if self._close_id in ids else []

    @override
    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        # Makes vLLM send usage details; ResponseRewriter sets the number.
        return 0


ReasoningParserManager.register_module(REASONING_PARSER, True, RecursiveReasoningParser)
