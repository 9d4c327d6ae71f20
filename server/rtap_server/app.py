"""Build the service: vLLM's own app on a RecursiveEngine, our routes beside its, our middleware inside its stack."""

import asyncio
import secrets
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from http import HTTPMethod
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware import Middleware
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

from rtap_server.engine.recursive_engine import RecursiveEngine
from rtap_server.engine.server_state import Plan
from rtap_server.http.admission import Admission
from rtap_server.http.api_keys import KeyRing
from rtap_server.http.auth import Gate
from rtap_server.http.body_limits import Intake
from rtap_server.http.errors import install_handlers
from rtap_server.http.field_limits import Caps, media_schemes
from rtap_server.http.idempotency import Idempotency, Store
from rtap_server.http.openapi import describe_rtap
from rtap_server.http.privacy import keep_logs_private
from rtap_server.http.recursion_fields import RecursionMiddleware
from rtap_server.http.request_id import Edge
from rtap_server.routes.ops import ops_router
from rtap_server.routes.page import page_router
from rtap_server.routes.rtap import ChatRenderer, rtap_router
from rtap_server.settings import Settings
from rtap_server.telemetry.logs import RequestLog

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import Tracing


async def create_app(
    engine: EngineClient, args: Namespace, settings: Settings, plan: Plan, keys: KeyRing, admission: Admission
) -> FastAPI:
    """The complete app. ``engine`` is the policy's AsyncLLM; routes of vLLM see it only through the recursion."""
    tracing = _tracing(args)
    recursive = cast(EngineClient, RecursiveEngine(engine, replace(plan, tracing=tracing)))
    plan.metrics.tasks(asyncio.get_running_loop())
    plan.metrics.in_flight(admission)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(recursive, app.state, args, tasks)

    names = [m.name for m in app.state.openai_serving_models.base_model_paths]
    tokenizer = cast(ChatRenderer, engine.renderer.tokenizer)
    app.include_router(ops_router(engine, plan.drain))
    app.include_router(rtap_router(plan, settings, tokenizer, names))
    app.include_router(page_router())
    install_handlers(app)
    describe_rtap(app, settings)
    # Outermost first. vLLM's own (CORS, metrics) are already there and stay outside ours. Its check of keys leaves most
    # routes open and knows one key only; the gate stands in its place, before any body is read. Its request ids are
    # whatever the client sends; the edge's are not.
    replaced: list[object] = [AuthenticationMiddleware, XRequestIdMiddleware]
    app.user_middleware = [m for m in app.user_middleware if cast(object, m.cls) not in replaced]
    if settings.log_format == "json":
        quiet = [route.strip() for route in (args.disable_access_log_for_endpoints or "").split(",")]
        app.user_middleware.append(Middleware(RequestLog, quiet_routes=quiet))
    if not keys.is_empty:
        app.user_middleware += [Middleware(Gate, keys=keys, metrics=plan.metrics, secret=secrets.token_bytes(32))]
    if tracing is not None:
        from rtap_server.telemetry.tracing import TracingMiddleware

        app.user_middleware.append(Middleware(TracingMiddleware, tracer=tracing.tracer))
    app.user_middleware += _around_work(args, settings, plan, admission, engine.model_config.max_model_len)
    _keep_http_series(app)
    app.middleware_stack = Edge(app.build_middleware_stack())  # build_app has built one already, without ours
    if not args.enable_log_requests:
        keep_logs_private()
    return app


def _around_work(
    args: Namespace, settings: Settings, plan: Plan, admission: Admission, max_model_len: int
) -> list[Middleware]:
    """What is done with a POST before a route of vLLM's sees it, outermost first."""
    caps = Caps(
        n=settings.n_limit,
        messages=settings.messages_limit,
        ids=max_model_len,
        allows_templates=settings.allow_request_templates,
        media_schemes=media_schemes(args.allowed_media_domains, args.allowed_local_media_path),
    )
    store = Store(
        settings.idempotency_seconds,
        settings.idempotency_grace_seconds,
        settings.idempotency_results,
        settings.idempotency_bytes,
    )
    return [
        Middleware(
            Intake,
            max_body_bytes=settings.max_body_bytes,
            caps=caps,
            admission=admission,
            drain=plan.drain,
            metrics=plan.metrics,
        ),
        Middleware(Idempotency, store=store, metrics=plan.metrics),
        Middleware(
            RecursionMiddleware,
            settings=settings,
            metrics=plan.metrics,
            feedback=plan.feedback,
            admission=admission,
            max_model_len=max_model_len,
        ),
    ]


def _tracing(args: Namespace) -> "Tracing | None":
    """Spans of ours, where vLLM has been told to send its own: the engine has set up the way there."""
    if not args.otlp_traces_endpoint:
        return None
    from opentelemetry.trace import get_tracer

    from rtap_server.telemetry.tracing import Tracing

    return Tracing(get_tracer("rtap"), (args.served_model_name or [args.model])[0])


def _keep_http_series(app: FastAPI) -> None:
    """The ``http_*`` series are registered when a stack is built. A second one would find them there, and its
    middleware would then count nothing; it takes the counters of the first. A method that is none of HTTP's is counted
    as ``OTHER``: anybody may make up one, and each would be a series."""

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
