"""Features of a cycle's log-probabilities, from which a logistic regression computes confidence (``artifact.py``).

Training and server use the same functions. Log-probabilities are in nats, before temperature and truncation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rtap_core.answers import extract_answer

LOGPROB_FLOOR = -30.0  # the engine reports -inf for tokens that sampling masked
_TAIL = 4096  # characters at the end of a cycle in which its short answer is searched


class LogprobFeatures(NamedTuple):
    """Features of one cycle's sampled tokens.

    mean: over all tokens. lowest: of the least likely token. lowest_tenth: mean over the least likely tenth.
    answer: mean over the tokens of the short answer; ``mean`` where it is not found. tokens: number of tokens."""

    mean: float
    lowest: float
    lowest_tenth: float
    answer: float
    tokens: int

    def shown(self) -> dict[str, float]:
        """The features as responses and kept samples have them."""
        return {
            "mean": round(self.mean, 6),
            "lowest": round(self.lowest, 6),
            "lowest_tenth": round(self.lowest_tenth, 6),
            "answer": round(self.answer, 6),
            "tokens": self.tokens,
        }

    @classmethod
    def from_shown(cls, shown: Mapping[str, Any]) -> "LogprobFeatures":
        """Inverse of ``shown``. Raises KeyError, TypeError or ValueError for anything else."""
        mean, lowest, lowest_tenth, answer = (
            float(shown[name]) for name in ("mean", "lowest", "lowest_tenth", "answer")
        )
        features = cls(mean, lowest, lowest_tenth, answer, int(shown["tokens"]))
        if features.tokens < 1 or not all(map(math.isfinite, features)):
            raise ValueError(f"not finite, or no tokens: {dict(shown)}")
        return features


def logprob_features(tokens: Sequence[tuple[str, float]], answer: str | None) -> LogprobFeatures:
    """Features of a cycle. tokens: (text, log-probability) of at least one sampled token. answer: text after the
    thought, from which the short answer is extracted."""
    values = [max(value, LOGPROB_FLOOR) for _, value in tokens]
    lowest = sorted(values)[: max(1, len(values) // 10)]
    mean = math.fsum(values) / len(values)
    span = _span(tokens, extract_answer(answer)) if answer else None
    of_answer = mean if span is None else math.fsum(values[span]) / len(values[span])
    return LogprobFeatures(mean, lowest[0], math.fsum(lowest) / len(lowest), of_answer, len(values))


def _span(tokens: Sequence[tuple[str, float]], answer: str) -> slice | None:
    """Tokens of the last occurrence of ``answer``, white space aside; None if there is none.

    An occurrence inside a longer number is none."""
    wanted, pieces, length = "".join(answer.split()), list[str](), 0
    if not wanted or len(wanted) > _TAIL:
        return None
    for text, _ in reversed(tokens):
        pieces.append("".join(text.split()))
        length += len(pieces[-1])
        if length >= _TAIL:
            break
    pieces.reverse()
    text = "".join(pieces)
    begin = text.rfind(wanted)
    while begin >= 0 and _is_inside_number(text, begin, begin + len(wanted)):
        begin = text.rfind(wanted, 0, begin + len(wanted) - 1)
    if begin < 0:
        return None
    end, at, first, last = begin + len(wanted), 0, None, 0
    for index, piece in enumerate(pieces, len(tokens) - len(pieces)):
        if piece and at < end and at + len(piece) > begin:
            first, last = index if first is None else first, index
        at += len(piece)
    return slice(first, last + 1)


def _is_inside_number(text: str, begin: int, end: int) -> bool:
    before, after = text[max(0, begin - 1) : begin], text[end : end + 2].lstrip(".")[:1]
    return (text[begin].isdigit() and (before.isdigit() or before == ".")) or (
        text[end - 1].isdigit() and after.isdigit()
    )
