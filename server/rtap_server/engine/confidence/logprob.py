"""Confidence by a logistic regression on the cycle's log-probabilities, a generator's score, or both."""

import itertools
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from vllm.engine.protocol import EngineClient
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.artifact import Artifact, Logistic
from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.features import logprob_features
from rtap_core.types import Confidence, Judged, Score
from rtap_server.engine.confidence import within_timeout
from rtap_server.engine.request_state import salted_prompt


class LogisticConfidence:
    """``logistic`` on the score of ``source`` and on the policy's log-probabilities of the cycle's sampled tokens.

    The log-probabilities come with the cycle. For an answer from elsewhere the policy computes them."""

    def __init__(
        self, logistic: Logistic, policy: EngineClient, timeout_seconds: float, source: Confidence | None = None
    ) -> None:
        """source: a generator; None: the log-probabilities alone."""
        self._logistic, self._policy, self._source = logistic, policy, source
        self._timeout_seconds = timeout_seconds
        self._numbers = itertools.count()

    async def score(self, judged: Judged) -> Score:
        """One forward pass of the source, and one of the policy for an answer from elsewhere."""
        score = Score(None) if self._source is None else await self._source.score(judged)
        features, tokens = None, score.tokens
        if self._source is None or self._logistic.reads_logprobs:
            sampled = [entry_of(token_id, entry) for token_id, entry in judged.logprobs]
            if not sampled:
                late, failed = (
                    "the policy timed out on its log-probabilities",
                    "the policy failed to compute log-probabilities",
                )
                sampled = await within_timeout(self._read(judged), self._timeout_seconds, late, failed)
                tokens += len(judged.context_token_ids) + len(judged.cycle_token_ids)
            features = logprob_features(sampled, judged.answer)
        confidence = self._logistic.confidence(score.confidence, features)
        return Score(confidence, tokens, features if self._source is None else None)

    async def _read(self, judged: Judged) -> list[tuple[str, float]]:
        """Text and log-probability of the cycle's tokens. The policy reads them as a prompt."""
        token_ids, limit = [*judged.context_token_ids, *judged.cycle_token_ids], self._policy.model_config.max_model_len
        if len(token_ids) >= limit:
            raise ConfidenceError(
                f"{len(token_ids)} tokens do not fit into the policy's context of {limit}", reason="too_long"
            )
        # vLLM decodes the tokens of a prompt only where it decodes the completion.
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = salted_prompt({"type": "token", "prompt_token_ids": token_ids})
        outputs = self._policy.generate(cast(Any, prompt), params, f"read-{next(self._numbers)}")
        async with aclosing(outputs):
            async for output in outputs:
                entries = cast(list[Any], output.prompt_logprobs)[len(judged.context_token_ids) :]
                return [entry_of(i, e) for i, e in zip(judged.cycle_token_ids, entries, strict=True)]
        raise ConfidenceError("the policy returned no log-probabilities", reason="no_logprobs")


class FeaturesOnly:
    """A confidence that decides nothing: its scores keep the features of the log-probabilities alone."""

    def __init__(self, confidence: Confidence) -> None:
        self._confidence = confidence

    async def score(self, judged: Judged) -> Score:
        """The score without its confidence."""
        return replace(await self._confidence.score(judged), confidence=None)


def entry_of(token_id: int, entry: Mapping[int, Any]) -> tuple[str, float]:
    """Text and log-probability of a token in vLLM's log-probabilities of its position."""
    return entry[token_id].decoded_token or "", entry[token_id].logprob


def check_logistic(artifact: Artifact, kind: str) -> None:
    """Raise ConfigError for a logistic regression that was fitted to another kind of confidence."""
    logistic = artifact.logistic
    if logistic is None:
        return
    fitted = artifact.source or ("a generator" if logistic.generator else "logprob")
    sources = (kind,) if kind == "yesno" else (None, kind)  # a generator's own config names no kind
    if (kind == "logprob") == bool(logistic.generator) or artifact.source not in sources:
        raise ConfigError(
            f"the calibration is for confidence={fitted}, not {kind}: leave out --confidence-config, or fit one for "
            f"{kind} with `rtap calibrate`"
        )
