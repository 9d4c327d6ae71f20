"""Inputs of a classifier: the policy's token ids, or a chat rendered by the classifier's own template."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from rtap_core.classifier_input import chat_token_ids, without_padding
from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged
from rtap_server.engine.request_state import current_request

Message = dict[str, str]
Input = Callable[[Judged], Awaitable[list[int]]]  # token ids for the classifier; raises ConfidenceError


class TemplateRefused(Exception):
    """A tokenizer without a chat template, or a template that raised."""


class ChatTokenizer(Protocol):
    """Tokenizer and chat template of a classifier."""

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, without generation prompt. Raises TemplateRefused."""
        ...

    async def text(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        ...


async def read_token_ids(judged: Judged) -> list[int]:
    """Question and cycle in the policy's own tokens."""
    return [*judged.question_token_ids, *judged.cycle_token_ids]


@dataclass(frozen=True, slots=True)
class ChatInput:
    """The request's messages, and the judged answer as the last message of the assistant.

    A template that refuses them gets turns of user and assistant only. One that refuses those too, or no template:
    the texts, separated by blank lines. A question that is too long loses its beginning; an answer is never cut.

    decode: text of the policy's token ids; the flag leaves out special tokens.
    reads_thought: judge the whole cycle with its tags, on which our own generators are trained. Reward models of others
        have seen no such tags, and judge the answer.
    """

    tokenizer: ChatTokenizer
    decode: Callable[[Sequence[int], bool], str]
    max_model_len: int
    reads_thought: bool = False

    async def __call__(self, judged: Judged) -> list[int]:
        answer = None if self.reads_thought else judged.answer
        if answer is None:
            answer = self.decode(judged.cycle_token_ids, False)
        question = plain_messages(current_request().messages)
        if not question:  # a prompt of /v1/completions, or of token ids
            question = [{"role": "user", "content": self.decode(judged.question_token_ids, True)}]
        elif current_request().prefix and question[-1]["role"] == "assistant":
            begun = question.pop()["content"]
            if len(judged.context_token_ids) == len(judged.question_token_ids):  # later cycles do not continue it
                answer = begun + answer
        encoded = await self._encode(question, answer)
        return encoded if len(encoded) <= self.max_model_len else await self._shortened(encoded, question)

    async def _encode(self, question: list[Message], answer: str) -> list[int]:
        chat = [*question, {"role": "assistant", "content": answer}]
        for messages in (chat, alternating(chat)):
            try:
                return await self.tokenizer.chat(messages)
            except TemplateRefused:
                continue
        return await self.tokenizer.text("\n\n".join(message["content"] for message in chat))

    async def _shortened(self, encoded: list[int], question: list[Message]) -> list[int]:
        """The first token, which may be the beginning of sequence, and as many of the last ones as fit."""
        begin = _common_length(encoded, await self._encode(question, ""))
        if 1 + len(encoded) - begin > self.max_model_len:
            raise ConfidenceError(
                f"an answer of {len(encoded) - begin} tokens is above the generator's context of {self.max_model_len}",
                reason="too_long",
            )
        return [encoded[0], *encoded[len(encoded) - self.max_model_len + 1 :]]


def plain_messages(conversation: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Roles (system, user, assistant) and texts of vLLM's parsed messages.

    Tool calls are JSON in the assistant's text, results of tools are the user's."""
    roles = {"system": "system", "developer": "system", "assistant": "assistant"}
    return [{"role": roles.get(m["role"], "user"), "content": _text_of(m)} for m in conversation]


def _text_of(message: Mapping[str, Any]) -> str:
    content: Any = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    functions: list[Any] = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    calls = [
        json.dumps({name: function.get(name) for name in ("name", "arguments")}, ensure_ascii=False)
        for function in functions
    ]
    return "\n".join(filter(None, [*parts, *calls]))


def alternating(messages: Iterable[Message]) -> list[Message]:
    """Turns of user and assistant, the user's with the system's text: all that many templates accept."""
    turns = list[Message]()
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append({"role": role, "content": message["content"]})
    return turns


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of equal tokens at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class LocalChatTokenizer:
    """ChatTokenizer from a Hugging Face tokenizer. pad_token_id: of the classifier's config."""

    def __init__(self, tokenizer: Any, pad_token_id: int | None) -> None:
        self._tokenizer, self._pad_token_id = tokenizer, pad_token_id

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        return await asyncio.to_thread(self._chat, messages)  # a long text takes seconds

    async def text(self, text: str) -> list[int]:
        encoded = cast(list[int], await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=True))
        return without_padding(encoded, self._pad_token_id)

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        try:
            return chat_token_ids(self._tokenizer, messages, self._pad_token_id)
        except Exception as error:  # a template's own code, which may raise anything
            raise TemplateRefused from error
