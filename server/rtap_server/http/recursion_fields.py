"""Recursion around vLLM's routes: read the ``rtap`` fields of a request, admit it, rewrite its response."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import msgspec
from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from rtap_core.artifact import Artifact
from rtap_core.errors import InvalidRequest, RtapError
from rtap_core.types import Continuation, Limits, Policy, Select
from rtap_core.voting import CONFIDENCE_THRESHOLD, COUNT_THRESHOLD
from rtap_server.engine.request_state import RequestState, current_request
from rtap_server.engine.server_state import ServerState
from rtap_server.http.admission import Admission, Demand
from rtap_server.http.errors import error_response, rejection_reason, shortened
from rtap_server.http.field_limits import lax_int
from rtap_server.http.response_rewriter import ResponseRewriter
from rtap_server.http.route_kinds import GENERATING_PATHS, RECURSIVE_PATHS, route_path
from rtap_server.http.schema import EFFORTS, RtapOptions
from rtap_server.settings import Settings

_XARGS_PREFIX = "rtap_"
_EXPECTED_TOKENS = 4096  # of a trajectory without max_tokens; it may generate more
_LAX_BOOL = TypeAdapter(bool)  # as vLLM's requests parse a boolean
_UNSUPPORTED = {
    "use_beam_search": "beam search has no cycles to stop; leave out use_beam_search",
    "background": "a background response would escape this server's limits; leave out background",
}


class RecursionMiddleware:
    """Admit POST requests that run a model, and make those of the four recursive endpoints recurse.

    Plain ASGI, because a buffering middleware breaks streaming and disconnects."""

    def __init__(self, app: ASGIApp, *, server: ServerState, admission: Admission, max_model_len: int) -> None:
        self._app, self._server, self._admission, self._max_model_len = app, server, admission, max_model_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        is_recursive = path in RECURSIVE_PATHS
        if scope["type"] != "http" or scope["method"] != "POST" or not (is_recursive or path in GENERATING_PATHS):
            await self._app(scope, receive, send)
            return
        state = current_request()
        with ExitStack() as admitted:
            try:
                if is_recursive:
                    read_recursion_fields(state, path, self._server)
                demand = read_demand(state, path, max_model_len=self._max_model_len)
                admitted.enter_context(self._admission.admit(demand))
                state.reserve_tokens(demand.tokens)
            except RtapError as error:
                self._server.metrics.count_rejected(rejection_reason(error))
                await error_response(error)(scope, receive, send)
                return
            await self._app(scope, receive, ResponseRewriter(send, path, state, self._server.feedback))


def read_recursion_fields(state: RequestState, path: str, server: ServerState) -> None:
    """Resolve the recursion fields of ``state.fields`` into ``state``, once, and take ``rtap`` out of its body.

    Raises InvalidRequest."""
    fields = state.fields
    for name, reason in _UNSUPPORTED.items():
        if fields.get(name):
            raise InvalidRequest(reason, param=name)
    min_tokens = lax_int(fields.get("min_tokens"))
    if server.format.has_answer_tags and min_tokens is not None and min_tokens > 0:
        raise InvalidRequest(
            f"min_tokens={min_tokens} would force the model past the end of its answer, which it marks with "
            f"{server.format.answer_close}; leave out min_tokens",
            param="min_tokens",
        )
    options = parse_options(fields, server.settings)
    state.limits = resolve_limits(
        options, server.settings, server.generator, has_confidence=server.confidence is not None, effort=effort(fields)
    )
    state.return_cycles = options.return_cycles
    state.drafts = options.drafts and path == "/v1/chat/completions"
    state.prefix = continued_text(path, fields)
    model = fields.get("model")
    state.model = model if isinstance(model, str) else ""
    if "rtap" in fields:  # a field that vLLM does not know
        state.body = msgspec.json.encode({name: value for name, value in fields.items() if name != "rtap"})


def parse_options(fields: Mapping[str, Any], settings: Settings) -> RtapOptions:
    """Options of a request: its ``rtap`` object, or entries of ``vllm_xargs`` named ``rtap_<field>``.

    Raises InvalidRequest for a wrong field, a value above the server's ceiling, and for both forms at once."""
    xargs: Any = fields.get("vllm_xargs")
    entries = cast(dict[str, Any], xargs) if isinstance(xargs, dict) else {}
    from_xargs = {k.removeprefix(_XARGS_PREFIX): v for k, v in entries.items() if k.startswith(_XARGS_PREFIX)}
    if from_xargs and "rtap" in fields:
        raise InvalidRequest("give the rtap options once: in 'rtap' or in 'vllm_xargs'", param="rtap")
    if from_xargs:
        return _validated(from_xargs, settings, where="vllm_xargs.rtap_*")
    return _validated(fields["rtap"], settings, where="rtap") if "rtap" in fields else RtapOptions()


def _validated(raw: Any, settings: Settings, *, where: str) -> RtapOptions:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where}={shortened(raw)} must be an object such as {{'threshold': 0.8}}", param=where)
    try:
        options = RtapOptions.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        name = shortened(".".join(str(part) for part in first["loc"]))[1:-1]
        param = f"{where}.{name}"
        if first["type"] == "extra_forbidden":
            known = ", ".join(RtapOptions.model_fields)
            raise InvalidRequest(f"unknown field {param}; known: {known}", param=param) from error
        raise InvalidRequest(f"{param}={shortened(first['input'])}: {first['msg']}", param=param) from error
    for name in ("max_cycles", "samples", "deadline_seconds"):
        value, limit = getattr(options, name), getattr(settings, f"{name}_limit")
        if value is not None and value > limit:
            raise InvalidRequest(
                f"{where}.{name}={value} is above this server's limit of {limit}", param=f"{where}.{name}"
            )
    return options


def resolve_limits(
    options: RtapOptions, settings: Settings, generator: Artifact, *, has_confidence: bool, effort: str | None = None
) -> Limits:
    """Limits of one request: its options, else its effort's, else the server's, else those of the generator's artifact
    (of a vote: COUNT_THRESHOLD, or CONFIDENCE_THRESHOLD where calibrated confidences weigh the answers).

    ``max_tokens`` is left to the engine, which knows vLLM's default for it. An unknown effort is vLLM's to refuse.
    Raises InvalidRequest when the policy needs a confidence generator and none is loaded."""
    default_policy = settings.policy or (Policy.CONFIDENCE if has_confidence else Policy.MODEL)
    policy = options.policy or default_policy
    if policy is Policy.CONFIDENCE and not has_confidence:
        raise InvalidRequest(
            "policy 'confidence' needs a confidence generator, and this server has none; "
            "use policy 'model' or start the server with --confidence-model",
            param="rtap.policy",
        )
    default_select = Select.BEST if policy is Policy.CONFIDENCE else Select.LAST
    level = EFFORTS.get(effort or "", EFFORTS["medium"])
    is_weighted = has_confidence and generator.is_calibrated
    of_vote = CONFIDENCE_THRESHOLD if is_weighted else COUNT_THRESHOLD
    of_policy = of_vote if policy is Policy.VOTE else generator.threshold
    threshold = next(v for v in (settings.threshold, of_policy, 0.5) if v is not None)
    max_cycles = min(max(1, round(settings.max_cycles * level.max_cycles_factor)), settings.max_cycles_limit)
    return Limits(
        policy=policy,
        threshold=threshold + level.threshold_raise * (1 - threshold)
        if options.threshold is None
        else options.threshold,
        max_cycles=options.max_cycles or max_cycles,
        samples=options.samples or settings.samples,
        select=options.select or settings.select or default_select,
        recursion=options.recursion or settings.recursion or Continuation.CONTINUE,
        patience=options.patience or settings.patience,
        deadline_seconds=options.deadline_seconds or settings.deadline_seconds or settings.deadline_seconds_limit,
    )


def read_demand(state: RequestState, path: str, *, max_model_len: int) -> Demand:
    """Upper bounds of a request. Sets ``state.max_tokens`` for a key with a token limit and a request without one."""
    if not GENERATING_PATHS.get(path, True):
        return Demand()
    params: Any = state.fields.get("sampling_params")
    fields = cast(dict[str, Any], params) if isinstance(params, dict) else state.fields
    trajectories, max_tokens = count_trajectories(fields, state.limits), asked_tokens(fields)
    if max_tokens is None:
        max_tokens = _EXPECTED_TOKENS
        if state.tokens_per_minute is not None:
            state.max_tokens = max(1, state.tokens_per_minute // trajectories)
            max_tokens = min(max_tokens, state.max_tokens)
    return Demand(trajectories, trajectories * min(max_tokens, max_model_len))


def count_trajectories(fields: Mapping[str, Any], limits: Limits | None) -> int:
    """Prompts x n x samples of a vote. Wrong types are vLLM's to refuse."""
    samples = limits.samples if limits is not None and limits.policy is Policy.VOTE else 1
    prompt: Any = fields.get("prompt")
    items = cast(list[Any], prompt) if isinstance(prompt, list) else []
    prompts = 1 if items and isinstance(items[0], int) else max(1, len(items))  # a list of token ids is one prompt
    return max(1, lax_int(fields.get("n")) or 1) * samples * prompts


def asked_tokens(fields: Mapping[str, Any]) -> int | None:
    """The request's own limit of tokens for each trajectory; None without one. Wrong types are vLLM's to refuse."""
    names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    given = next((value for name in names if (value := lax_int(fields.get(name))) is not None), None)
    return None if given is None else max(1, given)


def effort(fields: Mapping[str, Any]) -> str | None:
    """The reasoning effort of a request to any of the four endpoints. Wrong types are vLLM's to refuse."""

    def inside(name: str) -> Mapping[str, Any]:
        value = fields.get(name)
        return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}

    is_disabled = inside("thinking").get("type") == "disabled"  # /v1/messages
    given = fields.get("reasoning_effort") or inside("reasoning").get("effort") or inside("output_config").get("effort")
    return "none" if is_disabled else given if isinstance(given, str) else None


def continued_text(path: str, fields: Mapping[str, Any]) -> str:
    """Text of the last message when the request asks the model to continue it; else empty. Wrong types are vLLM's to
    refuse."""
    items: Any = fields.get({"/v1/chat/completions": "messages", "/v1/responses": "input"}.get(path, ""))
    if not isinstance(items, list) or not items or not isinstance(items[-1], dict):
        return ""
    last = cast(dict[str, Any], items[-1])
    if path == "/v1/responses":
        is_continued = last.get("status") in ("in_progress", "incomplete") and last.get("type", "message") == "message"
    else:
        try:
            is_continued = _LAX_BOOL.validate_python(fields.get("continue_final_message") or False)
        except ValidationError:
            is_continued = False
    content: Any = last.get("content") if is_continued else None
    if isinstance(content, list):
        parts = [cast(dict[str, Any], part) for part in cast(list[Any], content) if isinstance(part, dict)]
        texts: list[Any] = [part.get("text") for part in parts]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""
