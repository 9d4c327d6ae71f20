"""smolagents: OpenAIModel."""

import json
from typing import ClassVar

import smolagents
from smolagents.models import agglomerate_stream_deltas
from uses import DESCRIPTION, KEY, MODEL, QUESTION, SAMPLING, SCHEMA, TOOL, URL, Move, report


class LookUp(smolagents.Tool):
    name, description, output_type = TOOL, DESCRIPTION, "string"
    inputs: ClassVar = {
        "operation": {"type": "string", "description": "Operation.", "enum": ["sum", "product"]},
        "number": {"type": "integer", "description": "Number.", "enum": [7, 82]},
    }

    def forward(self, operation: str, number: int) -> str:
        return f"{operation} {number}"


CHAT = [smolagents.ChatMessage(role=smolagents.MessageRole.USER, content=[{"type": "text", "text": QUESTION}])]
FORMAT = {"type": "json_schema", "json_schema": {"name": "move", "schema": SCHEMA, "strict": True}}


def _model(rtap):
    settings = {"client_kwargs": {"max_retries": 0}, "extra_body": {"rtap": rtap}}
    return smolagents.OpenAIModel(MODEL, api_base=URL, api_key=KEY, **SAMPLING, **settings)


def _called(message):
    (call,) = message.tool_calls
    arguments = call.function.arguments
    return {"name": call.function.name, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def basic(rtap):
    return {"text": _model(rtap).generate(CHAT).content}


def stream(rtap):
    return {"text": agglomerate_stream_deltas(list(_model(rtap).generate_stream(CHAT))).content}


def structured(rtap):
    message = _model(rtap).generate(CHAT, response_format=FORMAT)
    return {"object": Move.model_validate_json(message.content).model_dump()}


def tool(rtap):
    return _called(_model(rtap).generate(CHAT, tools_to_call_from=[LookUp()]))


def streamed_tool(rtap):
    return _called(agglomerate_stream_deltas(list(_model(rtap).generate_stream(CHAT, tools_to_call_from=[LookUp()]))))


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
