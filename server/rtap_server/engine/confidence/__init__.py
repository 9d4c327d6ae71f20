"""Confidence sources: a pooling engine, a remote classifier, the policy itself (yes or no), or its log-probabilities.

Each implements ``rtap_core.types.Confidence`` and raises ConfidenceError when it has no score.
"""

import asyncio
import math
from collections.abc import Awaitable, Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged

Result = TypeVar("Result")


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


class CircuitBreaker:
    """Keep requests from waiting one by one for a generator that does not answer.

    After a timeout, until an attempt ends in another way, only one attempt at a time waits; the others fail at once."""

    def __init__(self) -> None:
        self._is_open = self._is_trying = False

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Surround one attempt to score. Raises ConfidenceError while another one finds out."""
        is_trial = self._is_open
        if is_trial and self._is_trying:
            raise ConfidenceError("the generator does not answer", reason="timeout")
        if is_trial:
            self._is_trying = True
        try:
            yield
        except ConfidenceError as error:
            self._is_open = error.reason == "timeout"
            raise
        else:
            self._is_open = False
        finally:
            if is_trial:
                self._is_trying = False


def probability(logits: Sequence[float]) -> float:
    """P(right) from a classifier's logits, whatever activation its config names: the sigmoid of one logit, or the
    softmax of two (wrong, right). Raises ConfidenceError."""
    if len(logits) not in (1, 2) or not all(map(math.isfinite, logits)):
        raise ConfidenceError(f"the generator returned {list(logits)[:3]} instead of one or two logits")
    margin = logits[-1] - logits[0] if len(logits) == 2 else logits[0]
    return 1.0 / (1.0 + math.exp(-max(-700.0, margin)))


def check_length(read: Sequence[int], max_model_len: int) -> None:
    """Raise ConfidenceError for more tokens than the generator's context holds."""
    if len(read) > max_model_len:
        raise ConfidenceError(
            f"{len(read)} tokens are above the generator's context of {max_model_len}", reason="too_long"
        )


def refuse_images(judged: Judged) -> None:
    """Raise ConfidenceError for a request with images: a classifier would read their placeholder tokens."""
    if judged.request is not None and judged.request.prompt.get("type") == "multimodal":
        raise ConfidenceError(
            "a classifier cannot see the request's images; confidence kinds yesno and logprob can", reason="image"
        )
