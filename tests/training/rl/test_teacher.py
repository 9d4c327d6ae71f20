"""The remote teacher against a scripted server; tests/e2e/test_remote_teacher.py has the real one."""

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from rtap_training.models.huggingface import load_tokenizer
from rtap_training.models.teacher import ROWS_IN_FLIGHT, RemoteTeacher
from rtap_training.training_errors import TeacherError
from tests.training.rl.tiny import BUNDLED

CARD = {"data": [{"id": "big", "max_model_len": 64}]}


def teacher(answer: Callable[[str, Any], Any]) -> RemoteTeacher:
    """Over a server that answers each POST with what ``answer`` makes of path and body; a status is an error."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=CARD)
        result = answer(request.url.path, json.loads(request.content))
        return httpx.Response(result, text="no") if isinstance(result, int) else httpx.Response(200, json=result)

    return RemoteTeacher("http://teacher:8000/", lambda: httpx.Client(transport=httpx.MockTransport(handle)))


def scores(path: str, body: Any) -> Any:
    """Each token scores minus its position."""
    assert path == "/v1/completions"
    assert (body["model"], body["max_tokens"], body["prompt_logprobs"]) == ("big", 1, 0)
    places = [None, *({str(token): {"logprob": -float(i)}} for i, token in enumerate(body["prompt"][1:], start=1))]
    return {"choices": [{"index": 0, "prompt_logprobs": places}]}


def test_scores_come_to_their_tokens_and_padding_is_zero() -> None:
    ids = torch.tensor([[0, 5, 6, 7, 8, 9], [4, 5, 6, 7, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    logps = teacher(scores).logps(ids, mask, 3)
    assert logps.tolist() == [[-2, -3, -4], [-3, 0, 0]]


def test_several_rows_are_in_flight_and_keep_their_order() -> None:
    together = threading.Barrier(ROWS_IN_FLIGHT, timeout=20)

    def slow(path: str, body: Any) -> Any:
        together.wait()
        return scores(path, body) if body["prompt"][0] else 500

    ids = torch.arange(1, 1 + 3 * ROWS_IN_FLIGHT).reshape(ROWS_IN_FLIGHT, 3)
    assert teacher(slow).logps(ids, torch.ones_like(ids), 2).tolist() == [[-1, -2]] * ROWS_IN_FLIGHT


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (400, r"the teacher at http://teacher:8000/v1/completions answered 400: no"),
        ({"choices": [{"index": 0, "prompt_logprobs": None}]}, "must be a vLLM server"),
        ({"choices": [{"index": 0}]}, "must be a vLLM server"),
        ({"choices": []}, "must be a vLLM server"),
        ({"choices": [{"prompt_logprobs": [None, {"9": {"logprob": -1}}]}]}, "unexpected reply"),
    ],
)
def test_other_answers_are_sentences(reply: Any, message: str) -> None:
    ids = torch.tensor([[3, 4]])
    with pytest.raises(TeacherError, match=message):
        teacher(lambda *_: reply).logps(ids, torch.ones_like(ids), 1)


def test_the_first_id_that_means_something_else_is_named() -> None:
    tokenizer = load_tokenizer(BUNDLED / "policy")

    def other(path: str, body: Any) -> Any:
        assert path == "/detokenize"
        return {"prompt": "".join("?" if i == 300 else tokenizer.decode([i]) for i in body["tokens"])}

    with pytest.raises(TeacherError, match=r"id 300 is .* to the student and another token to the teacher"):
        teacher(other).check_same_tokens(tokenizer, {})


def test_another_rendering_of_conversations_is_refused() -> None:
    tokenizer = load_tokenizer(BUNDLED / "policy")

    def other(path: str, body: Any) -> Any:
        return {"prompt": tokenizer.decode(body["tokens"])} if path == "/detokenize" else {"tokens": [1, 2]}

    with pytest.raises(TeacherError, match="renders prompts differently"):
        teacher(other).check_same_tokens(tokenizer, {})
