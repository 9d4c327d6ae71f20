"""The litellm SDK against `rtap serve`, as a gateway would use it: `openai/rtap` and the server's address.

litellm hands on the `rtap` object of a whole reply, and drops that of stream chunks.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(server):
    """What every call of litellm_calls.py came to."""
    script = Path(__file__).with_name("litellm_calls.py")
    done = subprocess.run([sys.executable, script, server.url], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", ["whole", "async_whole"])
def test_content_reasoning_usage_and_the_rtap_object(told, call):
    reply = told[call]
    cycles = reply["rtap"]["cycles"]
    assert (reply["rtap"]["stop_reason"], len(cycles)) == ("max_cycles", 3)
    assert reply["content"] == next(c["answer"] for c in cycles if c["accepted"])
    assert "=" in reply["reasoning"]
    assert reply["finish"] == "stop"
    assert reply["tokens"] == sum(c["tokens"] for c in cycles)
    assert 0 < reply["reasoning_tokens"] < reply["tokens"]


@pytest.mark.parametrize("call", ["stream", "async_stream"])
def test_a_stream_tells_the_same(told, call):
    assert told[call] == {name: told["whole"][name] for name in ("content", "reasoning", "tokens")}


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        ("wrong_field", "BadRequestError", "treshold"),
        ("wrong_field_stream", "BadRequestError", "treshold"),
        ("unknown_model", "NotFoundError", "nope"),
    ],
)
def test_errors_are_litellms_own(told, call, error, word):
    assert told[call]["error"] == error, told[call]["message"]
    assert word in told[call]["message"]
