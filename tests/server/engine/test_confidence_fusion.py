"""A generator's score joined with log-probabilities, over a stand-in for the engine; tests/e2e has the real one."""

from types import SimpleNamespace

import pytest

from rtap_core.artifact import Fusion
from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence.pooling import FusedConfidence

FUSION = Fusion(bias=0.1, generator=1.5, logprob_mean=2.0, logprob_min=0.5)


class _Generator:
    """Says 0.7, or raises."""

    def __init__(self, failure: ConfidenceError | None = None) -> None:
        self._failure = failure

    async def score(self, judged: Judged) -> Score:
        if self._failure is not None:
            raise self._failure
        return Score(0.7, len(judged.cycle_token_ids))


class _Policy:
    """Reads prompts with given log-probabilities, or raises; keeps what it was asked."""

    def __init__(self, logprobs: list[float] | None = None) -> None:
        self.asked = []
        self._logprobs = logprobs

    async def generate(self, prompt, params, request_id):
        self.asked.append((prompt["prompt_token_ids"], params.prompt_logprobs, params.max_tokens))
        if self._logprobs is None:
            raise RuntimeError("dead")
        ids = prompt["prompt_token_ids"]
        entries = [None, *({i: SimpleNamespace(logprob=v)} for i, v in zip(ids[1:], self._logprobs[1:], strict=True))]
        yield SimpleNamespace(prompt_logprobs=entries)


async def test_what_was_sampled_counts():
    known = [(i, {i: SimpleNamespace(logprob=v)}) for i, v in ((5, -0.2), (6, -1.0), (7, float("-inf")))]
    policy = _Policy()
    score = await FusedConfidence(_Generator(), FUSION, policy, 1.0).score(Judged([1], [9, 5, 6, 7], [1], known))
    assert score == Score(FUSION.confidence(0.7, [-0.2, -1.0, -30.0]), 4)  # a floor under what a grammar masked
    assert policy.asked == []


async def test_a_pair_from_elsewhere_is_read_by_the_policy():
    policy = _Policy([0.0, -9.0, -0.3, -0.4])
    score = await FusedConfidence(_Generator(), FUSION, policy, 1.0).score(Judged([1, 2], [5, 6], [1, 2]))
    assert score.confidence == pytest.approx(FUSION.confidence(0.7, [-0.3, -0.4]))
    assert score.tokens == 2 + 4  # the generator's, and what the policy read
    assert policy.asked == [([1, 2, 5, 6], 0, 1)]


async def test_either_witness_failing_is_no_score():
    judged = Judged([1], [5], [1])
    with pytest.raises(ConfidenceError, match="the policy failed to compute log-probabilities: RuntimeError"):
        await FusedConfidence(_Generator(), FUSION, _Policy(), 1.0).score(judged)
    broken = _Generator(ConfidenceError("gone", reason="timeout"))
    with pytest.raises(ConfidenceError, match="gone"):
        await FusedConfidence(broken, FUSION, _Policy([0.0, 0.0]), 1.0).score(judged)
