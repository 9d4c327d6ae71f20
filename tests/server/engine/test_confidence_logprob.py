"""Confidence from log-probabilities, alone and joined with a score, over a stand-in for the engine.

tests/e2e has the real one."""

from types import SimpleNamespace

import pytest

from rtap_core.artifact import Artifact, Logistic
from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.features import logprob_features
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence.logprob import FeaturesOnly, LogisticConfidence, check_logistic

FUSION = Logistic(bias=0.1, generator=1.5, logprob_mean=2.0, logprob_min=0.5)


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

    model_config = SimpleNamespace(max_model_len=100)

    def __init__(self, logprobs: list[float] | None = None) -> None:
        self.asked = []
        self._logprobs = logprobs

    async def generate(self, prompt, params, request_id):
        self.asked.append((prompt["prompt_token_ids"], params.prompt_logprobs, params.max_tokens))
        if self._logprobs is None:
            raise RuntimeError("dead")
        ids = prompt["prompt_token_ids"]
        entries = [None, *({i: _entry(i, v)} for i, v in zip(ids[1:], self._logprobs[1:], strict=True))]
        yield SimpleNamespace(prompt_logprobs=entries)


def _entry(token_id, logprob):
    return SimpleNamespace(logprob=logprob, decoded_token=f" t{token_id}")


def _expected(logistic, score, logprobs, answer=None):
    return logistic.confidence(score, logprob_features([(f" t{i}", v) for i, v in logprobs], answer))


SAMPLED = ((5, -0.2), (6, -1.0), (7, float("-inf")))


async def test_what_was_sampled_counts():
    known = [(i, {i: _entry(i, v)}) for i, v in SAMPLED]
    policy = _Policy()
    score = await LogisticConfidence(FUSION, policy, 1.0, _Generator()).score(Judged([1], [9, 5, 6, 7], [1], known))
    assert score == Score(_expected(FUSION, 0.7, SAMPLED), 4)  # a floor under what a grammar masked
    assert policy.asked == []


async def test_log_probabilities_alone_are_scored_with_their_features():
    logistic = Logistic(bias=0.3, probability_answer=2.0, log_tokens=-0.1)
    judged = Judged([1], [5, 6, 7], [1], [(i, {i: _entry(i, v)}) for i, v in SAMPLED], answer="is \\boxed{t6}")
    confidence = LogisticConfidence(logistic, _Policy(), 1.0)
    score = await confidence.score(judged)
    assert score.confidence == pytest.approx(_expected(logistic, None, SAMPLED, "t6"))
    assert score.logprobs is not None
    assert (score.logprobs.answer, score.logprobs.tokens, score.tokens) == (-1.0, 3, 0)
    assert await FeaturesOnly(confidence).score(judged) == Score(None, 0, score.logprobs)


async def test_a_platt_calibration_reads_no_log_probabilities():
    policy = _Policy()
    score = await LogisticConfidence(Logistic(bias=0.5, generator=2.0), policy, 1.0, _Generator()).score(
        Judged([1], [5], [1])
    )
    assert score.confidence == pytest.approx(Logistic(bias=0.5, generator=2.0).confidence(0.7, None))
    assert policy.asked == []


async def test_a_pair_from_elsewhere_is_read_by_the_policy():
    policy = _Policy([0.0, -9.0, -0.3, -0.4])
    score = await LogisticConfidence(FUSION, policy, 1.0, _Generator()).score(Judged([1, 2], [5, 6], [1, 2]))
    assert score.confidence == pytest.approx(_expected(FUSION, 0.7, ((5, -0.3), (6, -0.4))))
    assert score.tokens == 2 + 4  # the generator's, and what the policy read
    assert policy.asked == [([1, 2, 5, 6], 0, 1)]


async def test_either_witness_failing_is_no_score():
    judged = Judged([1], [5], [1])
    with pytest.raises(ConfidenceError, match="the policy failed to compute log-probabilities: RuntimeError"):
        await LogisticConfidence(FUSION, _Policy(), 1.0, _Generator()).score(judged)
    broken = _Generator(ConfidenceError("gone", reason="timeout"))
    with pytest.raises(ConfidenceError, match="gone"):
        await LogisticConfidence(FUSION, _Policy([0.0, 0.0]), 1.0, broken).score(judged)


async def test_an_answer_that_does_not_fit_the_policys_context_is_too_long():
    judged = Judged([1] * 60, [2] * 40, [1] * 60)
    with pytest.raises(ConfidenceError, match="100 tokens do not fit into the policy's context of 100") as raised:
        await LogisticConfidence(OWN, _Policy([0.0] * 100), 1.0).score(judged)
    assert raised.value.reason == "too_long"


PLATT, OWN = Logistic(bias=0.0, generator=1.0), Logistic(bias=0.0, logprob_mean=1.0)


@pytest.mark.parametrize(
    ("logistic", "source", "kind", "fits"),
    [
        (PLATT, None, "pooling", True), (PLATT, "yesno", "yesno", True), (OWN, None, "logprob", True),
        (FUSION, None, "remote", True), (None, None, "logprob", True), (PLATT, "yesno", "remote", False),
        (PLATT, None, "logprob", False), (OWN, None, "yesno", False), (PLATT, None, "yesno", False),
        (OWN, "logprob", "pooling", False),
    ],
)  # fmt: skip
def test_a_calibration_serves_only_the_kind_that_it_was_fitted_to(logistic, source, kind, fits):
    artifact = Artifact(logistic=logistic, source=source)
    if fits:
        check_logistic(artifact, kind)
        return
    with pytest.raises(ConfigError, match=f"the calibration is for confidence=.*, not {kind}: "):
        check_logistic(artifact, kind)
