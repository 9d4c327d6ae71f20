"""openai: responses."""

import openai
from uses import DESCRIPTION, KEY, MODEL, QUESTION, SCHEMA, TOOL, URL, Move, report

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
FUNCTION = {"type": "function", "name": TOOL, "description": DESCRIPTION, "parameters": SCHEMA, "strict": True}
CALL = {"tools": [FUNCTION], "tool_choice": "required"}


def _asked(rtap):
    fixed = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 400}
    return fixed | {"extra_body": {"rtap": rtap}}


def _called(response):
    (call,) = [item for item in response.output if item.type == "function_call"]
    arguments = Move.model_validate_json(call.arguments).model_dump()
    return {"name": call.name, "arguments": arguments, "finish": response.status}


def basic(rtap):
    response = client.responses.create(**_asked(rtap))
    return {"text": response.output_text, "finish": response.status}


def stream(rtap):
    with client.responses.stream(**_asked(rtap)) as events:
        parts = [event.delta for event in events if event.type == "response.output_text.delta"]
        response = events.get_final_response()
    assert "".join(parts) == response.output_text
    return {"text": "".join(parts), "finish": response.status}


def structured(rtap):
    response = client.responses.parse(**_asked(rtap), text_format=Move)
    return {"object": response.output_parsed.model_dump(), "finish": response.status}


def tool(rtap):
    return _called(client.responses.parse(**_asked(rtap), **CALL))


def streamed_tool(rtap):
    with client.responses.stream(**_asked(rtap), **CALL) as events:
        seen = list(events)
        response = events.get_final_response()
    (done,) = [event for event in seen if event.type == "response.function_call_arguments.done"]
    deltas = [event.delta for event in seen if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == done.arguments, (deltas, done.arguments)
    return _called(response)


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
