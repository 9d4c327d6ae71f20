"""Scripted Engine and Confidence for unit tests. Tokens are characters and tags."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from rtap_core.cutoff import Cutoff
from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged, Score, Step

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EOS = 0x110010
_SPLIT = re.compile("|".join(map(re.escape, TAGS)) + r"|[\s\S]")


def encode(text: str) -> list[int]:
    """One id per tag, one id per character."""
    return [0x110000 + TAGS.index(t) if t in TAGS else ord(t) for t in _SPLIT.findall(text)]


def decode(token_ids: Sequence[int]) -> str:
    """Inverse of ``encode``; the end of turn is invisible."""
    return "".join(TAGS[i - 0x110000] if 0x110000 <= i < 0x110004 else "" if i == EOS else chr(i) for i in token_ids)


@dataclass
class ScriptedEngine:
    """Writes the n-th text of ``script`` in the n-th call. A text ending in ``$`` ends the turn there.

    prompts, max_tokens: arguments of each call. closed: calls whose generator was closed before its end.
    """

    script: list[str]
    seconds_per_token: float = 0.0
    end_of_turn_ids: frozenset[int] = frozenset({EOS})
    prompts: list[list[int]] = field(default_factory=list)
    max_tokens: list[int | None] = field(default_factory=list)
    closed: int = 0
    cutoff: Cutoff = field(default_factory=Cutoff)

    def encode(self, text: str) -> list[int]:
        return encode(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None
    ) -> AsyncGenerator[Step, None]:
        text = self.script[len(self.prompts)]
        self.prompts.append(list(prompt_token_ids))
        self.max_tokens.append(max_tokens)
        ends_turn = text.endswith("$")
        ids = encode(text.removesuffix("$")) + ([EOS] if ends_turn else [])
        truncated = max_tokens is not None and len(ids) > max_tokens
        ids = ids[:max_tokens]
        try:
            for n, token_id in enumerate(ids):
                if await self._is_cut():
                    yield Step("", [], True, False, False, len(prompt_token_ids), 0, native=None)
                    return
                last = n == len(ids) - 1
                yield Step(
                    text=decode([token_id]),
                    token_ids=[token_id],
                    finished=last,
                    truncated=last and truncated,
                    ended_turn=last and ends_turn and not truncated,
                    prompt_tokens=len(prompt_token_ids),
                    cached_tokens=0,
                    native=None,
                )
        except (GeneratorExit, asyncio.CancelledError):
            self.closed += 1
            raise

    async def _is_cut(self) -> bool:
        """True if the cutoff comes before the next token."""
        try:
            async with asyncio.timeout(None) as wait:
                with self.cutoff.on_cut(lambda: wait.reschedule(0)):
                    await asyncio.sleep(self.seconds_per_token)
        except TimeoutError:
            return True
        return False


@dataclass
class ScriptedConfidence:
    """Scores by a function of the cycle's text; a value below zero is a failing generator."""

    rule: Callable[[str], float]
    judged: list[Judged] = field(default_factory=list)

    async def score(self, judged: Judged) -> Score:
        self.judged.append(judged)
        value = self.rule(decode(judged.cycle_token_ids))
        if value < 0:
            raise ConfidenceError("scripted failure", reason="error")
        return Score(value, len(judged.cycle_token_ids))
