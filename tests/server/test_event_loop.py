"""The longest legal text of every route that reads text leaves the event loop free for others."""

import asyncio
import json
import time
from typing import Any

import pytest

from rtap_core.types import Score
from rtap_server.http.field_limits import MAX_CHARACTERS, MAX_CHARACTERS_ON_LOOP
from rtap_server.settings import Settings
from tests.server import whole

pytestmark = pytest.mark.asyncio(loop_scope="module")
CONTEXT = 2**15
LONGEST_STALL_SECONDS = 0.5


class LongContext(whole.PolicyEngine):
    """The bundled policy, whose tokenizer makes a token of nearly every character, with an ordinary context."""

    def __init__(self, vllm_config: Any) -> None:
        vllm_config.model_config.max_model_len = CONTEXT
        super().__init__(vllm_config)


class Sure:
    async def score(self, judged: Any) -> Score:
        return Score(0.5, len(judged.question_token_ids) + len(judged.cycle_token_ids))


@pytest.fixture(scope="module")
def service() -> whole.Service:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "PolicyEngine", LongContext)
        return whole.make_service(None, Settings(), confidence=Sure())


def text(characters: int) -> str:
    return ("12 + 7 = 19; é" * (characters // 14 + 1))[: characters - 100]


FEW, MANY = text(MAX_CHARACTERS_ON_LOOP), text(MAX_CHARACTERS)
CHAT = [{"role": "user", "content": MANY}]
ASKED: list[tuple[str, dict[str, Any], int]] = [
    ("/tokenize", {"prompt": MANY}, 200),
    ("/tokenize", {"messages": CHAT}, 200),
    ("/tokenize", {"prompt": FEW, "return_token_strs": True}, 200),
    ("/tokenize", {"prompt": MANY, "return_token_strs": True}, 400),
    ("/tokenize", {"prompt": MANY + MANY}, 400),
    ("/detokenize", {"tokens": [9] * CONTEXT}, 200),
    ("/v1/rtap/score", {"question": MANY, "answer": "7"}, 200),
    ("/v1/rtap/score", {"question": "3 + 4", "think": MANY, "answer": "7"}, 200),
    ("/generative_scoring", {"query": FEW, "items": ["a"], "label_token_ids": [5, 6]}, 400),
    ("/generative_scoring", {"query": MANY, "items": ["a"], "label_token_ids": [5, 6]}, 400),
    ("/v1/messages/count_tokens", {"messages": CHAT}, 400),
    ("/v1/chat/completions/render", {"messages": CHAT}, 400),
    ("/v1/chat/completions", {"messages": CHAT}, 400),
    ("/v1/completions", {"prompt": MANY}, 400),
    ("/v1/completions", {"prompt": [9] * (CONTEXT - 100)}, 200),
    ("/v1/responses", {"input": MANY}, 400),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 5}, 400),
]


async def stall_of(service: whole.Service, path: str, body: bytes) -> tuple[int, float]:
    """(status, seconds that the loop did nothing else at most)."""
    stalls = []

    async def beat() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            stalls.append(time.perf_counter() - began)

    beating = asyncio.create_task(beat())
    reply = await service.ask(path, content=body, headers={"content-type": "application/json"})
    await asyncio.sleep(0.02)
    beating.cancel()
    return reply.status_code, max(stalls)


@pytest.mark.parametrize(("path", "body", "status"), ASKED, ids=[f"{n} {path}" for n, (path, _, _) in enumerate(ASKED)])
async def test_no_text_holds_up_the_event_loop(service, path, body, status):
    own = body if path == "/v1/rtap/score" else {"model": "rtap"} | body
    stalls = []
    for _ in range(3):  # a busy machine is no fault of ours
        found, stall = await stall_of(service, path, json.dumps(own, ensure_ascii=False).encode())
        assert found == status
        stalls.append(stall)
        if stall < LONGEST_STALL_SECONDS:
            return
    raise AssertionError(f"the loop stood still for {min(stalls):.2f} s at least")
