"""Limits of an API key and of the whole server. Pure: the caller passes the time, in monotonic seconds.

Nothing here waits: a request above a limit is refused with the seconds after which to retry.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rtap_core.errors import InvalidRequest, Overloaded, RateLimited

_MINUTE = 60.0
_ROUNDING_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of a key; None: unlimited. concurrent: requests in flight."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(slots=True)
class Bucket:
    """A token bucket of one minute's size, full at first and refilled at ``per_minute``. It may be overdrawn."""

    per_minute: int
    _level: float = field(init=False)
    _updated: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._level = float(self.per_minute)

    def level(self, now: float) -> float:
        """Amount available at ``now``."""
        gained = max(0.0, now - self._updated) * self.per_minute / _MINUTE
        return min(float(self.per_minute), self._level + gained)

    def take(self, amount: float, now: float) -> None:
        """Take ``amount``, even below zero."""
        self._level, self._updated = self.level(now) - amount, max(now, self._updated)

    def seconds_until(self, level: float, now: float) -> float:
        """Seconds until ``level`` is available."""
        return max(0.0, level - self.level(now)) * _MINUTE / self.per_minute


@dataclass(slots=True)
class Account:
    """Usage of one key."""

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
        """Start one request; ``leave`` must follow. Raises RateLimited and then takes nothing."""
        limits = self.limits
        if limits.concurrent is not None and self.in_flight >= limits.concurrent:
            raise self._refusal(f"{limits.concurrent} requests in flight", 1.0)
        # Tokens are charged when a request ends, so a key with an overdrawn bucket waits.
        for bucket, level, what in ((self._tokens, 0.0, "tokens"), (self._requests, 1.0, "requests")):
            wait = 0.0 if bucket is None else bucket.seconds_until(level, now)
            if bucket is not None and wait > _ROUNDING_SECONDS:
                raise self._refusal(f"{bucket.per_minute} {what} per minute", wait)
        if self._requests is not None:
            self._requests.take(1, now)
        self.in_flight += 1

    def leave(self, tokens: int, now: float) -> None:
        """End one request that used ``tokens``."""
        self.in_flight -= 1
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def _refusal(self, limit: str, seconds: float) -> RateLimited:
        whole = max(1, math.ceil(seconds))
        return RateLimited(
            f"API key '{self.name}' is limited to {limit}; retry in {whole} s", retry_after_seconds=whole
        )


@dataclass(slots=True)
class Admission:
    """Requests in flight and the tokens that they may generate. tokens: None is unlimited."""

    requests: int
    tokens: int | None = None
    requests_in_flight: int = field(init=False, default=0)
    tokens_in_flight: int = field(init=False, default=0)

    def check(self) -> None:
        """Raise Overloaded when no further request fits, so that its body need not be read."""
        if self.requests_in_flight >= self.requests:
            raise Overloaded(f"the server is at its limit of {self.requests} requests in flight; retry in a second")

    @contextmanager
    def admit(self, tokens: int) -> Generator[None]:
        """Count one request that may generate ``tokens`` while the context is open.

        Raises Overloaded, or InvalidRequest for a request that can never fit."""
        if self.tokens is not None and tokens > self.tokens:
            raise InvalidRequest(
                f"the request may generate {tokens} tokens, more than this server's limit of {self.tokens} in flight; "
                "lower max_tokens, n, samples or the number of prompts"
            )
        self.check()
        if self.tokens is not None and self.tokens_in_flight + tokens > self.tokens:
            raise Overloaded(f"the server is at its limit of {self.tokens} tokens in flight; retry in a second")
        self.requests_in_flight += 1
        self.tokens_in_flight += tokens
        try:
            yield
        finally:
            self.requests_in_flight -= 1
            self.tokens_in_flight -= tokens
