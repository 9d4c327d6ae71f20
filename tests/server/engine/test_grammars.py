"""A grammar that constrains nothing is refused before the engine sees it; what the engine refuses is a 400 too."""

import asyncio
import copy
import inspect
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.abstract_tool_parser import ToolParser

from rtap_server.engine.grammars import check_grammar, use_guidance
from tests.other_checkpoints import MODELS
from tests.server.fake_engine import FakeEngine, all_of, ask, build

CYCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
WORDS = [f"word{i:04}" for i in range(1000)]
DOUBLING = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)) + '\nr40 ::= "a"'
BAD: dict[str, dict[str, Any]] = {
    "a reference to itself": {"json": {"$ref": "#"}},
    "references in a circle": {"json": CYCLE},
    "a missing reference": {"json": {"$ref": "#/nowhere"}},
    "a reference to the network": {"json": {"$ref": "http://127.0.0.1:1/x"}},
    "a wrong pattern": {"json": {"type": "string", "pattern": "^C["}},
    "a wrong pattern of names": {"json": {"type": "object", "patternProperties": {"^C[": {}}}},
    "an unknown type": {"json": {"type": "nope"}},
    "an empty enum": {"json": {"enum": []}},
    "no JSON": {"json": "{"},
    "an object without an end": {"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
    "a rule that is itself": {"grammar": "root ::= root"},
    "rules in a circle": {"grammar": "root ::= a\na ::= b\nb ::= a"},
    "a missing rule": {"grammar": "root ::= nowhere"},
    "Lark that is itself": {"grammar": "start: start"},
    "no grammar": {"grammar": "("},
    "nested parentheses": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    "rules that double": {"grammar": DOUBLING},
    "a wrong expression": {"regex": "("},
    "a look-ahead": {"regex": "(?=a)b"},
    "an empty tag": {"structural_tag": "{}"},
    "a tag of the new form": {"structural_tag": '{"type": "structural_tag", "format": {"type": "any_text"}}'},
}
GOOD: list[dict[str, Any]] = [
    {"json": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 1000}}, "required": ["a"]}},
    {"json": {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}},
    {"json": {"oneOf": [{"type": "string"}, {"type": "integer"}]}},
    {"json": {"enum": WORDS}},
    {"json": '{"type": "array", "items": {"type": "string"}, "maxItems": 1000}'},
    {"json_object": True},
    {"choice": WORDS},
    {"regex": "|".join(WORDS)},
    {"regex": "(a|b|.)?" * 50},
    {"grammar": 'root ::= "a" | "b" root'},
    {"grammar": 'start: "a" | "b"'},
    {"grammar": "start: <|im_end|>"},  # of the model's vocabulary, which only the engine knows
]


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_grammar_is_refused_in_a_sentence(name):
    with pytest.raises(VLLMValidationError, match="cannot be used: ") as refused:
        await check_grammar(StructuredOutputsParams(**BAD[name]), disable_additional_properties=True)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("constraint", GOOD, ids=[str(n) for n in range(len(GOOD))])
async def test_a_good_grammar_is_accepted_in_little_time(constraint):
    began = time.process_time()
    await check_grammar(StructuredOutputsParams(**constraint), disable_additional_properties=True)
    assert time.process_time() - began < 1.0


async def test_the_event_loop_runs_while_a_grammar_is_checked():
    params = StructuredOutputsParams(grammar=DOUBLING + "\n")
    slow = asyncio.create_task(check_grammar(params, disable_additional_properties=True))
    longest, last = 0.0, time.perf_counter()
    while not slow.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert isinstance(slow.exception(), VLLMValidationError)
    assert longest < 0.3


@pytest.mark.parametrize("rtap", [{}, {"policy": "single"}])
async def test_a_grammar_that_the_engine_cannot_follow_is_the_clients_error(rtap):
    llm = FakeEngine(["<answer>1</answer>"], finish_reason="error")
    llm.vllm_config = SimpleNamespace(structured_outputs_config=StructuredOutputsConfig())  # pyright: ignore
    stream, _ = ask(build(llm), rtap=rtap, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(VLLMValidationError, match="simplify it"):
        await all_of(stream)
    stream, _ = ask(build(llm), rtap=rtap)
    assert (await all_of(stream))[-1].outputs[0].finish_reason == "error"  # without one it is the server's


async def test_the_engine_sees_no_bad_grammar():
    llm = FakeEngine(lambda _: "<answer>82</answer>")
    llm.vllm_config = SimpleNamespace(structured_outputs_config=StructuredOutputsConfig(backend="guidance"))  # pyright: ignore
    stream, _ = ask(build(llm), structured_outputs=StructuredOutputsParams(grammar="root ::= root"))
    with pytest.raises(VLLMValidationError, match="matches no text"):
        await all_of(stream)
    assert llm.calls == []
    stream, _ = ask(build(llm), structured_outputs=StructuredOutputsParams(grammar='root ::= "a"'))
    await all_of(stream)
    assert llm.calls


@pytest.mark.parametrize(("chosen", "becomes"), [("auto", "guidance"), ("xgrammar", "xgrammar")])
def test_the_operators_backend_wins(monkeypatch, chosen, becomes):
    monkeypatch.setattr(os, "environ", copy.copy(dict(os.environ)))
    args = AsyncEngineArgs(
        model=str(MODELS / "policy"),
        kv_cache_memory_bytes=2**20,
        structured_outputs_config=StructuredOutputsConfig(backend=chosen),
    )
    config = args.create_engine_config()
    use_guidance(config)
    assert config.structured_outputs_config.backend == becomes
    assert config.structured_outputs_config.disable_additional_properties is (becomes == "guidance")
    assert config.structured_outputs_config.disable_any_whitespace is (becomes == "guidance")
    assert os.environ.get("VLLM_ENFORCE_STRICT_TOOL_CALLING") == ("0" if becomes == "guidance" else None)
    assert envs.VLLM_ENFORCE_STRICT_TOOL_CALLING is (becomes != "guidance")
    assert "envs.VLLM_ENFORCE_STRICT_TOOL_CALLING" in inspect.getsource(ToolParser.get_structural_tag)
