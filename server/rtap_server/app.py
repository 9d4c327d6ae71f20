"""Build the service: vLLM's own app on a RecursiveEngine, our routes, and our middleware inside vLLM's."""

import asyncio
import secrets
from argparse import Namespace
from collections.abc import Callable
from http import HTTPMethod
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware import Middleware
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
from vllm.renderers.chat_utils import load_chat_template

from rtap_core.errors import ConfigError
from rtap_server.engine.recursive_engine import RecursiveEngine
from rtap_server.engine.server_state import ServerState
from rtap_server.http.admission import Admission
from rtap_server.http.api_keys import KeyRing
from rtap_server.http.auth import PROBE_PATHS, AuthMiddleware
from rtap_server.http.body_limits import BodyLimitsMiddleware, BodyMemory
from rtap_server.http.errors import install_handlers
from rtap_server.http.field_limits import FieldLimits, media_schemes
from rtap_server.http.recursion_fields import RecursionMiddleware
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.http.request_log import RequestLogMiddleware
from rtap_server.http.route_kinds import BLOCKED_PATHS, BLOCKED_WITH_KEYS
from rtap_server.http.schema import describe_rtap
from rtap_server.routes import page
from rtap_server.routes.models import models_router
from rtap_server.routes.ops import ops_router
from rtap_server.routes.rtap import ChatRenderer, rtap_router

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import Tracing


async def create_app(
    engine: EngineClient, args: Namespace, server: ServerState, keys: KeyRing, admission: Admission
) -> FastAPI:
    """The complete app. ``engine`` is the policy's AsyncLLM; vLLM's routes see it through the RecursiveEngine.

    Raises ConfigError when stored responses would be readable with any API key."""
    if envs.VLLM_ENABLE_RESPONSES_API_STORE and not keys.is_empty:
        raise ConfigError(
            "VLLM_ENABLE_RESPONSES_API_STORE=1 lets every API key read every stored response: unset it, or serve "
            "without API keys"
        )
    tracing = _tracing(args)
    recursive = cast(EngineClient, RecursiveEngine(engine, server, tracing))
    server.metrics.export_tasks(asyncio.get_running_loop())
    server.metrics.export_in_flight(lambda: admission.requests_in_flight)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(recursive, app.state, args, tasks)

    names = [m.name for m in app.state.openai_serving_models.base_model_paths]
    tokenizer = cast(ChatRenderer, engine.renderer.tokenizer)
    app.include_router(ops_router(engine, server.drain))
    template = {"chat_template": load_chat_template(args.chat_template)} | resolve_default_chat_template_kwargs(args)
    app.include_router(rtap_router(server, tokenizer, names, template))
    app.include_router(models_router(app.state.openai_serving_models))
    app.include_router(page.page_router())
    install_handlers(app)
    describe_rtap(app, server.settings)
    # vLLM's authentication leaves most routes open and knows one key; its request id middleware runs too far inside.
    replaced: list[object] = [AuthenticationMiddleware, XRequestIdMiddleware]
    app.user_middleware = [m for m in app.user_middleware if cast(object, m.cls) not in replaced]
    app.user_middleware += _middleware(app, args, server, keys, admission, tracing, engine.model_config.max_model_len)
    _keep_http_series(app)
    # build_app has built a stack already, without ours.
    app.middleware_stack = RequestIdMiddleware(app.build_middleware_stack())
    return app


def _middleware(
    app: FastAPI,
    args: Namespace,
    server: ServerState,
    keys: KeyRing,
    admission: Admission,
    tracing: "Tracing | None",
    max_model_len: int,
) -> list[Middleware]:
    """Our layers inside vLLM's (CORS, metrics), outermost first. RequestIdMiddleware is outside them all."""
    settings = server.settings
    layers: list[Middleware] = []
    if settings.log_format == "json" or tracing is not None:
        quiet = [route.strip() for route in (args.disable_access_log_for_endpoints or "").split(",")]
        logs = settings.log_format == "json"
        layers.append(Middleware(RequestLogMiddleware, logs=logs, tracing=tracing, quiet_routes=quiet))
    if not keys.is_empty:
        secret, open_paths = secrets.token_bytes(32), {*PROBE_PATHS, *page.FILES}
        layers.append(
            Middleware(AuthMiddleware, keys=keys, metrics=server.metrics, secret=secret, open_paths=open_paths)
        )
    field_limits = FieldLimits(
        n=settings.n_limit,
        messages=settings.messages_limit,
        token_ids=max_model_len,
        allows_templates=settings.allow_request_templates,
        media_schemes=media_schemes(args.allowed_media_domains, args.allowed_local_media_path),
    )
    return [
        *layers,
        Middleware(
            BodyLimitsMiddleware,
            routes=app.routes,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_seconds=settings.body_timeout_seconds,
            memory=BodyMemory(settings.max_body_bytes * max(1, settings.max_in_flight_requests // 8)),
            field_limits=field_limits,
            admission=admission,
            drain=server.drain,
            metrics=server.metrics,
            blocked_paths=BLOCKED_PATHS if keys.is_empty else BLOCKED_PATHS | BLOCKED_WITH_KEYS,
        ),
        Middleware(RecursionMiddleware, server=server, admission=admission, max_model_len=max_model_len),
    ]


def _tracing(args: Namespace) -> "Tracing | None":
    """Our spans, when vLLM sends its own; the engine has set up the exporter."""
    if not args.otlp_traces_endpoint:
        return None
    from opentelemetry.trace import get_tracer

    from rtap_server.telemetry.tracing import Tracing

    return Tracing(get_tracer("rtap"), (args.served_model_name or [args.model])[0])


def _keep_http_series(app: FastAPI) -> None:
    """Reuse the ``http_*`` counters of the stack that build_app has built, because a series registers only once.

    A method that is not one of HTTP's is counted as ``OTHER``, so that clients cannot create series."""

    def bounded(count: Callable[[Info], None]) -> Callable[[Info], None]:
        def counted(info: Info) -> None:
            info.method = info.method if info.method in HTTPMethod.__members__ else "OTHER"
            count(info)

        return counted

    layer: Any = app.middleware_stack
    while layer is not None and not isinstance(layer, PrometheusInstrumentatorMiddleware):
        layer = getattr(layer, "app", None)
    for middleware in app.user_middleware:
        if layer is not None and cast(object, middleware.cls) is PrometheusInstrumentatorMiddleware:
            middleware.kwargs["instrumentations"] = [bounded(count) for count in layer.instrumentations]
