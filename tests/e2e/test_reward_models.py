"""A reward model of another family judges the bundled policy's answers, in this server and behind an address."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ENVIRONMENT, Running, free_port, rtap_command, running
from tests.other_checkpoints import save_reward_model

QUESTION, ANSWER = "make 82 from 3, 7, 25", "3*25+7=82"
ENGINE = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 2**27}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def judging(reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    flags = ["--confidence-model", str(reward_model), "--confidence-engine-args", json.dumps(ENGINE)]
    with running(rtap_command(port, *flags), port, "/ready", tmp_path_factory.mktemp("rtap")) as started:
        yield started


@pytest.fixture(scope="module")
def expected(reward_model: Path) -> Callable[..., Any]:
    """The score of transformers for a chat, as a probability within 1e-3."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(reward_model)
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)

    def score(*messages: dict[str, str]) -> Any:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        with torch.no_grad():
            logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits
        return pytest.approx(logits.sigmoid().item(), abs=1e-3)

    return score


def _chat(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


SYSTEM, USER = ("system", "Be brief."), ("user", QUESTION)
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
PLAIN_PROMPT = f"user\n{QUESTION}\nassistant\n"  # without the policy's special tokens
BODIES = {
    "/v1/chat/completions": ({"messages": _chat(SYSTEM, USER)}, _chat(SYSTEM, USER)),
    "/v1/messages": ({"system": SYSTEM[1], "messages": _chat(USER), "max_tokens": 200}, _chat(SYSTEM, USER)),
    "/v1/responses": ({"instructions": SYSTEM[1], "input": QUESTION}, _chat(SYSTEM, USER)),
    "/v1/completions": ({"prompt": PROMPT, "max_tokens": 200}, _chat(("user", PLAIN_PROMPT))),
}


@pytest.mark.parametrize("path", BODIES)
def test_every_endpoint_is_judged_as_transformers_judges_its_chat(path, judging, expected):
    body, messages = BODIES[path]
    limits = {"policy": "confidence", "max_cycles": 1, "return_cycles": True}
    reply = httpx.post(f"{judging.url}{path}", json={"model": "rtap", "seed": 3, **body, "rtap": limits}, timeout=120)
    assert reply.status_code == 200, reply.text
    fields: Any = reply.json()
    (cycle,) = (fields.get("rtap") or fields["choices"][0]["rtap"])["cycles"]
    assert cycle["confidence"] == expected(*messages, {"role": "assistant", "content": cycle["text"]})


def test_an_answer_from_elsewhere_is_judged_too(judging, expected):
    reply = httpx.post(f"{judging.url}/v1/rtap/score", json={"question": QUESTION, "answer": ANSWER}, timeout=120)
    assert reply.json()["confidence"] == expected(*_chat(USER, ("assistant", ANSWER)))


def test_what_the_generator_judges_is_announced(judging, reward_model):
    log = judging.log.read_text()
    assert f"{reward_model} judges the answer as a chat in its own template" in log
    assert "not calibrated" in log


def test_a_remote_reward_model_gives_the_same_score(reward_model, expected, tmp_path):
    generator_port, port = free_port(), free_port()
    sizes = [flag for name, value in ENGINE.items() for flag in (f"--{name.replace('_', '-')}", str(value))]
    command = [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(reward_model), "--runner",
        "pooling", "--enforce-eager", "--host", "127.0.0.1", "--port", str(generator_port), *sizes,
    ]  # fmt: skip
    with (
        running(command, generator_port, "/health", tmp_path, **ENVIRONMENT) as generator,
        running(rtap_command(port, "--confidence-model", generator.url), port, "/ready", tmp_path) as started,
    ):
        assert f"{generator.url} judges the answer as a chat in its own template" in started.log.read_text()
        score = {"question": QUESTION, "answer": ANSWER}
        reply = httpx.post(f"{started.url}/v1/rtap/score", json=score, timeout=120)
        chat = _chat(USER, ("assistant", ANSWER))
        assert reply.json()["confidence"] == expected(*chat)
