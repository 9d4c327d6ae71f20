"""Liveness (``/live``) and readiness (``/ready``). They need no API key."""

from typing import Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from rtap_server.engine.server_state import Drain


class Engine(Protocol):
    """The part of an EngineClient that the probes use."""

    @property
    def is_running(self) -> bool: ...

    @property
    def errored(self) -> bool: ...


def ops_router(engine: Engine, drain: Drain) -> APIRouter:
    """Liveness fails when the policy's engine is dead (the supervisor kills a silent one); readiness also during a
    graceful shutdown."""
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
