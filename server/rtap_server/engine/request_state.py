"""State of one HTTP request, shared by the HTTP layers, the engine and the request log.

``RequestIdMiddleware`` creates it; a context variable carries it into vLLM's routes and the tasks they start.
"""

import hmac
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from rtap_core.types import Cycle, Limits, Trajectory


def _unlimited(_: int) -> None:
    """A request without an API key reserves nothing."""


@dataclass(slots=True)
class RequestState:
    """One request, from its first byte to its log line.

    request_id: value of the ``x-request-id`` header of the response; no part of any engine id.
    key_name: name of the API key. owner: opaque id of that key, empty when the server has no keys.
    spent_tokens: tokens sampled, and read outside the prefix cache, so far.
    tokens_per_minute: the key's limit. reserve_tokens: takes tokens from it, or raises RateLimited or InvalidRequest.
    max_tokens: upper bound for each trajectory, besides the request's own. started: monotonic seconds.
    body, fields: the raw body and its JSON object; ``fields`` is empty when the body is not JSON.
    limits: resolved recursion limits; None for a request that does not recurse.
    return_cycles: put the thinking of each cycle into the response.
    drafts: stream answers that are still to be judged, as draft events of a chat stream.
    prefix: text of the last message, when the model continues it. model: the requested model name.
    messages: the chat that vLLM rendered last, for a generator that reads chats; empty for other prompts.
    num_choices: choices started so far, over all prompts of the request.
    cycles: finished cycles that no streaming chunk has reported yet, each with its choice index.
    trajectories: finished trajectories by choice index.
    is_failure_logged: the log has the cause of this request's failure, under request_id.
    """

    request_id: str = ""
    key_name: str | None = None
    owner: bytes = b""
    spent_tokens: int = 0
    tokens_per_minute: int | None = None
    reserve_tokens: Callable[[int], None] = _unlimited
    max_tokens: int | None = None
    started: float = field(default_factory=time.monotonic)
    body: bytes = b""
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    limits: Limits | None = None
    return_cycles: bool = False
    drafts: bool = False
    prefix: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    model: str = ""
    num_choices: int = 0
    cycles: deque[tuple[int, Cycle]] = field(default_factory=deque[tuple[int, Cycle]])
    trajectories: dict[int, Trajectory] = field(default_factory=dict[int, Trajectory])
    is_failure_logged: bool = False

    def reserve_choices(self, count: int) -> int:
        """Index of the first of ``count`` new choices; prompts of a batch arrive in order."""
        first = self.num_choices
        self.num_choices += count
        return first


def begin_request(state: RequestState) -> None:
    """Make ``state`` that of the running task and of the tasks it starts."""
    _current.set(state)


def current_request() -> RequestState:
    """State of the running task's request; an empty one outside a request."""
    return _current.get() or RequestState()


def salted_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A vLLM prompt whose ``cache_salt`` keeps the prefix caches of API keys apart.

    The client's own salt divides the cache of its key further. Without keys the prompt is unchanged."""
    owner = current_request().owner
    if not owner:
        return dict(prompt)
    own: str | None = prompt.get("cache_salt")
    salt = hmac.new(owner, b"" if own is None else b"=" + own.encode(), "sha256").hexdigest()
    return {**prompt, "cache_salt": salt}


_current: ContextVar[RequestState | None] = ContextVar("rtap_request", default=None)
