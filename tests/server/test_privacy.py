"""What errors and log lines may say: never what a request said, nor where the server keeps its files."""

import io
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from rtap_server.http.privacy import keep_logs_private, texts_of, without, without_internals

CANARY = "CANARY-9f3e7c1b and more of the prompt"


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": CANARY},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": CANARY}]}]},
        {"tools": [{"function": {"parameters": {"properties": {"a": {"enum": [CANARY]}}}}}]},
        {"metadata": {"role_of": CANARY}},
        {"messages": [{"role": CANARY}]},
    ],
)
@pytest.mark.parametrize("echo", [CANARY, repr(CANARY), CANARY[:20], CANARY[5:], f"x{CANARY}x" * 3])
def test_an_error_repeats_nothing_of_a_request(request_, echo):
    shown = without(f"Grammar error: {echo} is not valid", texts_of(request_))
    assert "CANARY" not in shown
    assert "the prompt" not in shown
    assert shown.startswith("Grammar error: ")


def test_what_an_error_says_itself_stays():
    request = {"model": "gpt-9", "messages": [{"role": "assistant", "content": "how many tokens are there?"}], "n": 3}
    message = "The model `gpt-9` has a maximum context length of 1024 tokens; an assistant cannot begin"
    assert without(message, texts_of(request)) == message
    assert without(message, []) == message


@given(st.text(min_size=6, max_size=200), st.text(max_size=50), st.text(max_size=50))
def test_no_fifteen_characters_in_a_row_pass(text, before, after):
    shown = without(before + text + after, [text])
    runs = {text[n : n + 15] for n in range(len(text) - 14)}
    assert not any(run in shown for run in runs)
    assert text not in shown or text in before + after


def test_a_large_request_takes_no_time():
    request = {"messages": [{"role": "user", "content": "word " * 1000 + str(n)} for n in range(1000)]}
    began = time.thread_time()
    without("x" * 1000, texts_of(request))
    assert time.thread_time() - began < 0.25  # some tens of milliseconds on an idle core


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no image <_io.BytesIO object at 0x7f31ab8c>", "no image <_io.BytesIO object at <address>>"),
        ("no file /home/me/models/x.safetensors here", "no file <path> here"),
        ("file:///srv/media/a.png", "<path>"),
        ('Traceback (most recent call last):\n  File "/a/b.py", line 3, in f\nValueError: bad', "ValueError: bad"),
        ("use /v1/chat/completions or /inference/v1/generate", "use /v1/chat/completions or /inference/v1/generate"),
        ("audio/wav and/or 1/2", "audio/wav and/or 1/2"),
        ("bad [type=a, input_value={'a': ']'}, input_type=dict]\n    For further information visit http://x/y", "bad"),
    ],
)  # fmt: skip
def test_the_inside_of_the_server_is_not_told(message, shown):
    assert without_internals(message) == shown


class Request(BaseModel):
    prompt: str


@pytest.fixture
def log():
    """What all loggers write at DEBUG while the hygiene is on."""
    names = ("vllm", "vllm.entrypoints", "vllm.renderers", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in (*names, "")]
    factory, before = logging.getLogRecordFactory(), [(one.level, one.propagate, list(one.filters)) for one in loggers]
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    logging.getLogger("vllm").setLevel(logging.DEBUG)
    for name in ("vllm", "uvicorn.access"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).propagate = False
    logging.getLogger("uvicorn.access").setLevel(logging.DEBUG)
    keep_logs_private()
    keep_logs_private()  # a second app of one process
    yield out
    logging.setLogRecordFactory(factory)
    for one, (level, propagates, filters) in zip(loggers, before, strict=True):
        one.removeHandler(handler)
        one.filters, one.propagate = filters, propagates
        one.setLevel(level)


def test_log_lines_have_no_request_in_them_at_any_level(log):
    serving, said = logging.getLogger("vllm.entrypoints.openai.serving"), CANARY  # its line is among the frames
    serving.debug("Request body: %s", CANARY)
    logging.getLogger("vllm.renderers.chat_utils").debug("Input prompt: %s", CANARY)
    serving.warning("Rejected: %s", ValueError(CANARY))
    serving.error("Error with %s", Request(prompt=CANARY))
    try:
        raise ValueError(said)
    except ValueError:
        serving.exception("Error in the generator.")
    logging.getLogger("uvicorn.access").info(
        '%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", f"/v1?q={CANARY}", "1.1", 200
    )
    logging.getLogger("vllm.v1.engine.core").debug("loop %s of %d", "active", 3)
    logging.getLogger("vllm.v1").debug("%(a)s", {"a": 1})
    written = log.getvalue()
    assert "CANARY" not in written
    assert "of the prompt" not in written
    for line in ("Rejected: ValueError", "Error with Request", "Error in the generator.", "loop active of 3", "v1 1",
                 '1.2.3.4:5 - "GET /v1 HTTP/1.1" 200', "test_privacy.py", "\nValueError"):  # fmt: skip
        assert line in written, line
    assert "Request body" not in written
