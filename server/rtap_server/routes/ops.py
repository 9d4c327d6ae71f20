"""``/live`` and ``/ready``: is the process worth keeping, and should it get traffic. No key needed, no detail given."""

from typing import Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from rtap_server.engine.drain import Drain


class Engine(Protocol):
    """What of an engine says whether it lives."""

    @property
    def is_running(self) -> bool: ...

    @property
    def errored(self) -> bool: ...


def ops_router(engine: Engine, drain: Drain) -> APIRouter:
    """Liveness fails only when the policy's engine is dead, which one that makes no progress soon is (supervision.py);
    readiness also while the server is leaving."""
    router = APIRouter(tags=["operations"])

    @router.get("/live")
    async def live() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        alive = not engine.errored
        return JSONResponse({"status": "alive" if alive else "dead"}, status_code=200 if alive else 503)

    @router.get("/ready")
    async def ready() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        if drain.has_begun:
            return JSONResponse({"status": "draining"}, status_code=503)
        up = engine.is_running and not engine.errored
        return JSONResponse({"status": "ready" if up else "not ready"}, status_code=200 if up else 503)

    return router
