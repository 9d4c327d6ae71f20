"""Small models with the chat templates and architectures of Qwen3, DeepSeek-R1 distillations and Llama 3, served
without a generator: content and reasoning of policies single and vote, streamed and whole."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Running, free_port, rtap_command, running
from tests.other_checkpoints import save_family

pytestmark = pytest.mark.slow
OFF: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module", params=["qwen3", "deepseek-r1", "llama-3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Running]]:
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    model = save_family(request.param, folder / "model")
    flags = [str(model), "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
    with running(rtap_command(port, *flags), port, "/ready", folder) as started:
        yield request.param, started


REPLIES = [
    ("qwen3", {}, "t", "7"),
    ("qwen3", OFF, "", "8"),
    ("deepseek-r1", {}, "t", "7"),
    ("llama-3", {}, "", "<think>7"),
]


@pytest.mark.parametrize("policy", ["single", "vote"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_content_and_the_thought_is_reasoning(served, policy, stream):
    family, server = served
    for name, fields, reasoning, content in REPLIES:
        if name != family:
            continue
        body = {"rtap": {"policy": policy, "samples": 4}, "max_tokens": 20, **fields}
        reply = server.client.chat.completions.create(
            model="rtap", messages=[{"role": "user", "content": "3+4?"}], stream=stream, extra_body=body
        )
        parts = [c.choices[0].delta for c in reply if c.choices] if stream else [reply.choices[0].message]
        assert "".join(part.content or "" for part in parts) == content
        written = "".join(getattr(part, "reasoning", None) or "" for part in parts)
        assert written.startswith(reasoning) if policy == "vote" else written == reasoning


def test_a_grammar_binds_the_answer_whether_thinking_is_on_or_off(served):
    family, server = served
    for fields in [{}, OFF] if family == "qwen3" else [{}]:
        reply = server.client.chat.completions.create(
            model="rtap", messages=[{"role": "user", "content": "3+4?"}],
            extra_body={"structured_outputs": {"choice": ["9"]}, "max_tokens": 20, **fields},
        )  # fmt: skip
        assert reply.choices[0].message.content == "9"


def test_the_start_and_the_configuration_say_what_was_detected(served):
    family, server = served
    config = httpx.get(f"{server.url}/v1/rtap/config").json()
    wanted = ("text", "no <think> in chat template or vocabulary")
    if family != "llama-3":
        wanted = ("think", "<think> in the chat template")
    assert (config["format"], config["format_source"]) == wanted
    assert config["models"] == ["rtap", config["model"]]
    log = server.log.read_text()
    assert f"rtap serve: format: {wanted[0]} ({wanted[1]}); --trajectory-format changes it\n" in log
    assert "rtap serve: policy: model (one turn, as with plain vLLM), the default without a confidence source" in log


def test_the_path_is_an_alias_of_the_name(served):
    _, server = served
    path = httpx.get(f"{server.url}/v1/rtap/config").json()["model"]
    assert [m.id for m in server.client.models.list()] == ["rtap", path]
    reply = server.client.chat.completions.create(
        model=path, messages=[{"role": "user", "content": "3+4?"}], max_tokens=5
    )
    assert reply.model == "rtap"
