"""``/v1/rtap``: score a pair that was written elsewhere, and say how this server recurses."""

from typing import Any, Protocol, cast

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from server import __version__
from server.recursive_engine import Plan
from server.rtap.errors import ConfidenceError, InvalidRequest
from server.rtap.types import Judged
from server.settings import Settings
from server.wire import RtapOptions, resolve_limits


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


class ScoreResponse(BaseModel):
    """confidence: in [0, 1]. confidence_tokens: tokens the generator read."""

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
        cycle = plan.format.render_cycle(request.think, request.answer)
        try:
            result = await plan.confidence.score(Judged(plan.encode(prompt), plan.encode(cycle), ()))
        except ConfidenceError as error:
            if error.reason == "too_long":
                raise InvalidRequest(str(error)) from error
            raise
        return ScoreResponse(confidence=result.confidence, confidence_tokens=result.tokens)

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
