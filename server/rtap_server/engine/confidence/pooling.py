"""Confidence from a pooling engine of this server."""

import itertools
from contextlib import aclosing
from typing import Any, cast

from vllm.pooling_params import PoolingParams

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence import CircuitBreaker, check_length, probability, refuse_images, within_timeout
from rtap_server.engine.confidence.inputs import Input, read_token_ids
from rtap_server.engine.request_state import salted_prompt
from rtap_server.engine.supervisor import SupervisedEngine


class PoolingConfidence:
    """A second vLLM engine that pools a sequence classifier: one label, or two (wrong, right).

    vLLM batches concurrent scores and caches the prefix of the question.
    """

    def __init__(
        self, supervised: SupervisedEngine, timeout_seconds: float, max_model_len: int, input_of: Input = read_token_ids
    ) -> None:
        """supervised: the generator's engine; there is no score while it restarts. input_of: what it reads."""
        self._supervised, self._timeout_seconds, self._max_model_len = supervised, timeout_seconds, max_model_len
        self._input_of, self._numbers, self._breaker = input_of, itertools.count(), CircuitBreaker()

    async def score(self, judged: Judged) -> Score:
        """One forward pass over question and cycle."""
        refuse_images(judged)
        late, failed = "the generator timed out", "the generator failed"
        read = await within_timeout(self._input_of(judged), self._timeout_seconds, late, failed)
        check_length(read, self._max_model_len)
        with self._breaker.attempt():
            score = await within_timeout(self._classify(read), self._timeout_seconds, late, failed)
        return Score(score, len(read))

    async def _classify(self, read: list[int]) -> float:
        engine = self._supervised.engine
        if engine is None:
            raise ConfidenceError("the generator is restarting", reason="restarting")
        outputs = engine.encode(
            cast(Any, salted_prompt({"prompt_token_ids": read})),
            PoolingParams(task="classify", use_activation=False),
            f"score-{next(self._numbers)}",
        )
        async with aclosing(cast(Any, outputs)) as results:
            async for result in results:
                if result.finished:
                    return probability([float(logit) for logit in result.outputs.data])
        raise ConfidenceError("the generator ended without a score")
