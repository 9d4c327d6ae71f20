"""Served confidence, the generator's probability fused with the policy's log-probabilities, equals transformers'."""

import httpx
import pytest
import torch

from rtap_core.artifact import read_artifact
from rtap_core.features import logprob_features
from rtap_core.format import RTAP
from rtap_training.models.online_generator import load_online_generator
from tests.e2e.conftest import MODELS
from tests.training.demo import encode_question, encode_text, load_policy

QUESTIONS = ["make 82 from 3, 7, 25", "37*48+65", "What is 96 - 27 + 8?"]


@pytest.fixture(scope="module")
def models():
    policy, tokenizer = load_policy(MODELS / "policy")
    return policy, load_online_generator(MODELS / "confidence"), tokenizer


def _expected(models, question: list[int], before: list[int], cycle: list[int], *, is_opened: bool) -> float:
    """Confidence of ``cycle`` after ``question`` and the cycles ``before``, computed with transformers."""
    policy, generator, _ = models
    with torch.inference_mode():
        probability = generator(input_ids=torch.tensor([[*question, *cycle]])).logits[0, -1].sigmoid().item()
        ids = [*question, *before, *cycle]
        logps = policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(ids) - len(cycle) + is_opened  # the server's opening token was not sampled
    logistic = read_artifact(generator.config.to_dict()).logistic
    assert logistic is not None
    sampled = [("", logps[i - 1, ids[i]].item()) for i in range(first, len(ids))]
    return logistic.confidence(probability, logprob_features(sampled, None))


@pytest.mark.parametrize("text", QUESTIONS)
def test_every_cycle_has_the_confidence_of_transformers(server, models, text):
    options = {"threshold": 1.0, "max_cycles": 3, "return_cycles": True}
    body = {"model": "rtap", "messages": [{"role": "user", "content": text}], "seed": 5, "rtap": options}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    question, before = encode_question(text), list[int]()
    for cycle in reply["rtap"]["cycles"]:
        ids = encode_text(models[2], RTAP.render_cycle(cycle["think"], cycle["answer"]))
        if len(ids) != cycle["tokens"]:  # the reply strips white space around a thought
            break
        expected = _expected(models, question, before, ids, is_opened=cycle["index"] > 0)
        assert cycle["confidence"] == pytest.approx(expected, abs=0.03)  # bfloat16 there, float32 here
        before += ids
    assert before


def test_a_given_pair_has_the_confidence_of_transformers(server, models):
    for think, answer in (("37*48=1776 1776+65=1841", "1841"), ("37*48=1676 1676+65=1741", "1741")):
        body = {"question": "37*48+65", "think": think, "answer": answer}
        got = httpx.post(f"{server.url}/v1/rtap/score", json=body, timeout=60).json()["confidence"]
        ids = encode_text(models[2], RTAP.render_cycle(think, answer))
        expected = _expected(models, encode_question("37*48+65"), [], ids, is_opened=False)
        assert got == pytest.approx(expected, abs=0.03)
