"""What somebody may have meant who wrote a name wrong. Not here: the sentence around it."""

import difflib
from collections.abc import Iterable


def meant(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``; empty where nothing known is like it."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
