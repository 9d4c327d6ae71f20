"""/v1/rtap/score: the text that is judged, after the chat template of the server."""

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from rtap_core.format import THINK, TrajectoryFormat
from rtap_core.types import Judged, Score
from rtap_server.engine.request_state import RequestState, begin_request
from rtap_server.http.errors import install_handlers
from rtap_server.routes.rtap import rtap_router


class Template:
    """A chat template whose prompt has a given ending. given: keyword arguments of the last call."""

    def __init__(self, ending: str) -> None:
        self.ending, self.given = ending, dict[str, Any]()

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        self.given = kwargs
        return f"Q: {conversation[0]['content']}\nA: {self.ending}"


class Judge:
    def __init__(self) -> None:
        self.read = ("", "")

    async def score(self, judged: Judged) -> Score:
        self.read = ("".join(map(chr, judged.question_token_ids)), "".join(map(chr, judged.cycle_token_ids)))
        return Score(0.7, tokens=3)


async def ask(template: Template, body: dict[str, str], fmt: TrajectoryFormat = THINK) -> tuple[httpx.Response, Judge]:
    judge, app = Judge(), FastAPI()
    server: Any = SimpleNamespace(format=fmt, confidence=judge, encode=lambda text: [ord(c) for c in text])
    app.include_router(rtap_router(server, template, ["rtap"], {"enable_thinking": False}))
    install_handlers(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        begin_request(RequestState())
        return await client.post("/v1/rtap/score", json=body), judge


@pytest.mark.parametrize(
    ("ending", "body", "cycle"),
    [
        ("", {"think": "so", "answer": "2"}, "<think>so</think>2"),
        ("<think>\n", {"think": "so", "answer": "2"}, "so</think>2"),
        ("<think>\n\n</think>\n\n", {"answer": "2"}, "2"),
    ],
)
async def test_a_cycle_continues_what_the_template_has_begun(ending: str, body: dict[str, str], cycle: str) -> None:
    template = Template(ending)
    reply, judge = await ask(template, {"question": "1+1", **body})
    assert reply.json()["confidence"] == 0.7
    assert judge.read == (f"Q: 1+1\nA: {ending}", cycle)
    assert template.given["enable_thinking"] is False


async def test_a_thought_is_refused_where_the_template_turns_thinking_off() -> None:
    reply, _ = await ask(Template("<think>\n\n</think>\n\n"), {"question": "1+1", "think": "so", "answer": "2"})
    assert reply.status_code == 400
    assert "turns thinking off" in reply.json()["error"]["message"]
