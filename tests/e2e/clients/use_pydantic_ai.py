"""pydantic-ai: an agent on OpenAIChatModel."""

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from uses import KEY, MODEL, QUESTION, SAMPLING, TOOL, URL, Move, report


def _agent(rtap, output_type=str):
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
    return Agent(model, output_type=output_type, retries=0, model_settings={**SAMPLING, "extra_body": {"rtap": rtap}})


def _called(result):
    (call,) = [part for part in result.all_messages()[1].parts if part.part_kind == "tool-call"]
    return {"name": call.tool_name, "arguments": call.args_as_dict()}


async def basic(rtap):
    return {"text": (await _agent(rtap).run(QUESTION)).output}


async def stream(rtap):
    async with _agent(rtap).run_stream(QUESTION) as result:
        return {"text": "".join([part async for part in result.stream_text(delta=True, debounce_by=None)])}


async def structured(rtap):
    return {"object": (await _agent(rtap, NativeOutput(Move)).run(QUESTION)).output.model_dump()}


async def tool(rtap):
    return _called(await _agent(rtap, ToolOutput(Move, name=TOOL)).run(QUESTION))


async def streamed_tool(rtap):
    async with _agent(rtap, ToolOutput(Move, name=TOOL)).run_stream(QUESTION) as result:
        outputs = [output async for output in result.stream_output(debounce_by=None)]
        assert _called(result)["arguments"] == outputs[-1].model_dump()
        return _called(result)


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
