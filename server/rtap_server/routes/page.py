"""The page at ``/``: static files beside this module, each with the headers that keep it harmless.

It carries no data and no key, so it is open where keys are asked for; what it then asks the server for is not. Files
are listed by name: nothing in a path chooses one.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent / "page"
# Path of the URL -> file. ``http/auth.py`` lets these pass without a key.
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
# Scripts, styles and requests of this origin only; nothing inline, and no text ever becomes markup (trusted types).
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
    "Cache-Control": "no-cache",  # kept by the browser, and asked about each time: an upgraded server has a new page
}


def page_router() -> APIRouter:
    """One GET route a file."""
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
