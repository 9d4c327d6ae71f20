"""Routes under ``/v1/rtap``: score an existing answer, accept feedback on answers, report the configuration."""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol, cast

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from rtap_core.errors import ConfidenceError, InvalidRequest
from rtap_core.types import Judged, Policy
from rtap_server import __version__
from rtap_server.engine.request_state import current_request
from rtap_server.engine.server_state import ServerState
from rtap_server.http.recursion_fields import resolve_limits
from rtap_server.http.schema import RtapOptions


class ChatRenderer(Protocol):
    """The part of a Hugging Face tokenizer that these routes use."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **kwargs: Any
    ) -> Any:
        """The prompt of a conversation, as text."""
        ...


class ScoreRequest(BaseModel):
    """One question and the Think–Answer pair to score."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    think: str = ""
    answer: str = Field(min_length=1)


class FeedbackRequest(BaseModel):
    """request_id: the ``id`` of a response. choice: index of the judged choice. correct: the user's verdict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: str = Field(min_length=1, max_length=256)
    correct: bool = Field(strict=True)
    choice: int = Field(default=0, ge=0, strict=True)


class FeedbackResponse(BaseModel):
    """confidence: of the judged answer; None when it had no score. The other figures cover recent verdicts."""

    object: str = "rtap.feedback"
    request_id: str
    confidence: float | None
    verdicts: int
    brier: float | None
    ece: float | None


class ScoreResponse(BaseModel):
    """confidence: in [0, 1]. confidence_tokens: prompt tokens of the generator, and of the policy when its
    log-probabilities are part of the score."""

    object: str = "rtap.score"
    confidence: float
    confidence_tokens: int


def rtap_router(
    server: ServerState, tokenizer: ChatRenderer, model_names: list[str], template: Mapping[str, Any]
) -> APIRouter:
    """Build the router. tokenizer: the policy's. model_names: as served. template: further arguments of
    ``apply_chat_template``."""
    router = APIRouter(prefix="/v1/rtap", tags=["rtap"])

    def encode(request: ScoreRequest) -> Judged:
        if request.think and not server.format.has_think_tags:
            raise InvalidRequest("this model's format has no thoughts: put the whole text into answer", param="think")
        messages = [{"role": "user", "content": request.question}]
        current_request().messages = messages
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
        prompt = cast(str, rendered)
        if request.think and prompt.rstrip("\n").endswith(server.format.think_close):
            raise InvalidRequest("this server's chat template turns thinking off: leave out think", param="think")
        question = server.encode(prompt)
        cycle = server.encode(server.format.render_cycle(request.think, request.answer, prompt=prompt))
        return Judged(question, cycle, question, answer=request.answer)

    @router.post("/score")
    async def score(request: ScoreRequest) -> ScoreResponse:  # pyright: ignore[reportUnusedFunction]
        if server.confidence is None:
            raise InvalidRequest("this server cannot score an existing answer: it has no confidence generator")
        judged = await asyncio.to_thread(encode, request)  # a long text takes seconds
        try:
            result = await server.confidence.score(judged)
        except ConfidenceError as error:
            if error.reason == "too_long":
                raise InvalidRequest(str(error)) from error
            raise
        current_request().spent_tokens += result.tokens
        assert result.confidence is not None  # only votes have scores without one
        return ScoreResponse(confidence=result.confidence, confidence_tokens=result.tokens)

    @router.post("/feedback")
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:  # pyright: ignore[reportUnusedFunction]
        known = server.feedback
        confidence = known.judge(
            request.request_id, request.choice, correct=request.correct, owner=current_request().owner
        )
        server.metrics.count_feedback(correct=request.correct)
        return FeedbackResponse(
            request_id=request.request_id,
            confidence=confidence,
            verdicts=known.count,
            brier=round(known.brier, 6) if known.count else None,
            ece=round(known.ece, 6) if known.count else None,
        )

    @router.get("/config")
    async def config() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return server_facts(server, model_names)

    return router


def server_facts(server: ServerState, model_names: list[str]) -> dict[str, Any]:
    """The configuration: loaded models with their sources, and the defaults and ceilings of requests."""
    settings, has_confidence = server.settings, server.confidence is not None
    limits = resolve_limits(RtapOptions(), settings, server.generator, has_confidence=has_confidence)
    default = f"the default {'with' if has_confidence else 'without'} a confidence source"
    return {
        "object": "rtap.config",
        "version": __version__,
        "model": server.model,
        "models": model_names,
        "format": server.format.name,
        "format_source": server.format_source,
        "cycle_open": server.format.cycle_open,
        "policy_source": default if settings.policy is None else "set by --policy",
        "defaults": {
            "policy": limits.policy,
            "threshold": limits.threshold,
            "max_cycles": limits.max_cycles,
            "samples": limits.samples,
            "select": limits.select,
            "recursion": limits.recursion,
            "patience": limits.patience,
            "deadline_seconds": limits.deadline_seconds,
        },
        "limits": {
            "max_cycles": settings.max_cycles_limit,
            "samples": settings.samples_limit,
            "deadline_seconds": settings.deadline_seconds_limit,
            "body_bytes": settings.max_body_bytes,
        },
        "confidence": {
            "kind": settings.confidence_kind,
            "model": settings.confidence_model if settings.confidence_kind == "pooling" else None,
            "timeout_seconds": settings.confidence_timeout_seconds,
            "is_calibrated": has_confidence and server.generator.is_calibrated,
            "calibration": server.generator.calibration.model_dump(),
            "logistic": None if server.generator.logistic is None else server.generator.logistic.model_dump(),
        },
    }


_SPENDS = {
    Policy.SINGLE: "one answer",
    Policy.MODEL: "one turn, as with plain vLLM",
    Policy.CONFIDENCE: "up to {max_cycles} cycles, until the confidence reaches {threshold:g}",
    Policy.VOTE: "up to {samples} samples, until the leading answer's probability reaches {threshold:g}",
}


def start_lines(facts: Mapping[str, Any], address: str, *, has_keys: bool) -> list[str]:
    """``server_facts`` as lines for the operator, each with the flag that changes it."""
    defaults, confidence = facts["defaults"], facts["confidence"]
    policy, names = defaults["policy"], " or ".join(facts["models"])
    spends = _SPENDS[policy].format_map(defaults)
    if policy is Policy.MODEL and facts["format"] == "rtap":
        spends = "cycles until the model ends its turn"
    vote = (
        "" if policy is Policy.VOTE else '; --policy vote, or "rtap": {"policy": "vote"} in a request, votes adaptively'
    )
    source = f" from {confidence['model']}" if confidence["model"] else ""
    scores = f"{confidence['kind']}{source}; --confidence-model or --confidence changes it"
    if not confidence["is_calibrated"]:
        generator = "URL" if confidence["kind"] == "remote" else confidence["model"]
        flag = f"--confidence-model {generator}" if generator else f"--confidence {confidence['kind']}"
        scores = (
            f"{confidence['kind']}{source}, not calibrated, so votes count answers; `rtap calibrate {facts['model']} "
            f"--questions FILE -- {flag}` fits it and writes the file for --confidence-config"
        )
    if confidence["kind"] == "none":
        scores = (
            "none, so no answer is scored; --confidence-model (a generator of `rtap train generator`) or --confidence "
            "logprob (no second model; `rtap calibrate` fits it) adds scores and policy confidence"
        )
    keys = "required" if has_keys else "none; RTAP_API_KEYS or --api-keys-file sets them"
    return [
        f"model: {facts['model']}, which requests call {names}; --served-model-name changes it",
        f"format: {facts['format']} ({facts['format_source']}); --trajectory-format changes it",
        f"ready at {address} (page), {address}/v1 (API)",
        f"policy: {policy} ({spends}), {facts['policy_source']}{vote}",
        f"confidence: {scores}",
        f"keys: {keys}",
        "stop: Ctrl-C; running requests may finish for --drain-seconds",
    ]
