"""The policy as its own judge, over a stand-in for its engine; tests/e2e asks the real one."""

from types import SimpleNamespace
from typing import Any

import pytest

from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.types import Judged
from rtap_server.engine.confidence.yesno import YesNoConfidence, yes_no_ids

JUDGED = Judged([1, 2], [5, 6], [1, 2, 3, 4])


def _letters(text: str) -> list[int]:
    return [ord(c) for c in text]


class _Engine:
    """Answers with given log-probabilities, or raises; keeps what it was asked."""

    def __init__(self, logprobs: dict[int, float] | None, failure: Exception | None = None, room: int = 100) -> None:
        self.asked: list[tuple[Any, Any]] = []
        self.model_config = SimpleNamespace(max_model_len=room)
        self._logprobs, self._failure = logprobs, failure

    async def generate(self, prompt, params, request_id, **options):
        self.asked.append((prompt, params))
        if self._failure is not None:
            raise self._failure
        if self._logprobs is not None:
            entry = {i: SimpleNamespace(logprob=value) for i, value in self._logprobs.items()}
            yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[entry])])


def test_the_words_are_told_apart_where_their_tokens_part():
    ids, yes, no = yes_no_ids(_letters, "Right?")
    assert (ids, yes, no) == (_letters("Right? "), ord("y"), ord("n"))
    with pytest.raises(ConfigError, match="the same tokens"):
        yes_no_ids(lambda _: [0], "Right?")


@pytest.mark.parametrize(
    ("yes", "no", "confidence"), [(-1.0, -1.0, 0.5), (-0.1, -2.3, 0.9), (-5.0, float("-inf"), 1.0)]
)
async def test_confidence_is_the_share_of_yes(yes, no, confidence):
    engine = _Engine({8: yes, 9: no})
    score = await YesNoConfidence(engine, [7], 8, 9, 1.0).score(JUDGED)
    assert score.confidence == pytest.approx(confidence, abs=2e-3)
    assert score.tokens == 7
    prompt, params = engine.asked[0]
    assert prompt["prompt_token_ids"] == [1, 2, 3, 4, 5, 6, 7]  # the whole trajectory, so that it is cached
    assert (params.max_tokens, params.logprob_token_ids) == (1, [8, 9])


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (_Engine({8: 0.0, 9: 0.0}, room=7), "too_long"),
        (_Engine(None), "error"),
        (_Engine(None, RuntimeError("engine dead")), "error"),
    ],
)
async def test_no_verdict_degrades(engine, reason):
    with pytest.raises(ConfidenceError) as caught:
        await YesNoConfidence(engine, [7], 8, 9, 1.0).score(JUDGED)
    assert caught.value.reason == reason
