"""openai-agents: an agent on OpenAIChatCompletionsModel."""

import json
from typing import Literal

import agents
import openai
from uses import KEY, MODEL, QUESTION, SAMPLING, URL, Move, report

agents.set_tracing_disabled(True)


@agents.function_tool
def look_up(operation: Literal["sum", "product"], number: Literal[7, 82]) -> str:
    """Look up a number."""
    return json.dumps({"operation": operation, "number": number})


def _agent(rtap, **more):
    client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    model = agents.OpenAIChatCompletionsModel(MODEL, openai_client=client)
    choice = {"tool_choice": "required"} if "tools" in more else {}
    settings = agents.ModelSettings(**SAMPLING, **choice, extra_body={"rtap": rtap})
    return agents.Agent(name="asker", model=model, model_settings=settings, **more)


def _calling(rtap):
    return _agent(rtap, tools=[look_up], tool_use_behavior="stop_on_first_tool")


def _called(result):
    (call,) = [item.raw_item for item in result.new_items if item.type == "tool_call_item"]
    assert json.loads(result.final_output) == json.loads(call.arguments)
    return {"name": call.name, "arguments": json.loads(call.arguments)}


async def basic(rtap):
    return {"text": (await agents.Runner.run(_agent(rtap), QUESTION)).final_output}


async def stream(rtap):
    result = agents.Runner.run_streamed(_agent(rtap), QUESTION)
    raw = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
    parts = [event.delta for event in raw if event.type == "response.output_text.delta"]
    assert "".join(parts) == result.final_output
    return {"text": result.final_output}


async def structured(rtap):
    return {"object": (await agents.Runner.run(_agent(rtap, output_type=Move), QUESTION)).final_output.model_dump()}


async def tool(rtap):
    return _called(await agents.Runner.run(_calling(rtap), QUESTION))


async def streamed_tool(rtap):
    result = agents.Runner.run_streamed(_calling(rtap), QUESTION)
    async for _ in result.stream_events():
        pass
    return _called(result)


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
