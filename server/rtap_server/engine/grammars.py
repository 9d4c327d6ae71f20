"""Structured output: the backend that compiles grammars, and a check of each grammar before the engine compiles it.

vLLM's ``auto`` means xgrammar, which compiles on few threads, cannot be interrupted, and takes seconds for one
``maxLength`` with a vocabulary of 150,000 tokens. llguidance takes milliseconds and bounds its own work.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_guidance import GuidanceBackend, serialize_guidance_grammar
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.request import get_structured_output_key

from rtap_server.engine.vllm_compat import tokenizer_of

# CPU time. vLLM validates a grammar again on the event loop for each cycle, and the engine compiles it.
_MAX_SECONDS = 0.25
_MAX_QUOTED_CHARACTERS = 200
_KINDS = {
    StructuredOutputOptions.JSON: "JSON schema",
    StructuredOutputOptions.REGEX: "regular expression",
    StructuredOutputOptions.CHOICE: "choice",
    StructuredOutputOptions.STRUCTURAL_TAG: "structural tag",
}


def use_guidance(config: VllmConfig) -> None:
    """Make llguidance the backend, unless the operator chose one or it cannot read the tokenizer.

    It has no structural tags, in which vLLM's tool parsers would otherwise wrap the schemas of tools."""
    structured_outputs = config.structured_outputs_config
    if structured_outputs.backend == "auto" and GuidanceBackend.is_tokenizer_supported(tokenizer_of(config)):
        structured_outputs.backend = "guidance"
        structured_outputs.disable_additional_properties = True  # unless a schema allows them, as with xgrammar
        structured_outputs.disable_any_whitespace = True  # small models write white space until max_tokens
        os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")


async def constrained(
    outputs: AsyncGenerator[RequestOutput, None], params: StructuredOutputsParams, config: StructuredOutputsConfig
) -> AsyncGenerator[RequestOutput, None]:
    """``outputs`` of a request with a grammar.

    Raises VLLMValidationError (400) before the engine sees a bad one, and when the engine ends a request with an
    error: it could not compile or follow what the client wrote."""
    if config.backend == "guidance":
        await check_grammar(params, disable_additional_properties=config.disable_additional_properties)
    async with aclosing(outputs):
        async for output in outputs:
            if any(part.finish_reason == "error" for part in output.outputs):
                raise VLLMValidationError("the model cannot be held to this schema or grammar: simplify it")
            yield output


async def check_grammar(params: StructuredOutputsParams, *, disable_additional_properties: bool) -> None:
    """Raise VLLMValidationError for a grammar that llguidance refuses, that takes long, or that matches no text."""
    if params.all_constraints_none():
        return
    kind, spec = get_structured_output_key(params)
    problem = await asyncio.to_thread(_problem, kind, spec, disable_additional_properties)
    if problem is not None:
        raise VLLMValidationError(f"this {_KINDS.get(kind, 'grammar')} cannot be used: {problem}")


@lru_cache(maxsize=64)
def _problem(kind: StructuredOutputOptions, spec: str, disable_additional_properties: bool) -> str | None:
    """Compiling for a tokenizer of bytes shows all faults but those of the vocabulary, and needs no vocabulary."""
    began = time.thread_time()
    try:
        grammar = serialize_guidance_grammar(kind, spec, disable_additional_properties=disable_additional_properties)
        error = LLMatcher.validate_grammar(grammar, None)
    except KeyError as missing:
        error = f"it has no {missing}"
    except Exception as refused:  # of any class, by the text: RecursionError, TypeError, ValueError
        error = str(refused) or type(refused).__name__
    else:
        error = error or _first_error(grammar)
    if not error and time.thread_time() - began > _MAX_SECONDS:
        error = "it takes too long to compile; shorten it"
    return " ".join(error.split())[:_MAX_QUOTED_CHARACTERS] if error else None


def _first_error(grammar: str) -> str:
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0)
    matcher.compute_bitmask()
    error = matcher.get_error()
    if "NoExtensionBias" in error:
        return "it matches no text"
    return "" if "unknown special token" in error else error


@lru_cache(maxsize=1)
def _byte_tokenizer() -> Any:
    return LLTokenizer("byte")
