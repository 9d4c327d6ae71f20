"""Confidence sources: a pooling engine, a remote classifier, the policy itself (yes or no), or its log-probabilities.

Each implements ``rtap_core.types.Confidence`` and raises ConfidenceError when it has no score.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged

Result = TypeVar("Result")
LOGPROB_FLOOR = -30.0  # the engine reports -inf for tokens that sampling masked


async def within_timeout(work: Awaitable[Result], timeout_seconds: float, late: str, failed: str) -> Result:
    """Await engine ``work``. Any failure becomes a ConfidenceError, which degrades a request and never fails it.

    late, failed: messages for a timeout and for another failure."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await work
    except TimeoutError as error:
        raise ConfidenceError(late, reason="timeout") from error
    except ConfidenceError:
        raise
    except Exception as error:
        raise ConfidenceError(f"{failed}: {type(error).__name__}") from error


def refuse_images(judged: Judged) -> None:
    """Raise ConfidenceError for a request with images: a classifier would read their placeholder tokens."""
    if judged.request is not None and judged.request.prompt.get("type") == "multimodal":
        raise ConfidenceError(
            "a classifier cannot see the request's images; confidence kinds yesno and logprob can", reason="image"
        )
