"""Static files of the page at ``/``, with security headers.

The page contains no data, so it needs no API key; its requests to the server do. Paths are a fixed list.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent / "page"
# URL path -> file, served without an API key.
FILES: Mapping[str, str] = {
    "/": "index.html",
    "/page/page.css": "page.css",
    "/page/icon.svg": "icon.svg",
    "/page/main.js": "main.js",
    "/page/api.js": "api.js",
    "/page/controls.js": "controls.js",
    "/page/cycles.js": "cycles.js",
    "/page/dom.js": "dom.js",
    "/page/figures.js": "figures.js",
    "/page/run.js": "run.js",
    "/page/snippets.js": "snippets.js",
    "/page/view.js": "view.js",
}
# Same origin only, nothing inline, and trusted types: text never becomes markup.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # revalidated each time, because an upgrade changes the page
}


def page_router() -> APIRouter:
    """One GET and HEAD route for each file."""
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=_FOLDER)

    def serve(path: str, name: str) -> None:
        @router.api_route(path, methods=["GET", "HEAD"], name=f"page {name}")
        async def file(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            response = await files.get_response(name, request.scope)
            response.headers.update(HEADERS)
            return response

    for path, name in FILES.items():
        serve(path, name)
    return router
