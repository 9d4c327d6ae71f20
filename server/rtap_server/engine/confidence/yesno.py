"""Confidence from the policy: the probability that it answers yes when asked whether its answer is right."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

from vllm.engine.protocol import EngineClient
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.features import LOGPROB_FLOOR
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence import within_timeout
from rtap_server.engine.output_writer import GenerateCall
from rtap_server.engine.request_state import salted_prompt


class YesNoConfidence:
    """The policy judges its own cycle: P(yes) / (P(yes) + P(no)) after a yes-or-no question.

    The prompt continues the trajectory, so that only the question is missing in the prefix cache. Images, adapter and
    cache salt are the request's.
    """

    def __init__(
        self, engine: EngineClient, question_ids: Sequence[int], yes: int, no: int, timeout_seconds: float
    ) -> None:
        self._engine, self._question_ids, self._yes, self._no = engine, list(question_ids), yes, no
        self._timeout_seconds = timeout_seconds
        self._numbers = itertools.count()

    async def score(self, judged: Judged) -> Score:
        """One generated token."""
        token_ids = [*judged.context_token_ids, *judged.cycle_token_ids, *self._question_ids]
        if len(token_ids) >= self._engine.model_config.max_model_len:
            raise ConfidenceError("the yes-or-no question does not fit into the policy's context", reason="too_long")
        late, failed = "the policy timed out on the yes-or-no question", "the policy failed on the yes-or-no question"
        asked = self._ask(token_ids, judged.request)
        return Score(await within_timeout(asked, self._timeout_seconds, late, failed), len(token_ids))

    async def _ask(self, token_ids: list[int], call: GenerateCall | None) -> float:
        if call is None:
            prompt = salted_prompt({"type": "token", "prompt_token_ids": token_ids})
        else:
            prompt = call.prompt_with(token_ids)
        names = ("lora_request", "priority", "trace_headers")
        shared = {} if call is None else {k: call.options[k] for k in names if k in call.options}
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=[self._yes, self._no],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = self._engine.generate(cast(Any, prompt), params, f"judge-{next(self._numbers)}", **shared)
        async with aclosing(outputs):
            async for output in outputs:
                entry = (output.outputs[0].logprobs or [{}])[0]
                yes, no = (max(entry[i].logprob, LOGPROB_FLOOR) for i in (self._yes, self._no))
                return 1.0 / (1.0 + math.exp(no - yes))
        raise ConfidenceError("the policy did not answer the yes-or-no question")


def yes_no_ids(encode: Callable[[str], list[int]], question: str) -> tuple[list[int], int, int]:
    """(token ids of the question, id of yes, id of no). Tokens that both words share belong to the question.

    Raises ConfigError for a tokenizer that encodes both words alike."""
    yes, no = encode(f"{question} yes"), encode(f"{question} no")
    shared = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
    if shared is None:
        raise ConfigError(
            "confidence=yesno: this tokenizer encodes 'yes' and 'no' with the same tokens; use another confidence kind"
        )
    return yes[:shared], yes[shared], no[shared]
