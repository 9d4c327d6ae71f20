"""Classify POST routes: recursive, generating, lightweight, blocked.

A test walks the app's routes and fails on a POST route that is in none of these tables.
"""

from collections.abc import Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import Scope

RECURSIVE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})

# Routes that run a model without recursion. They count as requests in flight; True: their tokens count as well.
GENERATING_PATHS = {
    "/inference/v1/generate": True,
    "/v1/audio/transcriptions": True,
    "/v1/audio/translations": True,
    "/generative_scoring": False,
    "/v1/systemone": False,
    "/v1/rtap/score": False,
    "/pooling": False,
    "/classify": False,
    "/score": False,
    "/v1/score": False,
    "/rerank": False,
    "/v1/rerank": False,
    "/v2/rerank": False,
    "/v1/embeddings": False,
    "/v2/embed": False,
}

# Routes whose body is a form with a file; all others take JSON.
MULTIPART_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})

# Routes where vLLM tokenises on the event loop.
TOKENISING_PATHS = frozenset({"/generative_scoring", "/v1/systemone"})

LIGHTWEIGHT_PATHS = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
        "/v1/responses/{response_id}/cancel",
        "/inference/v1/abort_requests",
        "/v1/rtap/feedback",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/ping",
    }
)

# Routes that vLLM mounts whatever its flags: generation around the recursion, and the restart of engines. With the
# reason that the error gives.
_NOT_RECURSIVE = "it does not recurse; send single requests to /v1/chat/completions"
BLOCKED_PATHS = {
    "/v1/chat/completions/batch": _NOT_RECURSIVE,
    "/invocations": _NOT_RECURSIVE,
    "/scale_elastic_ep": "this server scales by replicas",
    "/is_scaling_elastic_ep": "this server scales by replicas",
}
_ABORT = "request ids are shared by all API keys; close the connection of the request to abort"
BLOCKED_WITH_KEYS = {"/abort_requests": _ABORT, "/inference/v1/abort_requests": _ABORT}


class PostRoutes:
    """Paths that have a POST route. The router matches a superset of these, so that no body reaches any other path."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        posts = [route for route in routes if isinstance(route, Route) and "POST" in (route.methods or ())]
        self._paths = frozenset(route.path for route in posts)
        self._patterns = [route.path_regex for route in posts if route.param_convertors]

    def __contains__(self, path: str) -> bool:
        return path in self._paths or any(pattern.match(path) for pattern in self._patterns)


def route_path(scope: Scope) -> str:
    """The path that the router matches: ``path`` without the ``root_path`` that a proxy prefix adds (ASGI spec)."""
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and (path == root or path.startswith(f"{root}/")) else path
