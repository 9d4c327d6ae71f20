"""What one key may have, and what the server takes at once. Pure: no I/O, the caller brings the time.

Times are seconds of a monotonic clock. Nothing here waits; whoever is above a limit is told when to come again.
"""

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from rtap_core.errors import InvalidRequest, Overloaded, RateLimited

_MINUTE = 60.0
_INSTANT_SECONDS = 1e-6  # rounding of what is really there


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of a key; None is without. concurrent: requests that are being answered."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(slots=True)
class Bucket:
    """A token bucket: full at first, refilled at ``per_minute``, never above a minute's worth. It may be overdrawn."""

    per_minute: int
    _level: float = field(init=False)
    _told: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._level = float(self.per_minute)

    def level(self, now: float) -> float:
        """What is in it."""
        gained = max(0.0, now - self._told) * self.per_minute / _MINUTE
        return min(float(self.per_minute), self._level + gained)

    def take(self, amount: float, now: float) -> None:
        """Take ``amount``, also what is not there."""
        self._level, self._told = self.level(now) - amount, max(now, self._told)

    def seconds_until(self, level: float, now: float) -> float:
        """How long until there is as much as ``level``; 0 when there is."""
        return max(0.0, level - self.level(now)) * _MINUTE / self.per_minute


@dataclass(slots=True)
class Account:
    """What one key has used of its limits."""

    name: str
    limits: KeyLimits
    in_flight: int = 0
    _requests: Bucket | None = field(init=False)
    _tokens: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        requests, tokens = self.limits.requests_per_minute, self.limits.tokens_per_minute
        self._requests = None if requests is None else Bucket(requests)
        self._tokens = None if tokens is None else Bucket(tokens)

    def enter(self, now: float) -> None:
        """Begin one request; ``leave`` must follow. Raises RateLimited, and then nothing was taken."""
        limits = self.limits
        if limits.concurrent is not None and self.in_flight >= limits.concurrent:
            raise self._refusal(f"{limits.concurrent} requests at a time", 1.0)
        # Tokens are charged when they are known, so a key waits while it has more than used up what it may have.
        for bucket, level, what in ((self._tokens, 0.0, "tokens"), (self._requests, 1.0, "requests")):
            wait = 0.0 if bucket is None else bucket.seconds_until(level, now)
            if bucket is not None and wait > _INSTANT_SECONDS:
                raise self._refusal(f"{bucket.per_minute} {what} a minute", wait)
        if self._requests is not None:
            self._requests.take(1, now)
        self.in_flight += 1

    def leave(self, tokens: int, now: float) -> None:
        """End one request that cost ``tokens``."""
        self.in_flight -= 1
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def _refusal(self, limit: str, seconds: float) -> RateLimited:
        whole = max(1, math.ceil(seconds))
        return RateLimited(f"the key '{self.name}' may have {limit}; try again in {whole} s", retry_after_seconds=whole)


@dataclass(slots=True)
class Admission:
    """How much the server takes at once: so many requests, and so many tokens that they may write; None: any."""

    requests: int
    tokens: int | None = None
    requests_in_flight: int = field(init=False, default=0)
    tokens_in_flight: int = field(init=False, default=0)

    def check(self) -> None:
        """Raise Overloaded where no request whatsoever is taken now: before its body is read."""
        if self.requests_in_flight >= self.requests:
            raise Overloaded(f"the server answers {self.requests} requests at a time; try again in a second")

    def admit(self, tokens: int) -> AbstractContextManager[None]:
        """Take a place for one request that may write ``tokens``; leaving the context gives it back.

        Raises Overloaded, or InvalidRequest when it would never fit."""
        if self.tokens is not None and tokens > self.tokens:
            raise InvalidRequest(
                f"the request may write {tokens} tokens, and this server writes {self.tokens} at a time; "
                "ask for less: max_tokens, n, samples or prompts"
            )
        self.check()
        if self.tokens is not None and self.tokens_in_flight + tokens > self.tokens:
            raise Overloaded(f"the server writes {self.tokens} tokens at a time; try again in a second")
        self.requests_in_flight += 1
        self.tokens_in_flight += tokens
        return self._place(tokens)

    @contextmanager
    def _place(self, tokens: int) -> Generator[None]:
        try:
            yield
        finally:
            self.requests_in_flight -= 1
            self.tokens_in_flight -= tokens
