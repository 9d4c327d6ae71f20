"""One model of ``/v1/models``, which vLLM only lists: ``GET /v1/models/{id}``."""

from typing import Any, Protocol

from fastapi import APIRouter

from rtap_core.errors import UnknownModel
from rtap_server.http.errors import shortened


class Models(Protocol):
    """The part of vLLM's OpenAIServingModels that this route uses."""

    async def show_available_models(self) -> Any:
        """Cards of the base models and the adapters."""
        ...


def models_router(models: Models) -> APIRouter:
    """The card of one model. Its id may contain slashes."""
    router = APIRouter()

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        cards = {card.id: card for card in (await models.show_available_models()).data}
        if model_id not in cards:
            raise UnknownModel(f"the model {shortened(model_id)} does not exist; this server has {', '.join(cards)}")
        return cards[model_id].model_dump()

    return router
