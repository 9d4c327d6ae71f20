"""The teacher of RLAD and KDRL: log-probabilities of the student's tokens, nothing generated.

Only the sampled token's log-probability is used (RLAD eq. 3), so the ids must mean the same to both: checked before
the run, token by token. Local (a checkpoint) or remote (a vLLM server's prompt log-probabilities).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import httpx
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from training.errors import TeacherError

REMOTE_TIMEOUT_SECONDS = 120.0


class Teacher(Protocol):
    """Scores completions in their context."""

    def logps(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """Log-probabilities (B, T) of the last ``logits_to_keep`` = T tokens of ``input_ids`` (B, P+T)."""
        ...


LogProbs = Callable[[PreTrainedModel, Tensor, Tensor, int], Tensor]
"""The trainer's own log-probabilities (model, ids, mask, T) -> (B, T), so that both sides are computed alike."""


class LocalTeacher:
    """A checkpoint on this machine, in evaluation mode, in one batched forward pass a generation."""

    def __init__(self, model: PreTrainedModel, log_probs: LogProbs) -> None:
        self.model = model
        self._log_probs = log_probs

    @torch.no_grad()
    def logps(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """As the protocol says."""
        return self._log_probs(self.model, input_ids, attention_mask, logits_to_keep)


class RemoteTeacher:
    """A vLLM server: ``/v1/completions`` with ``prompt_logprobs`` of the whole row.

    The server must give raw log-probabilities of the same temperature (1); it is asked for no new text but the one
    token that the API insists on.
    """

    def __init__(self, address: str, client: httpx.Client, model: str | None = None) -> None:
        self._client = client
        self._url = f"{address.rstrip('/')}/v1/completions"
        self._model = model or _only_model(address.rstrip("/"), client)

    def logps(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """As the protocol says; padded positions are 0."""
        rows = [cast(Any, ids[mask.bool()]).tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        lengths = cast(list[int], cast(Any, attention_mask[:, -logits_to_keep:].sum(dim=1)).tolist())
        result = torch.zeros(input_ids.size(0), logits_to_keep, device=input_ids.device)
        for row, (scores, length) in enumerate(zip(self._ask(rows), lengths, strict=True)):
            result[row, :length] = torch.tensor(scores[-length:] if length else [])
        return result

    def _ask(self, rows: Sequence[list[int]]) -> list[list[float]]:
        body = {"model": self._model, "prompt": rows, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        try:
            reply = self._client.post(self._url, json=body, timeout=REMOTE_TIMEOUT_SECONDS)
            reply.raise_for_status()
            choices = sorted(reply.json()["choices"], key=lambda c: c["index"])
            return [
                [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], c["prompt_logprobs"][1:], strict=True)]
                for ids, c in zip(rows, choices, strict=True)
            ]
        except httpx.HTTPStatusError as error:
            raise TeacherError(f"the teacher at {self._url} answered {error.response.status_code}: "
                               f"{error.response.text[:300]}") from error  # fmt: skip
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise TeacherError(f"the teacher at {self._url} gave no log-probabilities: {error!r}") from error


def _only_model(address: str, client: httpx.Client) -> str:
    try:
        reply = client.get(f"{address}/v1/models", timeout=REMOTE_TIMEOUT_SECONDS)
        reply.raise_for_status()
        return cast(str, reply.json()["data"][0]["id"])
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise TeacherError(f"no vLLM server answers at {address}/v1/models: {error!r}") from error


def load_teacher(path: str) -> PreTrainedModel:
    """The checkpoint in fp32, frozen. Raises TeacherError when it cannot be loaded."""
    try:
        model = cast(Any, AutoModelForCausalLM).from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TeacherError(f"cannot load the teacher {path}: {error}") from error
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Every id of the student must be the same token to the teacher, special ids and prompt rendering included.

    A teacher with more tokens is fine (padded vocabularies differ in size). Raises TeacherError with the first
    difference: log-probabilities of other tokens would train silently into nonsense.
    """
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for token, index in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(index) != token:
            raise TeacherError(
                f"teacher and student must share token ids, but id {index} is {token!r} to the student and "
                f"{theirs.get(index)!r} to the teacher; take a teacher with the student's tokenizer"
            )
    if student.eos_token_id != teacher.eos_token_id:
        raise TeacherError(
            f"teacher and student end a turn differently: {teacher.eos_token!r} and {student.eos_token!r}"
        )
    probe = [{"role": "user", "content": "make 82 from 3, 7, 25"}]
    if _render(student, probe) != _render(teacher, probe):
        raise TeacherError("the teacher's chat template renders prompts differently, so it would score other contexts")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> object:
    return cast(Any, tokenizer).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
