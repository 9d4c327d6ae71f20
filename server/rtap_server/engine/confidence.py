"""Confidence on vLLM: a pooling engine of our own, a remote /classify server, the policy asked about its own answer, or
the log-probability rule.

Each is an implementation of ``rtap_core.types.Confidence`` and raises ConfidenceError when it has no score.
"""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

import httpx
from vllm.engine.protocol import EngineClient
from vllm.logprobs import Logprob
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.artifact import Fusion
from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.types import Confidence, Judged, Score
from rtap_server.engine.output_writer import GenerateCall
from rtap_server.engine.request_state import salted_prompt
from rtap_server.engine.supervisor import Ward

# A string every tokenizer has an opinion on: tags, digits, spaces, a letter outside ASCII.
PROBE = "<think>12 * 9 = 108 é</think><answer>108</answer>"
Result = TypeVar("Result")
_LOGPROB_FLOOR = -30.0  # the engine reports -inf for tokens that sampling masked


class PoolingConfidence:
    """A second vLLM engine with the pooling runner over a sequence classifier: one label (sigmoid), or wrong/right.

    Reads the question's and the cycle's own token ids, so it must share the policy's tokenizer.
    vLLM batches concurrent scores and caches the question's prefix by itself.
    """

    def __init__(self, ward: Ward, timeout_seconds: float, max_model_len: int) -> None:
        """ward: whose engine it is; while it has none there is no score."""
        self._ward, self._timeout_seconds, self._max_model_len = ward, timeout_seconds, max_model_len
        self._numbers = itertools.count()

    async def score(self, judged: Judged) -> Score:
        """One forward pass over question + cycle."""
        _refuse_images(judged)
        token_ids = [*judged.question_token_ids, *judged.cycle_token_ids]
        if len(token_ids) > self._max_model_len:
            raise ConfidenceError(
                f"{len(token_ids)} tokens are more than the generator's {self._max_model_len}", reason="too_long"
            )
        late, failed = "the generator did not answer in time", "the generator failed"
        return Score(await _in_time(self._classify(token_ids), self._timeout_seconds, late, failed), len(token_ids))

    async def _classify(self, token_ids: list[int]) -> float:
        engine = self._ward.engine
        if engine is None:
            raise ConfidenceError("the generator is being started again", reason="restarting")
        outputs = engine.encode(
            cast(Any, salted_prompt({"prompt_token_ids": token_ids})),
            PoolingParams(task="classify", use_activation=True),
            f"score-{next(self._numbers)}",
        )
        async with aclosing(cast(Any, outputs)) as results:
            async for result in results:
                if result.finished:
                    return float(result.outputs.data[-1])  # one label: P(right); two: P(wrong), P(right)
        raise ConfidenceError("the generator ended without a score")


class FusedConfidence:
    """A generator's score joined with the policy's log-probabilities of what it sampled (``rtap_core.artifact``).

    The log-probabilities come with the cycle; of a pair that this server did not write, the policy reads them.
    """

    def __init__(self, generator: Confidence, fusion: Fusion, policy: EngineClient, timeout_seconds: float) -> None:
        self._generator, self._fusion, self._policy = generator, fusion, policy
        self._timeout_seconds = timeout_seconds
        self._numbers = itertools.count()

    async def score(self, judged: Judged) -> Score:
        """The generator's forward pass, and for a pair from elsewhere one of the policy."""
        score = await self._generator.score(judged)
        sampled, tokens = [entry[token_id].logprob for token_id, entry in judged.logprobs], score.tokens
        if not sampled:
            late, failed = "the policy did not read the pair in time", "the policy could not read the pair"
            sampled = await _in_time(self._read(judged), self._timeout_seconds, late, failed)
            tokens += len(judged.context_token_ids) + len(judged.cycle_token_ids)
        logprobs = [max(value, _LOGPROB_FLOOR) for value in sampled]
        return Score(self._fusion.confidence(score.confidence, logprobs), tokens)

    async def _read(self, judged: Judged) -> list[float]:
        token_ids = [*judged.context_token_ids, *judged.cycle_token_ids]
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = salted_prompt({"type": "token", "prompt_token_ids": token_ids})
        outputs = self._policy.generate(cast(Any, prompt), params, f"read-{next(self._numbers)}")
        async with aclosing(outputs):
            async for output in outputs:
                entries = cast(list[Any], output.prompt_logprobs)[len(judged.context_token_ids) :]
                return [e[i].logprob for i, e in zip(judged.cycle_token_ids, entries, strict=True)]
        raise ConfidenceError("the policy ended without reading the pair")


class RemoteConfidence:
    """A vLLM server with ``/classify``, elsewhere. Sends token ids, so it must share the policy's tokenizer."""

    def __init__(self, address: str, timeout_seconds: float, client: httpx.AsyncClient) -> None:
        self._address, self._timeout_seconds, self._client = address.rstrip("/"), timeout_seconds, client

    async def score(self, judged: Judged) -> Score:
        """One request to the remote server."""
        _refuse_images(judged)
        token_ids = [*judged.question_token_ids, *judged.cycle_token_ids]
        try:
            async with asyncio.timeout(self._timeout_seconds):  # httpx's own are of single reads, and shorter
                reply = await self._client.post(
                    f"{self._address}/classify",
                    json={"input": [token_ids]},
                    headers=_trace_headers(judged.request),
                    timeout=None,
                )
            reply.raise_for_status()
            probability = float(reply.json()["data"][0]["probs"][-1])
        except (TimeoutError, httpx.TimeoutException) as error:
            raise ConfidenceError("the remote generator did not answer in time", reason="timeout") from error
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfidenceError(f"the remote generator failed: {type(error).__name__}") from error
        if not 0.0 <= probability <= 1.0:
            raise ConfidenceError("the remote generator sent no probability")
        return Score(probability, len(token_ids))

    async def check(self, encode_ids: Sequence[int]) -> None:
        """Raise ConfigError unless the server answers and tokenises like the policy. encode_ids: ids of the probe."""
        try:
            reply = await self._client.post(
                f"{self._address}/tokenize", json={"prompt": PROBE, "add_special_tokens": False}, timeout=10.0
            )
            reply.raise_for_status()
            tokens = cast(list[int], reply.json()["tokens"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"no vLLM classify server answers at {self._address} ({type(error).__name__}); "
                "start it with `vllm serve CHECKPOINT --runner pooling`"
            ) from error
        if tokens != list(encode_ids):
            raise ConfigError(f"the generator at {self._address} and the policy have different tokenizers")


class YesNoConfidence:
    """No second model: the policy goes on after its own cycle and says yes or no; P(yes) / (P(yes) + P(no)).

    The prompt is all that was written so far and the judge's question, so that only the latter is new to the prefix
    cache. Images, adapter and cache salt are the request's. Worth what the policy is worth as a judge of itself.
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
            raise ConfidenceError("no room is left to ask the policy about its answer", reason="too_long")
        late, failed = "the policy did not judge its answer in time", "the policy could not judge its answer"
        asked = self._ask(token_ids, judged.request)
        return Score(await _in_time(asked, self._timeout_seconds, late, failed), len(token_ids))

    async def _ask(self, token_ids: list[int], call: GenerateCall | None) -> float:
        prompt = {"type": "token", "prompt_token_ids": token_ids} if call is None else call.prompt_with(token_ids)
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
                yes, no = (max(entry[i].logprob, _LOGPROB_FLOOR) for i in (self._yes, self._no))
                return 1.0 / (1.0 + math.exp(no - yes))
        raise ConfidenceError("the policy ended without a verdict")


def yes_no_ids(encode: Callable[[str], list[int]], question: str) -> tuple[list[int], int, int]:
    """(ids up to where the two words part, id of yes there, id of no there): words may share their first tokens.

    Raises ConfigError for a tokenizer that does not tell them apart."""
    yes, no = encode(f"{question} yes"), encode(f"{question} no")
    shared = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
    if shared is None:
        raise ConfigError("confidence=yesno: this tokenizer writes 'yes' and 'no' with the same tokens")
    return yes[:shared], yes[shared], no[shared]


async def _in_time(work: Awaitable[Result], timeout_seconds: float, late: str, failed: str) -> Result:
    """``work`` on an engine of ours; any failure is a ConfidenceError, which degrades a request and never fails it."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await work
    except TimeoutError as error:
        raise ConfidenceError(late, reason="timeout") from error
    except ConfidenceError:
        raise
    except Exception as error:
        raise ConfidenceError(f"{failed}: {type(error).__name__}") from error


def _trace_headers(call: GenerateCall | None) -> dict[str, str]:
    """What makes the remote server's spans part of the request's trace, where there is one."""
    return {} if call is None else dict(call.options.get("trace_headers") or {})


def _refuse_images(judged: Judged) -> None:
    """A classifier reads token ids only; scoring placeholders as if they were the image would be a guess."""
    if judged.request is not None and judged.request.prompt.get("type") == "multimodal":
        raise ConfidenceError("a classifier does not see the request's images; yesno and logprob do", reason="image")


class LogprobConfidence:
    """No generator: how peaked the model's own next-token distributions were; the baseline a generator must beat.

    top_k >= 2: DeepConf's token confidence C = -mean of the top-k log-probabilities (arXiv 2508.15260), averaged over
    the cycle. C is log k for a flat top-k and unbounded above, so the score is 1 - log(k) / C, in [0, 1).
    top_k = 1: exp(mean log-probability of the sampled tokens).
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k

    async def score(self, judged: Judged) -> Score:
        """From log-probabilities that the engine was asked to return."""
        rule = self._sampled if self._top_k == 1 else self._top
        values = [rule(token_id, entry) for token_id, entry in judged.logprobs]
        if not values:
            raise ConfidenceError("the engine returned no log-probabilities", reason="no_logprobs")
        mean = sum(values) / len(values)
        return Score(math.exp(mean) if self._top_k == 1 else max(0.0, 1.0 - math.log(self._top_k) / mean))

    def _sampled(self, token_id: int, entry: Mapping[int, Logprob]) -> float:
        return entry[token_id].logprob

    def _top(self, _: int, entry: Mapping[int, Logprob]) -> float:
        # The engine adds the sampled token to its top k when it is not among them; rank tells them apart.
        top = [e.logprob for e in entry.values() if e.rank is not None and e.rank <= self._top_k]
        return -sum(max(v, _LOGPROB_FLOOR) for v in top) / len(top)
