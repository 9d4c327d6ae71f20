"""Calls of the litellm SDK to the server at argv[1], told as one JSON object.

test_litellm.py runs it in a process of its own: litellm leaves event loops and clients open, which pytest would report
in whichever test comes next.
"""

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing litellm downloads its price list

import litellm

EAGER = {"threshold": 1.0, "max_cycles": 3}  # no confidence reaches 1.0, so three cycles are written
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def _options(rtap: dict[str, Any] | None = EAGER, **options: Any) -> dict[str, Any]:
    fixed = {"model": "openai/rtap", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "seed": 1, "num_retries": 0}
    messages = [{"role": "user", "content": "make 82 from 3, 7, 25"}]
    return fixed | {"messages": messages, "extra_body": {"rtap": rtap}} | options


def _told(reply: Any) -> dict[str, Any]:
    """A whole reply."""
    choice = reply.choices[0]
    return {
        "content": choice.message.content,
        "reasoning": choice.message.reasoning_content,
        "finish": choice.finish_reason,
        "tokens": reply.usage.completion_tokens,
        "reasoning_tokens": reply.usage.completion_tokens_details.reasoning_tokens,
        "rtap": reply.rtap,
    }


def _joined(chunks: list[Any]) -> dict[str, Any]:
    """A stream. litellm drops the rtap object of chunks."""
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    return {
        "content": "".join(delta.content or "" for delta in deltas),
        "reasoning": "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
        "tokens": usage[-1].completion_tokens,
    }


def _error(**options: Any) -> dict[str, Any]:
    try:
        reply = litellm.completion(**_options(**options))
        return {"error": None, "message": str(list(reply) if options.get("stream") else reply)}
    except Exception as error:  # which one is what is told
        return {"error": type(error).__name__, "message": str(error)}


async def _async() -> tuple[dict[str, Any], dict[str, Any]]:
    whole = await litellm.acompletion(**_options())
    stream: Any = await litellm.acompletion(**_options(**STREAM))
    return _told(whole), _joined([chunk async for chunk in stream])


def main() -> None:
    """One JSON line."""
    wrong = {"treshold": 0.5}
    told: dict[str, Any] = {"whole": _told(litellm.completion(**_options()))}
    told["stream"] = _joined(list(litellm.completion(**_options(**STREAM))))
    told["async_whole"], told["async_stream"] = asyncio.run(_async())
    told["wrong_field"], told["wrong_field_stream"] = _error(rtap=wrong), _error(rtap=wrong, stream=True)
    told["unknown_model"] = _error(model="openai/nope")
    sys.stdout.write(json.dumps(told) + "\n")


main()
