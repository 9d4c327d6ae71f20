"""What a request may ask for: refused with the field's name, at once, and without a copy of what was sent."""

import contextlib
import inspect
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rtap_core.errors import InvalidRequest
from rtap_server.http.field_limits import (
    MAX_DEPTH,
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    FieldLimits,
    is_deeper,
    media_schemes,
    text_length,
)
from tests.costs import cpu_seconds

LIMITS = FieldLimits(16, 20, 1000, allows_templates=False)
IMAGE = {"type": "image_url", "image_url": {"url": "https://x/a.png"}}


def said(parts):
    return {"messages": [{"role": "user", "content": parts}]}


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("request_", "param", "sentence"),
    [
        ({"n": 17}, "n", "n=17 is above this server's limit of 16"),
        ({"n": 10**12}, "n", "limit of 16"),
        ({"n": "1000"}, "n", "limit of 16"),  # vLLM takes it for a number
        ({"messages": [{}] * 21}, "messages", "21 messages are above this server's limit of 20"),
        ({"input": [{}] * 21}, "input", "21 items"),
        ({"prompt": ["a"] * 21}, "prompt", "21 prompts"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop", "17 entries"),
        ({"stop": "a" * (MAX_STOP_CHARACTERS + 1)}, "stop", "longer than 256 characters"),
        ({"stop_sequences": ["a" * 300]}, "stop_sequences", "longer than 256"),
        ({"stop_token_ids": list(range(100))}, "stop_token_ids", "100 entries"),
        ({"bad_words": ["a"] * 100}, "bad_words", "100 entries"),
        ({"logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIASES + 1)}}, "logit_bias", "more than 1024 entries"),
        ({"metadata": nested(MAX_DEPTH)}, None, "nested more than 64 levels deep"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "a template is code"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "--allow-request-templates"),
        ({"chat_template_kwargs": {"enable_thinking": "{{ x }}"}}, "chat_template_kwargs", "true or false"),
        ({"chat_template_kwargs": {"messages": False}}, "chat_template_kwargs", "messages is not allowed"),
        ({"chat_template_kwargs": {"reasoning_effort": "extreme"}}, "chat_template_kwargs", "reasoning_effort"),
        ({"chat_template_kwargs": {"thinking": True, "a b": True}}, "chat_template_kwargs", "a b is not allowed"),
        ({"chat_template_kwargs": {f"a{i}": True for i in range(17)}}, "chat_template_kwargs", "a0 is not allowed"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs", "kv_transfer_params='x' must be an object"),
        ({"vllm_xargs": {"ec_transfer_params": [1]}}, "vllm_xargs", "ec_transfer_params='[1]' must be an object"),
        ({"sampling_params": {"extra_args": {"kv_transfer_params": 1}}}, "extra_args", "must be an object"),
        ({"structured_outputs": {"choice": ["a"] * 1001}}, "structured_outputs", "choice has 1001 entries"),
        ({"sampling_params": {"structured_outputs": {"regex": "\0"}}}, "sampling_params.structured_outputs", "\\x00"),
        (said([IMAGE]), "messages", "--allowed-media-domains"),
        (said([{"type": "image_url", "image_url": "file:///etc/passwd"}]), "messages", "send a data: URL"),
        (said([{"type": "audio_url", "audio_url": {"url": "\\\\host/a"}}]), "messages", "send a data: URL"),
        ({"input": [{"content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input", "send a data: URL"),
        (said([{"type": "image", "source": {"type": "url", "url": "http://x"}}]), "messages", "send a data: URL"),
        ({"system": [{"source": {"type": "url", "url": "http://x"}}]}, "system", "send a data: URL"),
        ({"whatever": {"image_url": "http://x"}}, "whatever", "send a data: URL"),
        (said([{"type": "tool_result", "content": [IMAGE]}]), "messages", "send a data: URL"),
        ({"prompt": [1] * 1001}, "prompt", "1001 tokens in prompt are more than the model's context of 1000"),
        ({"prompt": [[1], [1] * 1001]}, "prompt", "1001 tokens"),
        ({"tokens": [1] * 1001}, "tokens", "1001 tokens"),
        ({"token_ids": [1] * 1001}, "token_ids", "1001 tokens"),
        ({"sampling_params": {"n": 17}}, "n", "n=17 is above"),
        ({"sampling_params": {"stop": ["a"] * 17}}, "stop", "17 entries"),
    ],
)
def test_too_much_is_refused_with_its_name(request_, param, sentence):
    with pytest.raises(InvalidRequest) as refused:
        LIMITS.check(request_)
    assert refused.value.param == param
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"n": 16, "messages": [{}] * 20, "stop": ["a" * MAX_STOP_CHARACTERS] * MAX_STOPS, "logit_bias": {"1": 1}},
        {"n": None, "messages": "hi", "stop": None, "logit_bias": None, "chat_template": None},
        {"n": [], "logit_bias": [], "prompt": [], "input": "hi"},
        {"n": 1e400, "prompt": [1, 2, 3] * 100},  # ids of one prompt
        {"metadata": nested(MAX_DEPTH - 1)},
        said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
        {"tools": [{"parameters": {"properties": {"image_url": {"type": "string"}}}}]},
        said("https://x/a.png is only text"),
        said([{"type": "tool_use", "id": "1", "name": "show", "input": {"image_url": "https://x/a.png"}}]),
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"image_url": "https://x"}}}]}]},
        {"metadata": {"image_url": "https://x/a.png"}},
        {"chat_template_kwargs": {"enable_thinking": False, "thinking": True, "reasoning_effort": "high"}},
        {"chat_template_kwargs": None, "vllm_xargs": None},
        {"chat_template_kwargs": {}, "vllm_xargs": {"kv_transfer_params": None, "mine": "x"}},
    ],
)
def test_what_is_not_too_much_is_vllms_business(request_):
    LIMITS.check(request_)


def test_no_argument_of_transformers_is_a_switch():
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"self", "kwargs"}
    for name in arguments:
        with pytest.raises(InvalidRequest):
            LIMITS.check({"chat_template_kwargs": {name: True}})


def test_what_a_flag_allows_passes():
    limits = FieldLimits(16, 20, 1000, allows_templates=True, media_schemes=media_schemes(["x"], None))
    limits.check({"chat_template": "{{ 1 }}", **said([IMAGE])})


@pytest.mark.parametrize(
    ("domains", "folder", "passing"),
    [
        (None, "", ["data:,x"]),
        (["x"], "", ["data:,x", "http://x/a", "HTTPS://x/a"]),
        (None, "/media", ["data:,x", "file:///media/a"]),  # and no address on the net: vLLM would take any then
        (["x"], "/media", ["data:,x", "http://x/a", "HTTPS://x/a", "file:///media/a"]),
    ],
)
def test_addresses_begin_as_vllms_flags_allow(domains, folder, passing):
    limits = FieldLimits(16, 20, 1000, allows_templates=False, media_schemes=media_schemes(domains, folder))

    def passes(url):
        try:
            limits.check(said([{"type": "image_url", "image_url": {"url": url}}]))
        except InvalidRequest:
            return False
        return True

    urls = [
        "data:,x",
        "http://x/a",
        "HTTPS://x/a",
        "file:///media/a",
        "ftp://x/a",
        "//x/a",
        "/etc/passwd",
        "\\\\x\\a",
        "",
    ]
    assert [url for url in urls if passes(url)] == passing


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_depth_is_that_of_the_brackets(value):
    def slow(value):
        if isinstance(value, dict):
            return 1 + max(map(slow, value.values()), default=0)
        return 1 + max(map(slow, value), default=0) if isinstance(value, list) else 0

    depth = slow(value)
    assert not is_deeper(value, depth)
    assert depth == 0 or is_deeper(value, depth - 1)


@pytest.mark.parametrize(
    "request_",
    [
        {"stop": ["a" * 200] * 5_000},
        {"metadata": nested(100_000)},
        {"messages": [{"role": "user", "content": "x"}] * 30_000},
        {"logit_bias": {str(i): 1 for i in range(80_000)}},
        {"tools": json.loads(json.dumps([{"a": [[]] * 20}] * 8_000))},
    ],
    ids=["stop strings", "deep", "messages", "biases", "wide"],
)
def test_a_megabyte_is_looked_through_at_once_and_in_little_memory(request_):
    def check():
        with contextlib.suppress(InvalidRequest):
            LIMITS.check(request_)

    assert cpu_seconds(check) < 0.5  # a tenth of a second on an idle core
    tracemalloc.start()
    with contextlib.suppress(InvalidRequest):
        LIMITS.check(request_)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


IMAGE = "data:image/png;base64," + "A" * 100_000


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "input_image", "image_url": IMAGE},
        {"type": "input_audio", "input_audio": {"data": IMAGE, "format": "wav"}},
        {"type": "file", "file": {"file_data": IMAGE}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}},
    ],
)  # fmt: skip
def test_media_is_no_text(part):
    assert text_length({"messages": [{"role": "user", "content": [part]}]}) < 100


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": IMAGE}, {"prompt": ["a", IMAGE]}, {"messages": [{"role": "user", "content": IMAGE}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": IMAGE}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": IMAGE, "image_url": "x"}]}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": IMAGE}}]},
    ],
)  # fmt: skip
def test_text_that_no_prompt_could_have_is_refused_before_it_is_tokenised(request_):
    limits = FieldLimits(16, 1024, 1024, allows_templates=False)
    with pytest.raises(InvalidRequest, match="more than 16 for each of 1024 tokens, the length of the model's context"):
        limits.check_length(request_)
    FieldLimits(16, 1024, 10_000, allows_templates=False).check_length(request_)
