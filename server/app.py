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

from server.errors import install_handlers
from server.gate import Gate
from server.keys import KeyRing
from server.limits import Admission
from server.middleware import RecursionMiddleware
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
    # Outermost first. vLLM's own (CORS, request ids, metrics) are already there and stay outside ours. Its check of
    # keys leaves most routes open and knows one key only; the gate stands in its place, before any body is read.
    app.user_middleware = [m for m in app.user_middleware if cast(object, m.cls) is not AuthenticationMiddleware]
    if not keys.is_empty:
        app.user_middleware += [Middleware(Gate, keys=keys, metrics=plan.metrics, secret=secrets.token_bytes(32))]
    app.user_middleware += [
        Middleware(
            RecursionMiddleware,
            settings=settings,
            metrics=plan.metrics,
            feedback=plan.feedback,
            admission=admission,
            drain=plan.drain,
            max_model_len=engine.model_config.max_model_len,
            allows_media_urls=bool(args.allowed_media_domains),
        )
    ]
    app.middleware_stack = app.build_middleware_stack()  # build_app has built one already, without ours
    return app
