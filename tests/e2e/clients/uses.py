"""Shared part of the scripts ``use_LIBRARY.py SERVER_URL``: question, schema, tool, and the report on stdout."""

import asyncio
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

SERVER = sys.argv[1]
URL, MODEL, KEY = f"{SERVER}/v1", "rtap", "none"
QUESTION = "make 82 from 3, 7, 25"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 400}
# No confidence reaches 1.0, so two cycles are written and every answer is held until it is scored.
POLICIES = {
    "single": {"policy": "single"},
    "confidence": {"policy": "confidence", "threshold": 1.0, "max_cycles": 2, "drafts": True},
}
WRONG = {"treshold": 0.5}
TOOL, DESCRIPTION = "look_up", "Look up a number."


class Move(BaseModel):
    """Look up a number."""

    operation: Literal["sum", "product"]
    number: Literal[7, 82]


# The schema and the tool as libraries without pydantic support take them.
SCHEMA = Move.model_json_schema() | {"additionalProperties": False}
FUNCTION = {
    "type": "function",
    "function": {"name": TOOL, "description": DESCRIPTION, "parameters": SCHEMA},
}


def report(**uses: Callable[[Any], Any]) -> None:
    """Run every use under every policy, and two with a wrong field; print one JSON line."""
    rows = [(policy, name, use, rtap) for policy, rtap in POLICIES.items() for name, use in uses.items()]
    results: dict[str, dict[str, Any]] = {policy: {} for policy in (*POLICIES, "wrong")}
    rows += [("wrong", name, uses[name], WRONG) for name in ("basic", "stream")]
    for policy, name, use, rtap in rows:
        began = time.monotonic()
        try:
            result = use(rtap)
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
        except Exception as error:  # the test compares it
            result = {
                "error": [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__],
                "message": str(error)[:2000],
            }
            result["traceback"] = traceback.format_exc()[-3000:]
        results[policy][name] = result | {"seconds": round(time.monotonic() - began, 2)}
    sys.stdout.write(json.dumps(results) + "\n")


async def _awaited(result: Any) -> Any:
    return await result
