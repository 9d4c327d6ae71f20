# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportUntypedClassDecorator=false, reportMissingTypeArgument=false
# Ray Serve's decorators and handles are only half typed.
"""Ray Serve application: one gateway, and replicas of the server that Ray starts, scales and replaces.

    serve run deploy/ray/config.yaml          from a checkout, or in the image, with the extra `ray`

Ray's consistent hashing over the conversation chooses replicas; autoscaling counts the requests of each replica.
"""

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp

from deploy.ray.gateway import Gateway, ReplicaLost
from deploy.ray.server_process import SERVE, ServerProcess, check_flags
from deploy.ray.traffic import ForwardedRequest, ResponseStart
from rtap_core.errors import Overloaded
from rtap_server.http.api_keys import load_keys
from rtap_server.http.auth import AuthMiddleware
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.telemetry.metrics import Metrics

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_BROADCAST_SECONDS = 4.0
_EXIT_SECONDS = 2.0


class FleetArgs(BaseModel):
    """``args`` of the Serve config.

    flags: of `rtap serve`, the same for every replica. api_keys_file: a path that exists on every node."""

    model_config = ConfigDict(extra="forbid")

    flags: list[str] = Field(default_factory=list)
    api_keys_file: Path | None = None
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)


@serve.deployment(
    max_ongoing_requests=256,
    request_router_config=RequestRouterConfig(
        request_router_class=cast(Any, _ROUTER),  # a name is accepted, though not annotated
        request_router_kwargs={"num_fallback_replicas": 1},
    ),
    health_check_period_s=5,
    health_check_timeout_s=15,
    graceful_shutdown_wait_loop_s=1,
    graceful_shutdown_timeout_s=620,  # above the ceiling of a request's deadline_seconds, 600
)
class Replica:
    """A server process on a Ray actor."""

    async def __init__(self, flags: Sequence[str], api_keys_file: Path | None, program: Sequence[str] = SERVE) -> None:
        self._server = await ServerProcess.start(flags, api_keys_file, program)
        self._watching = asyncio.create_task(self._exit_with_server())

    async def _exit_with_server(self) -> None:
        """Exit when the server ends: requests fail at once and go elsewhere, and Ray starts another replica now."""
        await self._server.ended()
        os._exit(1)

    async def send(self, request: ForwardedRequest) -> AsyncGenerator[ResponseStart | bytes]:
        """Forward a request. The reply names this replica in ``x-rtap-replica``."""
        try:
            async for part in self._server.send(request):
                if isinstance(part, ResponseStart):
                    part = ResponseStart(part.status, (*part.headers, (b"x-rtap-replica", _name().encode())))
                yield part
        except ReplicaLost:
            # Exit before the gateway retries: Ray then sends the retry to another replica.
            await asyncio.wait([self._watching], timeout=_EXIT_SECONDS)
            raise

    async def send_whole(self, request: ForwardedRequest) -> tuple[str, ResponseStart, bytes]:
        """This replica's name and its complete reply. Raises TimeoutError, so that no replica holds up the others."""
        async with asyncio.timeout(_BROADCAST_SECONDS):
            parts = [part async for part in self._server.send(request)]
        start = parts[0]
        assert isinstance(start, ResponseStart)
        body = b"".join(part for part in parts[1:] if isinstance(part, bytes))
        return _name(), start, body

    async def check_health(self) -> None:
        """Raise when Ray Serve must replace this replica. Not /ready: a full server is healthy."""
        if await self._server.status("/live") != 200:
            raise RuntimeError("the engine of this replica is dead")

    async def __del__(self) -> None:
        """Called by Ray Serve once, after the last request or the shutdown timeout."""
        if hasattr(self, "_server"):
            self._watching.cancel()
            await self._server.stop()


def _name() -> str:
    return serve.get_replica_context().replica_id.unique_id


class RayFleet:
    """``Fleet`` over a Ray Serve handle to the replicas."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle

    async def send(self, request: ForwardedRequest, conversation: str) -> AsyncGenerator[ResponseStart | bytes]:
        """See ``Fleet.send``."""
        reply: Any = self._handle.options(method_name="send", stream=True, session_id=conversation).remote(request)
        try:
            async for part in reply:
                yield part
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded("no replica is free; try again in a few seconds") from error
        except (RayActorError, RayServeException, TaskCancelledError) as error:
            raise ReplicaLost(str(error)) from error
        except RayTaskError as error:
            if isinstance(error.cause, ReplicaLost):
                raise ReplicaLost(str(error.cause)) from error
            raise
        finally:
            reply.cancel()  # no effect on a complete reply

    async def broadcast(self, request: ForwardedRequest) -> Mapping[str, tuple[ResponseStart, bytes]]:
        """See ``Fleet.broadcast``."""
        replies: list[Any] = []
        with contextlib.suppress(TimeoutError, RayActorError, RayServeException):
            called = self._handle.broadcast("send_whole", request)
            replies = await called.results_async(timeout_s=2 * _BROADCAST_SECONDS, return_exceptions=True)
        whole = [reply for reply in replies if isinstance(reply, tuple)]
        return {name: (start, body) for name, start, body in whole}


@serve.deployment(num_replicas=1, max_ongoing_requests=4096, graceful_shutdown_timeout_s=620)
@serve.ingress()
class FleetGateway:
    """Authentication and gateway. One replica, because it counts the limits of API keys for the whole fleet."""

    def __init__(self, handle: "DeploymentHandle[Any]", api_keys_file: Path | None, max_body_bytes: int) -> None:
        self._handle, self._api_keys_file, self._max_body_bytes = handle, api_keys_file, max_body_bytes

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve on the replica."""
        registry = CollectorRegistry()
        app: ASGIApp = Gateway(RayFleet(self._handle), registry, max_body_bytes=self._max_body_bytes)
        keys = load_keys(self._api_keys_file, os.environ)
        if not keys.is_empty:
            app = AuthMiddleware(app, keys=keys, metrics=Metrics(registry), secret=secrets.token_bytes(32))
        return RequestIdMiddleware(ServerErrorMiddleware(app))  # without it Ray answers a failure with its traceback


def build(args: FleetArgs) -> serve.Application:
    """The application of deploy/ray/config.yaml. Raises ValueError for flags that the fleet sets."""
    check_flags(args.flags)
    load_keys(args.api_keys_file, os.environ)  # a broken file fails here instead of in every replica
    replica = Replica.bind(args.flags, args.api_keys_file)
    return FleetGateway.bind(replica, args.api_keys_file, args.max_body_bytes)
