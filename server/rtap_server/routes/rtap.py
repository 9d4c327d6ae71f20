"""Routes under ``/v1/rtap``: score an existing answer, accept feedback on answers, report the configuration."""

import asyncio
from typing import Any, Protocol, cast

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from rtap_core.errors import ConfidenceError, InvalidRequest
from rtap_core.types import Judged
from rtap_server import __version__
from rtap_server.engine.request_state import current_request
from rtap_server.engine.server_state import ServerState
from rtap_server.http.recursion_fields import resolve_limits
from rtap_server.http.schema import RtapOptions


class ChatRenderer(Protocol):
    """The part of a Hugging Face tokenizer that these routes use."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
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


def rtap_router(server: ServerState, tokenizer: ChatRenderer, model_names: list[str]) -> APIRouter:
    """Build the router. tokenizer: the policy's. model_names: as served."""
    router, settings = APIRouter(prefix="/v1/rtap", tags=["rtap"]), server.settings

    def encode(request: ScoreRequest) -> Judged:
        messages = [{"role": "user", "content": request.question}]
        prompt = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        question = server.encode(prompt)
        cycle = server.encode(server.format.render_cycle(request.think, request.answer))
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
        limits = resolve_limits(RtapOptions(), settings, server.generator, has_confidence=server.confidence is not None)
        return {
            "object": "rtap.config",
            "version": __version__,
            "models": model_names,
            "format": server.format.name,
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
                "timeout_seconds": settings.confidence_timeout_seconds,
                "is_calibrated": server.generator.is_calibrated,
                "calibration": server.generator.calibration.model_dump(),
                "logistic": None if server.generator.logistic is None else server.generator.logistic.model_dump(),
            },
        }

    return router
