"""The error tree. Everything a user can cause is an RtapError; ``http/errors.py`` maps it to HTTP.

RtapError
├── ConfigError        wrong settings or checkpoints, found at start
├── InvalidRequest     a request that can never work (400)
├── BodyTooLarge       more bytes than the server reads (413)
├── HeadTooLarge       more header than the server reads (431)
├── Conflict           an Idempotency-Key that came with another request before (409)
├── UnknownRequest     an answer that this server does not remember, or that is another key's (404)
├── Unauthorized       no key, or none that opens this route (401)
├── RateLimited        a limit of this key (429)
├── Overloaded         a limit of this server (503)
│   └── Draining       the server is leaving
└── ConfidenceError    the confidence generator failed or was too slow (degrades a request, never fails it)
"""


class RtapError(Exception):
    """Base of all errors that rtap raises on purpose. The message is one sentence that says what to do."""


class ConfigError(RtapError):
    """Settings, flags or checkpoints that cannot work together."""


class InvalidRequest(RtapError):
    """A request field that is wrong. ``param`` names it, as in OpenAI's error shape."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(RtapError):
    """A request body that is longer than the server reads."""


class HeadTooLarge(RtapError):
    """A request line and header fields that are longer, or more, than the server reads."""


class Conflict(RtapError):
    """The same Idempotency-Key on two requests that are not the same."""


class UnknownRequest(RtapError):
    """An id that names no answer of this server, or one that is forgotten by now."""


class Unauthorized(RtapError):
    """A request without a key, or with one that does not open what it asks for."""


class RateLimited(RtapError):
    """A key has used up what it may have. retry_after_seconds: whole seconds, at least 1."""

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(RtapError):
    """The server has as much work as it takes at once. retry_after_seconds: whole seconds, at least 1."""

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Draining(Overloaded):
    """The server takes nothing new because it is about to end; another one may answer."""


class ConfidenceError(RtapError):
    """The generator gave no score. ``reason``: a metric label, one of a few words (``error``, ``timeout``, …)."""

    def __init__(self, message: str, *, reason: str = "error") -> None:
        super().__init__(message)
        self.reason = reason
