"""API key authentication and per-key limits.

With keys configured every route needs one, except liveness, readiness and the page's static files. Plain ASGI, inside
vLLM's CORS middleware and before any body is read. It decides by the path that the router matches: a URL is rebuilt
from the Host header, which the client chooses.
"""

import hmac
import time
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from rtap_core.errors import RateLimited, Unauthorized
from rtap_server.engine.request_state import current_request
from rtap_server.http.admission import Account
from rtap_server.http.api_keys import Key, KeyRing
from rtap_server.http.errors import error_response, rejection_reason
from rtap_server.http.route_kinds import route_path
from rtap_server.telemetry.metrics import Metrics

PROBE_PATHS = frozenset({"/live", "/ready"})
_METRICS = "/metrics"  # vLLM mounts its metrics under every path with this prefix
_POLICY_VIOLATION = 1008


class AuthMiddleware:
    """Answer 401 without a valid key and 429 above a key's limits. Runs inside RequestIdMiddleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        metrics: Metrics,
        secret: bytes,
        open_paths: Collection[str] = PROBE_PATHS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """secret: random bytes of this process; with a key's digest they make its ``owner`` id."""
        self._app, self._keys, self._metrics, self._secret, self._clock = app, keys, metrics, secret, clock
        self._open_paths = frozenset(open_paths)
        self._accounts: dict[bytes, Account] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or route_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
            return
        try:
            key = self._authenticate(scope)
            is_counted = scope["type"] == "websocket" or scope["method"] == "POST"
            usage = self._account(key).enter(self._clock()) if is_counted else None
        except (Unauthorized, RateLimited) as error:
            self._metrics.count_rejected(rejection_reason(error))
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(error)[:120]})
            else:
                await error_response(error)(scope, receive, send)
            return
        state = current_request()
        state.key_name, state.owner = key.name, hmac.digest(self._secret, key.digest, "sha256")
        if usage is None:
            await self._app(scope, receive, send)
            return
        state.tokens_per_minute = key.limits.tokens_per_minute
        state.reserve_tokens = lambda tokens: usage.reserve(tokens, self._clock())
        try:
            await self._app(scope, receive, send)
        finally:
            usage.leave(state.spent_tokens, self._clock())

    def _authenticate(self, scope: Scope) -> Key:
        """The key that opens this path. Raises Unauthorized."""
        presented = _presented_key(scope)
        key = None if presented is None else self._keys.find(presented)
        if key is None:
            problem = "no API key was sent" if presented is None else "this API key is unknown"
            raise Unauthorized(f"{problem}; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        is_metrics = route_path(scope).startswith(_METRICS)
        if key.opens_metrics_only and not is_metrics:
            raise Unauthorized("this API key opens /metrics only")
        if is_metrics and self._keys.guards_metrics and not key.opens_metrics_only:
            raise Unauthorized("/metrics needs an API key of scope 'metrics'")
        return key

    def _account(self, key: Key) -> Account:
        """Usage of a key. Changed limits in the keys file start a new account."""
        account = self._accounts.get(key.digest)
        if account is None or account.limits != key.limits:
            account = self._accounts[key.digest] = Account(key.name, key.limits)
        return account


def _presented_key(scope: Scope) -> bytes | None:
    """The bearer token, else ``x-api-key``, which Anthropic's clients send."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key")
