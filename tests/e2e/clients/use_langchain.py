"""langchain-openai: ChatOpenAI."""

from typing import Literal

from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI
from uses import KEY, MODEL, QUESTION, SAMPLING, URL, Move, report


@langchain_tool
def look_up(operation: Literal["sum", "product"], number: Literal[7, 82]) -> str:
    """Look up a number."""
    return f"{operation} {number}"


def _model(rtap):
    where = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_retries": 0}
    return ChatOpenAI(**where, **SAMPLING, extra_body={"rtap": rtap})


def _text(message):
    return {
        "text": message.content,
        "finish": message.response_metadata["finish_reason"],
        "tokens": message.usage_metadata["output_tokens"],
    }


def _called(message):
    (call,) = message.tool_calls
    finish = message.response_metadata["finish_reason"]
    return {"name": call["name"], "arguments": call["args"], "finish": finish}


def _sum(chunks):
    first, *others = chunks
    for chunk in others:
        first += chunk
    return first


def basic(rtap):
    return _text(_model(rtap).invoke(QUESTION))


def stream(rtap):
    return _text(_sum(_model(rtap).stream(QUESTION, stream_usage=True)))


def structured(rtap):
    return {"object": _model(rtap).with_structured_output(Move).invoke(QUESTION).model_dump()}


def tool(rtap):
    return _called(_model(rtap).bind_tools([look_up], tool_choice="required").invoke(QUESTION))


def streamed_tool(rtap):
    return _called(_sum(_model(rtap).bind_tools([look_up], tool_choice="required").stream(QUESTION)))


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
