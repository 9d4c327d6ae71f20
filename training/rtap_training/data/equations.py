"""Written equations such as ``12*3=36``, and which of them hold: labels inside a cycle for a confidence generator."""

import re
from collections.abc import Sequence
from itertools import accumulate

from rtap_training.tasks.expression import evaluate

NO_LABEL = -1
_SPACES = str.maketrans("Ġ▁Ċ", "   ")  # a sign for a space each, so that positions stay
_NUMBER = r"\(*[0-9]+\)*"
_EQUATION = re.compile(
    r"(?<![\w.,+\-*/^)])(?<![+\-*/^] )"  # not the rest of a longer term
    rf"({_NUMBER}(?: ?[+\-*/] ?{_NUMBER})+) ?= ?(-?[0-9]+)"
    r"(?![.,]?[0-9])(?! ?[+*/^])"
)


def equations(text: str) -> list[tuple[int, bool]]:
    """(end, whether it and all before it hold) of each written equation of whole numbers."""
    found: list[tuple[int, bool]] = []
    holds = True
    for match in _EQUATION.finditer(text):
        left = evaluate(match[1])
        if left is not None:
            holds = holds and left.value == int(match[2])
            found.append((match.end(), holds))
    return found


def equation_labels(tokens: Sequence[str]) -> list[int]:
    """One label a token: at the last token of an equation 1 while all so far hold, 0 from the first false one on;
    ``NO_LABEL`` at all others.

    tokens: as the tokenizer's vocabulary has them, with its signs for white space."""
    labels = [NO_LABEL] * len(tokens)
    index_of = {end: index for index, end in reversed(list(enumerate(accumulate(map(len, tokens)))))}
    for end, holds in equations("".join(tokens).translate(_SPACES)):
        if end in index_of:  # a token that goes on behind the equation would be read too late
            labels[index_of[end]] = int(holds)
    return labels
