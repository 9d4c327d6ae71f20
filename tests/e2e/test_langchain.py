"""LangChain's own tests for chat models, with its OpenAI class against `rtap serve`, and our request field through it.

ChatOpenAI drops top-level reply fields that it does not know, and ``reasoning_content``: a LangChain program sees the
answer and the token counts, and reads the ``rtap`` object off the HTTP reply.
"""

import json
from typing import Any, ClassVar

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

pytestmark = pytest.mark.slow
QUESTION = "make 82 from 3, 7, 25"
EAGER = {"threshold": 1.0, "max_cycles": 3}  # no confidence reaches 1.0, so three cycles are written


class TestStandard(ChatModelIntegrationTests):
    """Properties that are False here make LangChain skip the tests which need them."""

    has_tool_calling = False  # the bundled model calls no tools by itself (by a grammar: test_clients)
    has_tool_choice = False  # as has_tool_calling
    has_structured_output = False  # asks for a joke as JSON; the model has no words (by a grammar: test_clients)
    supports_json_mode = False  # as has_structured_output
    supports_image_inputs = False  # the bundled model reads text alone (pictures: test_pictures)
    supports_image_tool_message = False  # neither pictures nor tools
    supports_pdf_inputs = False  # vLLM's chat endpoint takes no files
    supports_pdf_tool_message = False  # neither files nor tools
    supports_audio_inputs = False  # the bundled model reads text alone
    supports_anthropic_inputs = False  # needs tools
    supports_model_override = False  # the server has one model
    enable_vcr_tests = False  # times a recorded stream; ours is a real server

    chat_model_class = ChatOpenAI
    # Not LangChain's 100 tokens: "Hello", which the bundled model was never taught, may take longer to be answered.
    standard_chat_model_params: ClassVar = {"temperature": 0, "max_tokens": 600}

    @pytest.fixture(autouse=True)
    async def _clients(self, server):
        """Clients of this test's own event loop; those that LangChain shares would outlive it."""
        self._url = f"{server.url}/v1"
        with httpx.Client(timeout=60) as self._http:
            async with httpx.AsyncClient(timeout=60) as self._http_async:
                yield

    @property
    def chat_model_params(self) -> dict[str, Any]:
        clients = {"http_client": self._http, "http_async_client": self._http_async}
        return {
            "model": "rtap",
            "base_url": self._url,
            "api_key": "none",
            "max_retries": 0,
            "stream_usage": True,
        } | clients


@pytest.fixture
def ask(server):
    """Make a ChatOpenAI, and the list of HTTP replies that it will get."""
    with httpx.Client(timeout=60) as client:
        replies: list[httpx.Response] = []
        client.event_hooks = {"response": [replies.append]}
        fixed = {"model": "rtap", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "seed": 1}

        def make(**options: Any) -> tuple[ChatOpenAI, list[httpx.Response]]:
            return ChatOpenAI(http_client=client, **fixed, **options), replies

        yield make


def test_the_rtap_field_goes_through_and_the_reply_tells_what_it_did(ask):
    model, replies = ask(extra_body={"rtap": EAGER})
    message = model.invoke(QUESTION)
    rtap = replies[0].json()["rtap"]
    assert (rtap["stop_reason"], len(rtap["cycles"])) == ("max_cycles", 3)
    assert message.content == next(c["answer"] for c in rtap["cycles"] if c["accepted"])
    assert message.usage_metadata["output_tokens"] == sum(c["tokens"] for c in rtap["cycles"])
    assert 0 < message.usage_metadata["output_token_details"]["reasoning"] < message.usage_metadata["output_tokens"]
    usage = message.response_metadata["token_usage"]
    assert usage["completion_tokens"] == message.usage_metadata["output_tokens"]
    assert message.response_metadata["finish_reason"] == "stop"
    assert "rtap" not in message.response_metadata


def test_the_rtap_field_per_call_and_streamed(ask):
    model, replies = ask(stream_usage=True)
    whole = model.invoke(QUESTION, extra_body={"rtap": EAGER})
    full = None
    for chunk in model.stream(QUESTION, extra_body={"rtap": EAGER}):
        full = chunk if full is None else full + chunk
    assert full.content == whole.content
    assert full.usage_metadata == whole.usage_metadata
    assert len(replies[0].json()["rtap"]["cycles"]) == 3
    assert json.loads(replies[0].request.content)["rtap"] == json.loads(replies[1].request.content)["rtap"] == EAGER


def test_a_wrong_rtap_field_is_a_bad_request(ask):
    model, _ = ask(extra_body={"rtap": {"treshold": 0.5}})
    with pytest.raises(openai.BadRequestError, match="treshold"):
        model.invoke(QUESTION)
