"""anthropic: messages."""

import anthropic
from uses import DESCRIPTION, KEY, MESSAGES, MODEL, SAMPLING, SCHEMA, SERVER, TOOL, Move, report

client = anthropic.Anthropic(base_url=SERVER, api_key=KEY, max_retries=0)
CALL = {
    "tools": [{"name": TOOL, "description": DESCRIPTION, "input_schema": SCHEMA}],
    "tool_choice": {"type": "any"},
}


def _asked(rtap):
    # The SDK has dropped the argument `temperature`; the server reads it from the body.
    body = {"rtap": rtap, "temperature": SAMPLING["temperature"]}
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": SAMPLING["max_tokens"], "extra_body": body}


def _text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def _called(message):
    (call,) = [block for block in message.content if block.type == "tool_use"]
    return {"name": call.name, "arguments": call.input, "finish": message.stop_reason}


def basic(rtap):
    message = client.messages.create(**_asked(rtap))
    return {"text": _text(message), "finish": message.stop_reason}


def stream(rtap):
    with client.messages.stream(**_asked(rtap)) as events:
        parts = list(events.text_stream)
        message = events.get_final_message()
    assert "".join(parts) == _text(message)
    return {"text": "".join(parts), "finish": message.stop_reason}


def structured(rtap):
    message = client.messages.parse(**_asked(rtap), output_format=Move)
    return {"object": message.parsed_output.model_dump(), "finish": message.stop_reason}


def tool(rtap):
    return _called(client.messages.create(**_asked(rtap), **CALL))


def streamed_tool(rtap):
    with client.messages.stream(**_asked(rtap), **CALL) as events:
        return _called(events.get_final_message())


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
