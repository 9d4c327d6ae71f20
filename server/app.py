"""Build the service: vLLM's own app on a RecursiveEngine, our routes beside its, one middleware inside its stack."""

import secrets
from argparse import Namespace
from typing import cast

from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

from server.caps import Caps, media_schemes
from server.edge import Edge
from server.errors import install_handlers
from server.gate import Gate
from server.idempotency import Idempotency, Store
from server.intake import Intake
from server.keys import KeyRing
from server.limits import Admission
from server.middleware import RecursionMiddleware
from server.privacy import keep_logs_private
from server.recursive_engine import Plan, RecursiveEngine
from server.routes.ops import ops_router
from server.routes.rtap import ChatRenderer, rtap_router
from server.settings import Settings


async def create_app(
    engine: EngineClient, args: Namespace, settings: Settings, plan: Plan, keys: KeyRing, admission: Admission
) -> FastAPI:
    """The complete app. ``engine`` is the policy's AsyncLLM; routes of vLLM see it only through the recursion."""
    recursive = cast(EngineClient, RecursiveEngine(engine, plan))
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(recursive, app.state, args, tasks)

    names = [m.name for m in app.state.openai_serving_models.base_model_paths]
    tokenizer = cast(ChatRenderer, engine.renderer.tokenizer)
    app.include_router(ops_router(engine, plan.drain))
    app.include_router(rtap_router(plan, settings, tokenizer, names))
    install_handlers(app)
    # Outermost first. vLLM's own (CORS, metrics) are already there and stay outside ours. Its check of keys leaves most
    # routes open and knows one key only; the gate stands in its place, before any body is read. Its request ids are
    # whatever the client sends; the edge's are not.
    replaced: list[object] = [AuthenticationMiddleware, XRequestIdMiddleware]
    app.user_middleware = [m for m in app.user_middleware if cast(object, m.cls) not in replaced]
    if not keys.is_empty:
        app.user_middleware += [Middleware(Gate, keys=keys, metrics=plan.metrics, secret=secrets.token_bytes(32))]
    app.user_middleware += _around_work(args, settings, plan, admission, engine.model_config.max_model_len)
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
