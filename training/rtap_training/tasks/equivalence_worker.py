"""The process in which math-verify runs: one JSON request a line, one JSON reply a line. Started as a script.

Imports nothing of this project, so that it starts fast. It ends with its parent, which closes stdin; a comparison that
outlives both is ended by the alarm.
"""

import json
import math
import os
import resource
import signal
import sys
from typing import Any, cast

import math_verify  # pyright: ignore  # the package has no types

MEMORY_BYTES = 4 * 2**30


def read(text: str) -> list[Any]:
    """Read a whole answer as LaTeX: on plain text math-verify would take the last number it sees."""
    text = text.replace("\\$", "").replace("$", "")
    return cast(Any, math_verify).parse(f"${text}$", parsing_timeout=None, raise_on_error=True)


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Whether the answer equals the reference, and which of the two could be read."""
    signal.alarm(math.ceil(request["seconds"]) + 1)  # its default action ends the process
    try:
        answer, reference = read(request["answer"]), read(request["reference"])
        equal = cast(Any, math_verify).verify(reference, answer, timeout_seconds=None, raise_on_error=True)
        return {"equal": bool(equal), "answer": bool(answer), "reference": bool(reference), "error": ""}
    except Exception as error:  # whatever a parser of hostile text may raise
        return {"equal": False, "answer": False, "reference": False, "error": f"{type(error).__name__}: {error}"[:200]}
    finally:
        signal.alarm(0)


def main() -> None:
    """Serve until stdin ends. Only replies go to the real stdout; libraries may print to the other."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(compare(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
