"""Structured logs (``--log-format json``): one JSON object a line for vLLM, uvicorn and us, and one line a request.

The shape is that of vLLM's own JSON formatter. A request's line has fields of its own, from a fixed list; nothing of a
prompt, an answer, a query string or a key is among them, and of a path only the route that took it.
"""

import logging
import re
import sys
import time
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from pythonjsonlogger.json import JsonFormatter
from starlette._utils import get_route_path
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_server.http.request_id import REQUEST_ID
from rtap_server.http.request_log import Notes, notes_of, outcome
from rtap_server.http.route_kinds import RECURSIVE_PATHS

LOGGER = "rtap"
REQUESTS = "rtap.requests"
# Asked for every few seconds by what watches a server; told only where the answer is not 200.
_PROBED = frozenset({"/live", "/ready", "/health", "/metrics"})
_CLIENT_LEFT = 499  # nginx's number for a request whose client did not wait for its reply
_TRACE_ID = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-")


def announce(message: str, level: int = logging.INFO) -> None:
    """One of the command's own sentences: on stderr as it is, or as a line of the JSON log where there is one."""
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        logger.log(level, message)
    else:
        print(f"rtap serve: {message}", file=sys.stderr)  # noqa: T201 - the command's own message


def use_json(fields: str) -> None:
    """Make the lines of this process that are neither vLLM's nor uvicorn's JSON objects. fields: of every line, as a
    logging format names them."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(fields))
    ours, root = logging.getLogger(LOGGER), logging.getLogger()
    ours.handlers, root.handlers = [handler], [handler]  # root: every other library, warnings among them
    ours.propagate = False
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)


class RequestLog:
    """Around everything but the edge, whose request id it tells: one line when a request is over."""

    def __init__(self, app: ASGIApp, *, quiet_routes: Collection[str] = ()) -> None:
        """quiet_routes: routes that are never told."""
        self._app, self._quiet = app, frozenset(quiet_routes)
        self._logger = logging.getLogger(REQUESTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id, notes, status = time.perf_counter(), _request_id(scope), notes_of(scope), None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_failed = True
        try:
            await self._app(scope, receive, told)
            is_failed = False
        except Exception:
            status = 500  # what the server answers outside of us, or has cut off
            raise
        finally:
            if status is None:
                status = 500 if is_failed else _CLIENT_LEFT
            self._tell(scope, notes, request_id, status, time.perf_counter() - began)

    def _tell(self, scope: Scope, notes: Notes, request_id: str, status: int, seconds: float) -> None:
        route = _route(scope)
        if route in self._quiet or (route in _PROBED and status == 200):
            return
        fields: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
        fields["seconds"] = round(seconds, 6)
        if notes.key is not None:
            fields["key"] = notes.key
        trace = next((_TRACE_ID.match(value) for name, value in scope["headers"] if name == b"traceparent"), None)
        if trace is not None:
            fields["trace_id"] = trace[1].decode()
        result = outcome(notes.exchange)
        if result is not None:
            fields |= {name: value for name, value in asdict(result).items() if value is not None}
        self._logger.info("%s %s %d", scope["method"], route, status, extra=fields)


def _request_id(scope: Scope) -> str:
    return next((value.decode() for name, value in scope["headers"] if name == REQUEST_ID), "")


def _route(scope: Scope) -> str:
    """The pattern of the route that took a request, or would have: what a client may write into a path is its own."""
    path = get_route_path(scope)
    if path in RECURSIVE_PATHS:
        return path
    # Not by what the router leaves in its scope: a layer between here and there may have copied that.
    matches = ((route.matches(scope)[0], getattr(route, "path", None)) for route in scope["app"].routes)
    return next((str(pattern) for match, pattern in matches if match is not Match.NONE and pattern), "unknown")
