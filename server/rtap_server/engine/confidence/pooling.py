"""Confidence from a pooling engine of this server."""

import itertools
from contextlib import aclosing
from typing import Any, cast

from vllm.pooling_params import PoolingParams

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence import CircuitBreaker, refuse_images, within_timeout
from rtap_server.engine.request_state import salted_prompt
from rtap_server.engine.supervisor import SupervisedEngine


class PoolingConfidence:
    """A second vLLM engine that pools a sequence classifier: one label (sigmoid), or two (wrong, right).

    It reads the token ids of question and cycle, so it must share the policy's tokenizer. vLLM batches concurrent
    scores and caches the prefix of the question.
    """

    def __init__(self, supervised: SupervisedEngine, timeout_seconds: float, max_model_len: int) -> None:
        """supervised: the generator's engine; there is no score while it restarts."""
        self._supervised, self._timeout_seconds, self._max_model_len = supervised, timeout_seconds, max_model_len
        self._numbers, self._breaker = itertools.count(), CircuitBreaker()

    async def score(self, judged: Judged) -> Score:
        """One forward pass over question + cycle."""
        refuse_images(judged)
        token_ids = [*judged.question_token_ids, *judged.cycle_token_ids]
        if len(token_ids) > self._max_model_len:
            raise ConfidenceError(
                f"{len(token_ids)} tokens are above the generator's context of {self._max_model_len}", reason="too_long"
            )
        late, failed = "the generator timed out", "the generator failed"
        with self._breaker.attempt():
            score = await within_timeout(self._classify(token_ids), self._timeout_seconds, late, failed)
        return Score(score, len(token_ids))

    async def _classify(self, token_ids: list[int]) -> float:
        engine = self._supervised.engine
        if engine is None:
            raise ConfidenceError("the generator is restarting", reason="restarting")
        outputs = engine.encode(
            cast(Any, salted_prompt({"prompt_token_ids": token_ids})),
            PoolingParams(task="classify", use_activation=True),
            f"score-{next(self._numbers)}",
        )
        async with aclosing(cast(Any, outputs)) as results:
            async for result in results:
                if result.finished:
                    return float(result.outputs.data[-1])  # one label: P(right); two labels: P(wrong), P(right)
        raise ConfidenceError("the generator ended without a score")
