"""instructor: the openai client with response models; a response model in mode TOOLS is a tool call."""

import instructor
import openai
from uses import KEY, MESSAGES, MODEL, SAMPLING, URL, WRONG, Move, report

plain = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
tools = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
schemas = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)


def _asked(rtap):
    return {"model": MODEL, "messages": MESSAGES, "extra_body": {"rtap": rtap}, "max_retries": 1, **SAMPLING}


def basic(rtap):
    if rtap == WRONG:  # with a response model instructor wraps errors; without one the error is openai's
        return structured(rtap)
    choice = tools.chat.completions.create(**_asked(rtap), response_model=None).choices[0]
    return {"text": choice.message.content, "finish": choice.finish_reason}


def stream(rtap):
    *_, last = schemas.chat.completions.create_partial(**_asked(rtap), response_model=Move)
    return {"object": last.model_dump()}


def structured(rtap):
    return {"object": schemas.chat.completions.create(**_asked(rtap), response_model=Move).model_dump()}


def tool(rtap):
    return {"arguments": tools.chat.completions.create(**_asked(rtap), response_model=Move).model_dump()}


def streamed_tool(rtap):
    *_, last = tools.chat.completions.create_partial(**_asked(rtap), response_model=Move)
    return {"arguments": last.model_dump()}


report(basic=basic, stream=stream, structured=structured, tool=tool, streamed_tool=streamed_tool)
