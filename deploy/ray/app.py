# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportUntypedClassDecorator=false, reportMissingTypeArgument=false
# Ray Serve's decorators and handles are only half typed.
"""The Ray Serve application: one gateway, and replicas of the server that Ray starts, scales, watches and replaces.

    serve run deploy/ray/config.yaml          from a checkout, or in the image, with the extra `ray`

Stickiness is Ray's own consistent hashing over the conversation; autoscaling counts the requests that each replica is
answering. Only this file knows Ray.
"""

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from deploy.ray.child import Child, check_flags
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deploy.ray.gateway import Gateway, ReplicaLost
from deploy.ray.traffic import Asked, Head
from rtap_server.http.api_keys import load_keys
from rtap_server.http.auth import Gate
from rtap_server.telemetry.metrics import Metrics

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_WHOLE_SECONDS = 4.0


class FleetArgs(BaseModel):
    """What the Serve config's ``args`` may say. flags: of `rtap serve`, the same for every replica. api_keys_file: must
    be there on every node."""

    model_config = ConfigDict(extra="forbid")

    flags: list[str] = Field(default_factory=list)
    api_keys_file: Path | None = None
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)


@serve.deployment(
    max_ongoing_requests=256,
    request_router_config=RequestRouterConfig(
        request_router_class=cast(Any, _ROUTER),  # a name is taken, though not annotated
        request_router_kwargs={"num_fallback_replicas": 1},
    ),
    health_check_period_s=5,
    health_check_timeout_s=15,
    graceful_shutdown_wait_loop_s=1,
    graceful_shutdown_timeout_s=620,  # above the ceiling of a request's deadline_seconds, 600
)
class Replica:
    """A server process and the way to it."""

    async def __init__(self, flags: Sequence[str], api_keys_file: Path | None) -> None:
        self._child = await Child.start(flags, api_keys_file)
        self._watching = asyncio.create_task(self._end_with_it())

    async def _end_with_it(self) -> None:
        """A server that ends takes its replica along: requests fail at once and are asked elsewhere, and Ray starts
        another one now instead of at its next health check."""
        await self._child.ended()
        os._exit(1)

    async def ask(self, asked: Asked) -> AsyncGenerator[Head | bytes]:
        """See Child. The head names this replica in ``x-rtap-replica``."""
        async for part in self._child.ask(asked):
            if isinstance(part, Head):
                part = Head(part.status, (*part.headers, (b"x-rtap-replica", _name().encode())))
            yield part

    async def ask_whole(self, asked: Asked) -> tuple[str, Head, bytes]:
        """This replica's name and its whole reply. Raises TimeoutError: one that hangs must not hold up the others."""
        async with asyncio.timeout(_WHOLE_SECONDS):
            parts = [part async for part in self._child.ask(asked)]
        head = parts[0]
        assert isinstance(head, Head)
        body = b"".join(part for part in parts[1:] if isinstance(part, bytes))
        return _name(), head, body

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here. Not /ready: a full server is a healthy one."""
        if await self._child.status("/live") != 200:
            raise RuntimeError("the engine of this replica is dead")

    async def __del__(self) -> None:
        """Ray Serve calls it once, when the last request has been answered or its patience has ended."""
        if hasattr(self, "_child"):
            self._watching.cancel()
            await self._child.stop()


def _name() -> str:
    return serve.get_replica_context().replica_id.unique_id


class RayFleet:
    """The Fleet of deploy/ray/gateway.py over a handle to the replicas."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle

    async def ask(self, asked: Asked, conversation: str) -> AsyncGenerator[Head | bytes]:
        """See Fleet."""
        reply: Any = self._handle.options(method_name="ask", stream=True, session_id=conversation).remote(asked)
        try:
            async for part in reply:
                yield part
        except (RayActorError, RayServeException, TaskCancelledError) as error:
            raise ReplicaLost(str(error)) from error
        except RayTaskError as error:
            if isinstance(error.cause, ReplicaLost):
                raise ReplicaLost(str(error.cause)) from error
            raise
        finally:
            reply.cancel()  # nothing where the reply is complete

    async def ask_all(self, asked: Asked) -> Mapping[str, tuple[Head, bytes]]:
        """See Fleet."""
        replies: list[Any] = []
        with contextlib.suppress(TimeoutError, RayActorError, RayServeException):
            called = self._handle.broadcast("ask_whole", asked)
            replies = await called.results_async(timeout_s=2 * _WHOLE_SECONDS, return_exceptions=True)
        whole = [reply for reply in replies if isinstance(reply, tuple)]
        return {name: (head, body) for name, head, body in whole}


@serve.deployment(num_replicas=1, max_ongoing_requests=4096, graceful_shutdown_timeout_s=620)
@serve.ingress()
class Door:
    """Gate and gateway. One replica: it counts the limits of keys for the whole fleet."""

    def __init__(self, handle: "DeploymentHandle[Any]", api_keys_file: Path | None, max_body_bytes: int) -> None:
        self._handle, self._api_keys_file, self._max_body_bytes = handle, api_keys_file, max_body_bytes

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve on the replica."""
        registry = CollectorRegistry()
        gateway = Gateway(RayFleet(self._handle), registry, max_body_bytes=self._max_body_bytes)
        keys = load_keys(self._api_keys_file, os.environ)
        if keys.is_empty:
            return gateway
        return Gate(gateway, keys=keys, metrics=Metrics(registry), secret=secrets.token_bytes(32))


def build(args: FleetArgs) -> serve.Application:
    """The application that deploy/ray/config.yaml names. Raises ValueError for flags that a replica must not have."""
    check_flags(args.flags)
    load_keys(args.api_keys_file, os.environ)  # a broken file is told here, not by replicas that never come up
    return Door.bind(Replica.bind(args.flags, args.api_keys_file), args.api_keys_file, args.max_body_bytes)
