"""llama-index-llms-openai-like: OpenAILike."""

from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from uses import DESCRIPTION, KEY, MODEL, QUESTION, SAMPLING, TOOL, URL, Move, report


def look_up(operation: Literal["sum", "product"], number: Literal[7, 82]) -> str:
    return f"{operation} {number}"


TOOLS = [FunctionTool.from_defaults(look_up, name=TOOL, description=DESCRIPTION)]
CHAT = [ChatMessage(role="user", content=QUESTION)]


def _model(rtap):
    return OpenAILike(
        model=MODEL, api_base=URL, api_key=KEY, max_retries=0, context_window=1024, is_chat_model=True,
        is_function_calling_model=True, additional_kwargs={"extra_body": {"rtap": rtap}}, **SAMPLING,
    )  # fmt: skip


def _called(model, response):
    (call,) = model.get_tool_calls_from_response(response)
    return {"name": call.tool_name, "arguments": call.tool_kwargs}


def basic(rtap):
    return {"text": _model(rtap).chat(CHAT).message.content}


def stream(rtap):
    responses = list(_model(rtap).stream_chat(CHAT))
    assert "".join(response.delta or "" for response in responses) == responses[-1].message.content
    return {"text": responses[-1].message.content}


def structured(rtap):
    return {"object": _model(rtap).as_structured_llm(Move).chat(CHAT).raw.model_dump()}


def tool(rtap):
    model = _model(rtap)
    return _called(model, model.chat_with_tools(TOOLS, user_msg=QUESTION, tool_required=True))


def streamed_tool(rtap):
    model = _model(rtap)
    return _called(model, list(model.stream_chat_with_tools(TOOLS, user_msg=QUESTION, tool_required=True))[-1])


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
