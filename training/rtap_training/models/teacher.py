"""Teacher of RLAD and KDRL: log-probabilities of the student's tokens, from a checkpoint or a vLLM server.

Only the sampled token's log-probability is used (RLAD eq. 3), so student and teacher must share token ids. This is
checked before the run.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, cast

import httpx
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rtap_training.rl.messages import render
from rtap_training.training_errors import TeacherError

REMOTE_TIMEOUT_SECONDS = 120.0
ROWS_IN_FLIGHT = 16
PROBE = [{"role": "user", "content": "make 82 from 3, 7, 25"}]
OTHER_CONTEXTS = (
    "the teacher's chat template renders prompts differently from the student's; use a teacher with the same template"
)


class Teacher(Protocol):
    """Scores completions in their context."""

    def logps(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """Log-probabilities (B, T) of the last ``logits_to_keep`` = T tokens of ``input_ids`` (B, P+T)."""
        ...


LogProbs = Callable[[PreTrainedModel, Tensor, Tensor, int], Tensor]
"""(model, ids, mask, T) -> log-probabilities (B, T), computed as in the trainer."""


class LocalTeacher:
    """A local checkpoint; one batched forward pass per generation."""

    def __init__(self, model: PreTrainedModel, log_probs: LogProbs) -> None:
        self.model = model
        self._log_probs = log_probs

    @torch.no_grad()
    def logps(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """See ``Teacher.logps``."""
        return self._log_probs(self.model, input_ids, attention_mask, logits_to_keep)


def retrying_client() -> httpx.Client:
    """HTTP client that retries failed connections."""
    return httpx.Client(transport=httpx.HTTPTransport(retries=3))


class RemoteTeacher:
    """A vLLM server: ``/v1/completions`` with ``prompt_logprobs`` of each row, several rows in flight.

    vLLM computes prompt log-probabilities at temperature 1 for any --logprobs-mode, without its prefix cache. The API
    generates at least one token, so a row must be shorter than the server's context.
    """

    def __init__(self, address: str, open_client: Callable[[], httpx.Client] = retrying_client) -> None:
        self._open_client = open_client
        self._address = address.rstrip("/")
        with open_client() as client:
            card = self._call(client, "/v1/models", lambda reply: reply["data"][0])
        self._model: str = card["id"]
        self.context_length: int | None = card.get("max_model_len")

    def logps(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """See ``Teacher.logps``; padded positions are 0."""
        rows: list[list[int]] = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        lengths = cast(list[int], attention_mask[:, -logits_to_keep:].sum(dim=1).tolist())
        result = torch.zeros(input_ids.size(0), logits_to_keep, device=input_ids.device)
        with self._open_client() as client, ThreadPoolExecutor(ROWS_IN_FLIGHT) as pool:
            scored = pool.map(partial(self._score, client), rows)
            for row, (scores, length) in enumerate(zip(scored, lengths, strict=True)):
                result[row, :length] = torch.tensor(scores[len(scores) - length :])
        return result

    def check_same_tokens(self, student: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
        """Like the function ``check_same_tokens``, through the server's /detokenize and /tokenize."""
        with self._open_client() as client:
            self._check_ids(client, student)
            body = {"messages": PROBE, "chat_template_kwargs": template_kwargs}
            prompt = self._call(client, "/tokenize", lambda reply: reply["tokens"], body)
        if prompt != student.encode(render(student, PROBE, template_kwargs), add_special_tokens=False):
            raise TeacherError(OTHER_CONTEXTS)

    def _check_ids(self, client: httpx.Client, student: PreTrainedTokenizerBase) -> None:
        ids = sorted(student.get_vocab().values())

        def is_same(count: int) -> bool:
            theirs = self._call(client, "/detokenize", lambda reply: reply["prompt"], {"tokens": ids[:count]})
            return theirs == student.decode(ids[:count], skip_special_tokens=False)

        if not is_same(len(ids)):
            first = bisect_left(range(1, len(ids)), True, key=lambda count: not is_same(count))
            raise TeacherError(
                f"teacher and student must share token ids, but id {ids[first]} is "
                f"{student.convert_ids_to_tokens(ids[first])!r} to the student and another token to the teacher at "
                f"{self._address}; use a teacher with the student's tokenizer"
            )

    def _score(self, client: httpx.Client, ids: list[int]) -> list[float]:
        """Log-probabilities of all tokens but the first."""
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}

        def read(reply: Any) -> list[float]:
            entries = reply["choices"][0]["prompt_logprobs"][1:]
            return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True)]

        return self._call(client, "/v1/completions", read, body | {"model": self._model})

    def _call(
        self, client: httpx.Client, path: str, read: Callable[[Any], Any], body: dict[str, Any] | None = None
    ) -> Any:
        """GET, or POST ``body``; ``read`` extracts the result from the JSON. Raises TeacherError."""
        url = self._address + path
        method = "GET" if body is None else "POST"
        try:
            reply = client.request(method, url, json=body, timeout=REMOTE_TIMEOUT_SECONDS)
        except httpx.HTTPError as error:
            raise TeacherError(f"no teacher answers at {url}: {error!r}; is `vllm serve` running there?") from error
        if reply.status_code >= 400:
            raise TeacherError(f"the teacher at {url} answered {reply.status_code}: {reply.text[:300]}")
        try:
            return read(reply.json())
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TeacherError(
                f"the teacher at {url} sent an unexpected reply: {error!r}; it must be a vLLM server, which returns "
                "prompt log-probabilities"
            ) from error


def load_teacher(path: str) -> PreTrainedModel:
    """Load a frozen checkpoint in fp32. Raises TeacherError if it cannot be loaded."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TeacherError(f"cannot load the teacher {path}: {error}") from error
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def check_same_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> None:
    """Raise TeacherError with the first difference in token ids, end of turn or prompt rendering with these variables.

    A teacher may have more tokens, because padded vocabularies differ in size.
    """
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for token, index in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(index) != token:
            raise TeacherError(
                f"teacher and student must share token ids, but id {index} is {token!r} to the student and "
                f"{theirs.get(index)!r} to the teacher; use a teacher with the student's tokenizer"
            )
    if student.eos_token_id != teacher.eos_token_id:
        raise TeacherError(
            f"teacher and student end a turn differently: {teacher.eos_token!r} and {student.eos_token!r}"
        )
    if render(student, PROBE, template_kwargs) != render(teacher, PROBE, template_kwargs):
        raise TeacherError(OTHER_CONTEXTS)
