"""The door: with keys, nothing but ``/live``, ``/ready`` and the page's files is answered to those who show none.

Plain ASGI, inside vLLM's CORS middleware (which answers a real preflight itself and adds its headers to refusals) and
outside all that reads a body. It decides by the path that the router sees: an URL is rebuilt from the Host header,
which is the client's to choose.
"""

import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from rtap_core.errors import RateLimited, Unauthorized
from rtap_server.http.admission import Account
from rtap_server.http.api_keys import Key, KeyRing
from rtap_server.http.errors import response_to
from rtap_server.http.request_log import notes_of
from rtap_server.routes import page
from rtap_server.telemetry.metrics import Metrics

OPEN_PATHS = frozenset({"/live", "/ready", *page.FILES})  # the page's files hold no data; what it asks for is guarded
_METRICS = "/metrics"  # vLLM mounts them at everything that begins so
_POLICY_VIOLATION = 1008
_HALF_ID_BYTES = 16


@dataclass(slots=True)
class Visit:
    """One request of one key. salt: that of its prefix cache. spent_tokens: sampled and read for it so far."""

    salt: bytes
    spent_tokens: int = 0

    def salt_with(self, own: str | None) -> str:
        """A cache salt that no other key can name; ``own`` is what the client asked for and divides further."""
        return hmac.new(self.salt, b"" if own is None else b"=" + own.encode(), "sha256").hexdigest()

    def new_response_id(self) -> str:
        """An id that no other key can make, so that it shows whose response it is without being remembered."""
        nonce = secrets.token_hex(_HALF_ID_BYTES)
        return f"resp_{nonce}{self._mark(nonce)}"

    def owns_response(self, response_id: str) -> bool:
        """Whether ``new_response_id`` gave it to this key, in this process."""
        half = 2 * _HALF_ID_BYTES
        nonce, mark = response_id.removeprefix("resp_")[:half], response_id.removeprefix("resp_")[half:]
        return hmac.compare_digest(self._mark(nonce).encode(), mark.encode("utf-8", "replace"))

    def _mark(self, nonce: str) -> str:
        return hmac.new(self.salt, b"response" + nonce.encode("utf-8", "replace"), "sha256").hexdigest()[
            : 2 * _HALF_ID_BYTES
        ]


class Gate:
    """Around everything: 401 without a key, 429 above the limits of one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        metrics: Metrics,
        secret: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """secret: random bytes of this process; cache salts are made of it and a key's digest."""
        self._app, self._keys, self._metrics, self._secret, self._clock = app, keys, metrics, secret, clock
        self._accounts: dict[bytes, Account] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _visit.set(None)  # a pipelined request inherits the context of the one before it
        if scope["type"] not in ("http", "websocket") or get_route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            key = self._admitted(scope)
            account = self._account(key)
            is_counted = scope["type"] == "websocket" or scope["method"] == "POST"
            if is_counted:
                account.enter(self._clock())
        except (Unauthorized, RateLimited) as error:
            self._metrics.rejected("unauthorized" if isinstance(error, Unauthorized) else "key_limit")
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(error)[:120]})
            else:
                await response_to(error)(scope, receive, send)
            return
        notes_of(scope).key = key.name
        visit = Visit(hmac.digest(self._secret, key.digest, "sha256"))
        _visit.set(visit)
        try:
            await self._app(scope, receive, send)
        finally:
            _visit.set(None)
            if is_counted:
                account.leave(visit.spent_tokens, self._clock())

    def _admitted(self, scope: Scope) -> Key:
        """The key that opens this path. Raises Unauthorized."""
        presented = _presented(scope)
        key = None if presented is None else self._keys.find(presented)
        if key is None:
            what = "there is no API key" if presented is None else "this API key is not known"
            raise Unauthorized(f"{what}; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        is_metrics = get_route_path(scope).startswith(_METRICS)
        if key.opens_metrics_only and not is_metrics:
            raise Unauthorized("this API key opens /metrics only")
        if is_metrics and self._keys.guards_metrics and not key.opens_metrics_only:
            raise Unauthorized("/metrics takes an API key of scope 'metrics' only")
        return key

    def _account(self, key: Key) -> Account:
        """What the key has used. Other limits in the file begin a new account."""
        account = self._accounts.get(key.digest)
        if account is None or account.limits != key.limits:
            account = self._accounts[key.digest] = Account(key.name, key.limits)
        return account


def current_visit() -> Visit | None:
    """The visit that the running task is of; None where no keys are asked for."""
    return _visit.get()


def current_owner() -> bytes:
    """Whose request the running task answers: the same bytes for the same key, none where no keys are asked for."""
    visit = _visit.get()
    return b"" if visit is None else visit.salt


def salted(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt of vLLM's with the cache salt of the key that asks; as it was where none does."""
    visit = _visit.get()
    return dict(prompt) if visit is None else {**prompt, "cache_salt": visit.salt_with(prompt.get("cache_salt"))}


def _presented(scope: Scope) -> bytes | None:
    """What a request shows as its key: the bearer token, else ``x-api-key``, as Anthropic's clients send it."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key")


_visit: ContextVar[Visit | None] = ContextVar("rtap_visit", default=None)
