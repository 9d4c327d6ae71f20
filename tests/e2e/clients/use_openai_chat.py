"""openai: chat completions."""

import openai
from uses import KEY, MESSAGES, MODEL, SAMPLING, TOOL, URL, Move, report

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
CALL = {"tools": [openai.pydantic_function_tool(Move, name=TOOL)], "tool_choice": "required"}


def _asked(rtap):
    return {"model": MODEL, "messages": MESSAGES, "extra_body": {"rtap": rtap}, **SAMPLING}


def _called(choice):
    (call,) = choice.message.tool_calls
    arguments = call.function.parsed_arguments.model_dump()
    return {"name": call.function.name, "arguments": arguments, "finish": choice.finish_reason}


def basic(rtap):
    choice = client.chat.completions.create(**_asked(rtap)).choices[0]
    return {"text": choice.message.content, "finish": choice.finish_reason}


def stream(rtap):
    with client.chat.completions.stream(**_asked(rtap)) as events:
        parts = [event.delta for event in events if event.type == "content.delta"]
        choice = events.get_final_completion().choices[0]
    assert "".join(parts) == choice.message.content
    return {"text": "".join(parts), "finish": choice.finish_reason}


def structured(rtap):
    choice = client.chat.completions.parse(**_asked(rtap), response_format=Move).choices[0]
    return {"object": choice.message.parsed.model_dump(), "finish": choice.finish_reason}


def tool(rtap):
    return _called(client.chat.completions.parse(**_asked(rtap), **CALL).choices[0])


def streamed_tool(rtap):
    with client.chat.completions.stream(**_asked(rtap), **CALL) as events:
        seen = list(events)
        choice = events.get_final_completion().choices[0]
    (done,) = [event for event in seen if event.type == "tool_calls.function.arguments.done"]
    deltas = [e.arguments_delta for e in seen if e.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == done.arguments == choice.message.tool_calls[0].function.arguments
    return _called(choice)


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
