"""litellm: the SDK's completion, as its proxy calls it."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing litellm downloads its price list

import litellm
from uses import FUNCTION, KEY, MESSAGES, SAMPLING, URL, Move, report

CALL = {"tools": [FUNCTION], "tool_choice": "required"}


def _asked(rtap):
    where = {"model": "openai/rtap", "api_base": URL, "api_key": KEY, "num_retries": 0, "max_retries": 0}
    return where | {"messages": MESSAGES, "extra_body": {"rtap": rtap}, **SAMPLING}


def _called(choice):
    (call,) = choice.message.tool_calls
    arguments = Move.model_validate_json(call.function.arguments).model_dump()
    return {"name": call.function.name, "arguments": arguments, "finish": choice.finish_reason}


def _streamed(rtap, **more):
    return litellm.stream_chunk_builder(list(litellm.completion(**_asked(rtap), stream=True, **more)))


def _shown(reply):
    choice = reply.choices[0]
    return {
        "text": choice.message.content,
        "finish": choice.finish_reason,
        "reasoning": choice.message.reasoning_content,
        "tokens": reply.usage.completion_tokens,
    }


def basic(rtap):
    reply = litellm.completion(**_asked(rtap))
    return _shown(reply) | {"rtap": reply.rtap}


def stream(rtap):
    return _shown(_streamed(rtap, stream_options={"include_usage": True}))


async def structured(rtap):
    choice = (await litellm.acompletion(**_asked(rtap), response_format=Move)).choices[0]
    return {"object": Move.model_validate_json(choice.message.content).model_dump(), "finish": choice.finish_reason}


def tool(rtap):
    return _called(litellm.completion(**_asked(rtap), **CALL).choices[0])


def streamed_tool(rtap):
    return _called(_streamed(rtap, **CALL).choices[0])


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
