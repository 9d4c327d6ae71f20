"""Oops tokens: the tokens of a thought that belong to phrases of self-doubt.

R-TAP (arXiv 2603.02099) counts them but publishes no list. Ours is the versioned file ``oops.txt``, which a flag can
replace. Phrases match decoded text on word boundaries, case-insensitively.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rtap_core.errors import ConfigError

DEFAULT_PATH = Path(__file__).with_name("oops.txt")


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Compiled phrases. version: declared by the file; rates of different versions are not comparable."""

    version: str
    pattern: re.Pattern[str]

    def find(self, text: str) -> list[str]:
        """All phrases in ``text``: non-overlapping, the longest at each position."""
        return self.pattern.findall(text)


def load_lexicon(path: Path = DEFAULT_PATH) -> Lexicon:
    """Read a lexicon file: a ``# version: X`` line, then one phrase per line. Raises ConfigError if it has neither."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the Oops lexicon {path}: {error}") from error
    version = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("# version:")), None)
    phrases = sorted({line for line in lines if line and not line.startswith("#")}, key=lambda p: (-len(p), p))
    if version is None or not phrases:
        raise ConfigError(f"the Oops lexicon {path} needs a '# version: X' line and at least one phrase")
    alternatives = "|".join(r"\s+".join(re.escape(word) for word in phrase.split()) for phrase in phrases)
    return Lexicon(version, re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE))


class OopsCounter:
    """Counts the Oops tokens of a text for one tokenizer.

    encode: token ids of a phrase, without special tokens; cached per phrase.
    """

    def __init__(self, lexicon: Lexicon, encode: Callable[[str], list[int]]) -> None:
        def tokens_of(phrase: str) -> int:
            return len(encode(phrase))

        self.lexicon = lexicon
        self._tokens_of = lru_cache(maxsize=1024)(tokens_of)

    def count(self, text: str) -> int:
        """Number of tokens in ``text`` that belong to a phrase of the lexicon."""
        return sum(self._tokens_of(phrase) for phrase in self.lexicon.find(text))
