"""Confidence from the log-probabilities of the cycle's own tokens."""

import math
from collections.abc import Mapping

from vllm.logprobs import Logprob

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence import LOGPROB_FLOOR


class LogprobConfidence:
    """Peakedness of the policy's own next-token distributions: the baseline that a generator must beat.

    top_k >= 2: DeepConf's token confidence C = -mean of the top-k log-probabilities (arXiv 2508.15260), averaged over
    the cycle. C is log k for a flat top-k and unbounded above, so the score is 1 - log(k) / C, in [0, 1).
    top_k = 1: exp(mean log-probability of the sampled tokens).
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k

    async def score(self, judged: Judged) -> Score:
        """Computed from the cycle's log-probabilities, without another forward pass."""
        rule = self._sampled if self._top_k == 1 else self._top
        values = [rule(token_id, entry) for token_id, entry in judged.logprobs]
        if not values:
            raise ConfidenceError("the engine returned no log-probabilities", reason="no_logprobs")
        mean = sum(values) / len(values)
        return Score(math.exp(mean) if self._top_k == 1 else max(0.0, 1.0 - math.log(self._top_k) / mean))

    def _sampled(self, token_id: int, entry: Mapping[int, Logprob]) -> float:
        return entry[token_id].logprob

    def _top(self, _: int, entry: Mapping[int, Logprob]) -> float:
        # The engine adds the sampled token when it is not in the top k; its rank shows that.
        top = [e.logprob for e in entry.values() if e.rank is not None and e.rank <= self._top_k]
        return -sum(max(v, LOGPROB_FLOOR) for v in top) / len(top)
