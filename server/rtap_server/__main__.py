"""``rtap serve``: vLLM's argument parser with a group of R-TAP flags, then the service."""

import logging
import os
import socket
import sys
from argparse import Namespace
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from rtap_core.errors import ConfigError
from rtap_server.command_line import HELP, REFUSED, USAGE, bundled, cannot_listen, check, print_help, with_bundled
from rtap_server.doctor import engine_check, engine_package, has_nvidia_gpu
from rtap_server.http.api_keys import KeyRing, load_keys
from rtap_server.settings import Settings, add_flags, load_settings
from rtap_server.telemetry.logs import announce, drop_unwritable_output, hide_warnings, loading_progress, use_json

_MAX_HEADER_BYTES = 2**16  # uvicorn's own default; vLLM's is 4 MiB


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP. Returns the exit code: 0 after a clean stop, 1 after a failure, 2 for
    invalid settings."""
    drop_unwritable_output()
    words = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as `vllm serve` does
    try:
        if print_help(words):
            return 0
        checked = check(words, os.environ)
        is_verbose = "--verbose" in words if checked is None else checked.verbose
        _set_up_logs(is_verbose=is_verbose)
        args, settings, is_bundled = _parse(words, uvicorn_log_level="info" if is_verbose else "warning")
        return _run(args, settings, is_bundled=is_bundled)
    except ConfigError as error:
        announce(str(error), logging.ERROR)
        return 2


def _set_up_logs(*, is_verbose: bool) -> None:
    """Hide warnings of libraries, in engine processes too, unless they are asked for."""
    if is_verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    hide_warnings()


def _parse(argv: list[str], *, uvicorn_log_level: str = "info") -> tuple[Namespace, Settings, bool]:
    """(vLLM's arguments, settings, True when the bundled models are served)."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.exceptions import VLLMValidationError
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="rtap serve", usage=USAGE, epilog=HELP)
    make_arg_parser(parser)
    parser.set_defaults(
        model=None, h11_max_incomplete_event_size=_MAX_HEADER_BYTES, uvicorn_log_level=uvicorn_log_level
    )
    add_flags(parser)
    args = cast(Namespace, parser.parse_args(argv))
    values, environ = dict(vars(args)), dict(os.environ)
    model = args.model_tag or args.model
    is_bundled = model is None
    if is_bundled:
        model = bundled("policy")
        values = with_bundled(values, environ, None)
    args.model_tag = args.model = model
    args.served_model_name = args.served_model_name or _served_names(args, None if is_bundled else model)
    _use_reasoning_parser(args)
    _refuse_unsupported(args)
    settings = load_settings(values, environ)
    args.trust_request_chat_template = args.trust_request_chat_template or settings.allow_request_templates
    try:
        validate_parsed_serve_args(args)
    except VLLMValidationError as error:
        raise ConfigError(str(error)) from error
    if settings.log_format == "json":
        _log_as_json(args)
    if args.otlp_traces_endpoint:
        os.environ.setdefault("OTEL_SERVICE_NAME", "rtap")
    return args, settings, is_bundled


def _served_names(args: Namespace, model: str | None) -> list[str]:
    """Default of ``--served-model-name``: ``rtap``, with the named model as an alias."""
    adapters = [adapter.name for adapter in args.lora_modules or ()]
    return [name for name in ("rtap", model) if name is not None and name not in adapters]


def _use_reasoning_parser(args: Namespace) -> None:
    """Install our reasoning parser, through vLLM's plugin flags."""
    from rtap_server.engine.output_writer import REASONING_PARSER

    chosen = args.reasoning_parser or args.structured_outputs_config.reasoning_parser
    if chosen and chosen != REASONING_PARSER:
        raise ConfigError(
            f"leave out --reasoning-parser {chosen}: the trajectory format separates reasoning from answers"
        )
    args.reasoning_parser = args.structured_outputs_config.reasoning_parser = REASONING_PARSER
    plugin = str(Path(__file__).with_name("engine") / "reasoning_parser.py")
    args.reasoning_parser_plugin = args.structured_outputs_config.reasoning_parser_plugin = plugin


def _refuse_unsupported(args: Namespace) -> None:
    """Refuse vLLM flags that start anything but one API process, and a key on the command line."""
    if args.headless or args.grpc or (args.api_server_count or 1) > 1:
        raise ConfigError(REFUSED["--headless"])
    if args.api_key:
        raise ConfigError(REFUSED["--api-key"])


def _log_as_json(args: Namespace) -> None:
    """Turn on vLLM's JSON logs, its engine processes included, and give our lines the same shape."""
    from vllm.config.logging import LoggingConfig
    from vllm.logging_utils.formatter import JSON_FORMAT

    config: LoggingConfig = getattr(args, "logging_config", None) or LoggingConfig()
    if getattr(args, "log_config_file", None) or config.pylogging_config_file:
        raise ConfigError("--log-format json excludes a logging configuration file: leave out one of them")
    args.logging_config = replace(config, formatter="json")
    args.disable_uvicorn_access_log = True  # RequestLogMiddleware logs each request
    use_json(JSON_FORMAT)


def _run(args: Namespace, settings: Settings, *, is_bundled: bool) -> int:
    import uvloop
    from vllm.entrypoints.launchers.launcher import setup_server  # pyright: ignore[reportUnknownVariableType]

    from rtap_server.engine.engine_config import cpu_defaults
    from rtap_server.run import exit_on_signals

    keys = load_keys(settings.api_keys_file, os.environ)
    cpu_defaults(args, bundled=is_bundled, num_engines=2 if settings.confidence_kind == "pooling" else 1)
    args.host = args.host or "127.0.0.1"  # vLLM's default is all interfaces
    try:
        address, sock = setup_server(args, reuse_port=False)
    except (OSError, OverflowError) as error:
        raise ConfigError(cannot_listen(args.host, args.port, args.uds, error)) from error
    exit_on_signals()
    with sock:
        engine = engine_check(engine_package(), has_gpu=has_nvidia_gpu())
        if engine["status"] == "warning":
            announce(f"{engine['found']}. {engine['todo']}", logging.WARNING)
        failure = uvloop.run(_serve(args, settings, sock, address, keys))
    if failure is not None:
        announce(f"{failure}; the server exits with code 1", logging.ERROR)
    return 0 if failure is None else 1


async def _serve(args: Namespace, settings: Settings, sock: socket.socket, address: str, keys: KeyRing) -> str | None:
    """Why the server failed, or None after a clean stop."""
    from rtap_server.app import create_app
    from rtap_server.engine.loading import start_engines
    from rtap_server.engine.supervisor import Supervisor
    from rtap_server.http.admission import Admission
    from rtap_server.routes.rtap import server_facts, start_lines
    from rtap_server.run import serve_app

    async with AsyncExitStack() as stack:
        async with loading_progress(f"loading {args.model}"):
            engines = await stack.enter_async_context(start_engines(args, settings))
        server = engines.server
        admission = Admission(
            settings.max_in_flight_requests, settings.max_in_flight_tokens, settings.trajectories_limit
        )
        app = await create_app(engines.policy, args, server, keys, admission)
        supervisor = Supervisor(engines.supervised, server.metrics, settings.engine_silence_seconds, announce)
        for line in start_lines(server_facts(server, args.served_model_name), address, has_keys=not keys.is_empty):
            announce(line)
        return await serve_app(
            app,
            args,
            sock,
            drain=server.drain,
            drain_seconds=settings.drain_seconds,
            admission=admission,
            supervisor=supervisor,
        )


if __name__ == "__main__":
    sys.exit(main())
