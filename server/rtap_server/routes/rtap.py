"""``/v1/rtap``: score a pair that was written elsewhere, take verdicts on answers, say how this server recurses."""

from typing import Any, Protocol, cast

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from rtap_core.errors import ConfidenceError, InvalidRequest
from rtap_core.types import Judged
from rtap_server import __version__
from rtap_server.engine.server_state import Plan
from rtap_server.http.auth import current_owner, current_visit
from rtap_server.http.schema import RtapOptions, resolve_limits
from rtap_server.settings import Settings


class ChatRenderer(Protocol):
    """What of a Hugging Face tokenizer is used here."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The prompt of a conversation as text."""
        ...


class ScoreRequest(BaseModel):
    """One question and one Think–Answer pair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    think: str = ""
    answer: str = Field(min_length=1)


class FeedbackRequest(BaseModel):
    """request_id: the ``id`` of a reply. choice: which of its choices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: str = Field(min_length=1, max_length=256)
    correct: bool = Field(strict=True)
    choice: int = Field(default=0, ge=0, strict=True)


class FeedbackResponse(BaseModel):
    """confidence: what the answer had; None for an unscored one. The rest: over the server's recent verdicts."""

    object: str = "rtap.feedback"
    request_id: str
    confidence: float | None
    verdicts: int
    brier: float | None
    ece: float | None


class ScoreResponse(BaseModel):
    """confidence: in [0, 1]. confidence_tokens: tokens read for it by the generator, and by the policy where its
    log-probabilities are joined with the score."""

    object: str = "rtap.score"
    confidence: float
    confidence_tokens: int


def rtap_router(plan: Plan, settings: Settings, tokenizer: ChatRenderer, model_names: list[str]) -> APIRouter:
    """Routes over one running plan."""
    router = APIRouter(prefix="/v1/rtap", tags=["rtap"])

    @router.post("/score")
    async def score(request: ScoreRequest) -> ScoreResponse:  # pyright: ignore[reportUnusedFunction]
        kind = settings.confidence_kind
        if plan.confidence is None or kind == "logprob":
            raise InvalidRequest(f"this server cannot score given pairs: its confidence is '{kind}'")
        prompt = cast(
            str,
            tokenizer.apply_chat_template(
                [{"role": "user", "content": request.question}], tokenize=False, add_generation_prompt=True
            ),
        )
        question, cycle = plan.encode(prompt), plan.format.render_cycle(request.think, request.answer)
        try:
            result = await plan.confidence.score(Judged(question, plan.encode(cycle), question))
        except ConfidenceError as error:
            if error.reason == "too_long":
                raise InvalidRequest(str(error)) from error
            raise
        visit = current_visit()
        if visit is not None:
            visit.spent_tokens += result.tokens
        return ScoreResponse(confidence=result.confidence, confidence_tokens=result.tokens)

    @router.post("/feedback")
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:  # pyright: ignore[reportUnusedFunction]
        known = plan.feedback
        confidence = known.judge(request.request_id, request.choice, correct=request.correct, owner=current_owner())
        plan.metrics.judged(correct=request.correct)
        return FeedbackResponse(
            request_id=request.request_id,
            confidence=confidence,
            verdicts=known.count,
            brier=round(known.brier, 6) if known.count else None,
            ece=round(known.ece, 6) if known.count else None,
        )

    @router.get("/config")
    async def config() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        limits = resolve_limits(
            RtapOptions(), settings, plan.generator, has_confidence=plan.confidence is not None, max_tokens=None
        )
        return {
            "object": "rtap.config",
            "version": __version__,
            "models": model_names,
            "format": plan.format.name,
            "defaults": {
                "policy": limits.policy,
                "threshold": limits.threshold,
                "max_cycles": limits.max_cycles,
                "samples": limits.samples,
                "select": limits.select,
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
                "calibration": plan.generator.calibration.model_dump(),
            },
        }

    return router
