"""Worker process for math-verify and reasoning-gym: one JSON request and one JSON reply per line. Run as a script.

It imports nothing of this project, so that it starts fast. It exits when stdin closes; an alarm ends a comparison that
runs too long.
"""

import json
import math
import os
import resource
import signal
import sys
from functools import cache
from typing import Any, cast

import math_verify  # pyright: ignore  # the package has no types

MEMORY_BYTES = 4 * 2**30
# Datasets whose verifiers evaluate an answer as Python to give part of the score.
EVALUATING = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")


def read(text: str) -> list[Any]:
    """Parse the whole answer as LaTeX; from plain text math-verify would take the last number."""
    text = text.replace("\\$", "").replace("$", "")
    return cast(Any, math_verify).parse(f"${text}$", parsing_timeout=None, raise_on_error=True)


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Compare answer and reference; report which of them could be parsed."""
    signal.alarm(math.ceil(request["seconds"]) + 1)  # the default action ends the process
    try:
        answer, reference = read(request["answer"]), read(request["reference"])
        equal = math_verify.verify(reference, answer, timeout_seconds=None, raise_on_error=True)
        return {"equal": bool(equal), "answer": bool(answer), "reference": bool(reference), "error": ""}
    except Exception as error:  # parsers of hostile text may raise anything
        return {"equal": False, "answer": False, "reference": False, "error": f"{type(error).__name__}: {error}"[:200]}
    finally:
        signal.alarm(0)


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Score of an answer by its reasoning-gym dataset; without an answer, 0 once the dataset is ready."""
    name, options = request["dataset"], request["options"]
    signal.alarm(math.ceil(request["seconds"]) + 1)
    try:
        dataset = _dataset(name, json.dumps(options))
        if "answer" not in request:
            return {"score": 0.0, "error": ""}
        return {"score": float(dataset.score_answer(request["answer"], dataset[request["index"]])), "error": ""}
    except Exception as error:  # a verifier may raise anything on hostile text
        return {"score": 0.0, "error": f"{type(error).__name__}: {error}"[:200]}
    finally:
        signal.alarm(0)


@cache
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym  # pyright: ignore  # optional, and needed for its own questions only

    dataset = reasoning_gym.create_dataset(name, **json.loads(options))
    if name in EVALUATING:
        cast(Any, sys.modules[type(dataset).__module__]).eval = _refuse
    return dataset


def _refuse(_: str) -> None:
    raise ValueError("answers are not evaluated")


def main() -> None:
    """Serve until stdin closes. Replies go to the real stdout; prints of libraries go to stderr."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = score(request) if "dataset" in request else compare(request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
