"""dspy: LM on its litellm engine, and Predict with JSONAdapter."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing litellm downloads its price list

from typing import Literal

import dspy
import litellm
from uses import KEY, QUESTION, SAMPLING, URL, report

# dspy sends tools and schemas only to models that its engine knows; litellm's table can be extended.
ABILITIES = {"supports_function_calling": True, "supports_response_schema": True}
litellm.register_model({"openai/rtap": {"litellm_provider": "openai", "mode": "chat", **ABILITIES}})


class Ask(dspy.Signature):
    question: str = dspy.InputField()
    operation: Literal["sum", "product"] = dspy.OutputField()
    number: Literal[7, 82] = dspy.OutputField()


class Call(dspy.Signature):
    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


def look_up(operation: Literal["sum", "product"], number: Literal[7, 82]) -> str:
    """Look up a number."""
    return f"{operation} {number}"


class JSONAdapter(dspy.JSONAdapter):
    """One whose prompt is the question: dspy's own is longer than the context of the bundled model.

    dspy finds the stream parser of an adapter by the name of its class."""

    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": inputs["question"]}]


def _settings(rtap, **more):
    where = {"api_base": URL, "api_key": KEY, "num_retries": 0, "cache": False, "engine": "litellm"}
    lm = dspy.LM("openai/rtap", **where, **SAMPLING, extra_body={"rtap": rtap}, **more)
    return dspy.context(lm=lm, adapter=JSONAdapter())


async def _streamed(signature, listeners=None, **inputs):
    """The pieces of a streamed program, and its prediction."""
    program = dspy.streamify(dspy.Predict(signature), stream_listeners=listeners)
    *pieces, prediction = [piece async for piece in program(question=QUESTION, **inputs)]
    return pieces, prediction


def _called(prediction):
    (call,) = prediction.outputs.tool_calls
    return {"name": call.name, "arguments": call.args}


def basic(rtap):
    with _settings(rtap):
        (output,) = dspy.settings.lm(QUESTION)
    return {"text": output["text"]}


async def stream(rtap):
    with _settings(rtap):
        pieces, prediction = await _streamed(Ask, [dspy.streaming.StreamListener("operation")])
    # Not equal: dspy's listener leaves JSON's punctuation, and the field after it, around a value.
    assert f'"{prediction.operation}"' in "".join(piece.chunk for piece in pieces), pieces
    return {"object": dict(prediction)}


def structured(rtap):
    with _settings(rtap):
        return {"object": dict(dspy.Predict(Ask)(question=QUESTION))}


def tool(rtap):
    with _settings(rtap, tool_choice="required"):
        return _called(dspy.Predict(Call)(question=QUESTION, tools=[dspy.Tool(look_up)]))


async def streamed_tool(rtap):
    with _settings(rtap, tool_choice="required"):
        return _called((await _streamed(Call, tools=[dspy.Tool(look_up)]))[1])


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
