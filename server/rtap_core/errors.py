"""Tree of the errors that rtap raises on purpose. ``http/errors.py`` maps them to HTTP statuses.

RtapError
├── ConfigError        settings, flags or checkpoints that cannot work; found at start
├── InvalidRequest     400
├── Unauthorized       401
├── UnknownRequest     404
├── UnknownModel       404
├── BodyTooSlow        408
├── BodyTooLarge       413
├── RateLimited        429: a limit of this key
├── Overloaded         503: a limit of this server
│   └── Draining       503: the server is shutting down
└── ConfidenceError    the confidence generator failed; the request continues without it
"""

import difflib
from collections.abc import Iterable


class RtapError(Exception):
    """Base class. The message is one sentence: what was wrong with which value, what is allowed, what to do."""


class ConfigError(RtapError):
    """Settings, flags or checkpoints that cannot work together."""


class InvalidRequest(RtapError):
    """A request that can never succeed. ``param``: name of the wrong field, as in OpenAI's error object."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(RtapError):
    """A request body above the server's limit."""


class BodyTooSlow(RtapError):
    """A request body that did not arrive in time."""


class UnknownRequest(RtapError):
    """A request id that this server does not know, no longer knows, or that belongs to another key."""


class UnknownModel(RtapError):
    """A model that this server does not have."""

    param = "model"


class Unauthorized(RtapError):
    """A request without a key, or with a key that does not grant its route."""


class RateLimited(RtapError):
    """A limit of the request's key is used up. retry_after_seconds: whole seconds, at least 1."""

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(RtapError):
    """The server is at its concurrency or queue limit. retry_after_seconds: whole seconds, at least 1."""

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Draining(Overloaded):
    """The server is shutting down and accepts no new requests."""


class ConfidenceError(RtapError):
    """No score from the confidence generator. ``reason``: a metric label such as ``error`` or ``timeout``."""

    def __init__(self, message: str, *, reason: str = "error") -> None:
        super().__init__(message)
        self.reason = reason


def closest_match(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the known word most like ``word``; empty when none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
