"""The ``rtap`` objects of requests and responses: options and their OpenAPI schema, cycle and trajectory objects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from rtap_core.answers import extract_answer
from rtap_core.types import Continuation, Cycle, Policy, Select, Trajectory
from rtap_core.voting import candidates
from rtap_server.http.route_kinds import RECURSIVE_PATHS
from rtap_server.settings import Settings


@dataclass(frozen=True, slots=True)
class Effort:
    """Meaning of a ``reasoning_effort`` word, relative to the server's defaults.

    max_cycles_factor: multiplies the default ``max_cycles``; at least one cycle, at most the server's limit.
    threshold_raise: fraction of the distance from the default threshold to 1 that is added to it."""

    max_cycles_factor: float
    threshold_raise: float = 0.0


# OpenAI's words and vLLM's further ones. Fields of ``rtap`` win over the effort.
EFFORTS: Mapping[str, Effort] = {
    "none": Effort(0),
    "minimal": Effort(0),
    "low": Effort(0.25),
    "medium": Effort(1),
    "high": Effort(2, threshold_raise=0.5),
    "xhigh": Effort(4, threshold_raise=0.75),
    "max": Effort(4, threshold_raise=0.75),
}


class RtapOptions(BaseModel):
    """The ``rtap`` object of a request. Absent fields take the server's defaults; unknown fields are refused.

    docs/api.md shows the descriptions as a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Strict: "5" or true for a count is a client's mistake.
    policy: Policy | None = Field(
        default=None,
        description="who decides to stop: `confidence` (clears `threshold`), `model` (ends its own turn, as in the "
        "R-TAP paper), `single` (one pass), `vote` (samples in waves until one answer leads for certain)",
    )
    threshold: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        strict=True,
        description="confidence that is good enough; of a vote: posterior of the leading answer, 1 draws all `samples`",
    )
    max_cycles: int | None = Field(default=None, ge=1, strict=True, description="cycles at most")
    samples: int | None = Field(
        default=None, ge=1, strict=True, description="samples of a vote at most; each may use `max_tokens`"
    )
    select: Select | None = Field(default=None, description="return the `best` or the `last` complete answer")
    recursion: Continuation | None = Field(
        default=None,
        description="a further cycle under `confidence`: `continue` the trajectory with the earlier cycles in view, or "
        "make a `fresh` attempt on the question alone",
    )
    patience: int | None = Field(
        default=None, ge=1, strict=True, description="stop after this many cycles without a new highest confidence"
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0, strict=True, description="answer with the best so far after this long"
    )
    return_cycles: bool = Field(default=False, description="put each cycle's thinking and whole answer into the reply")
    drafts: bool = Field(
        default=False,
        description="stream answers while they are written, before they are judged "
        "([below](#drafts); chat streams only)",
    )


def cycle_object(cycle: Cycle, *, with_think: bool) -> dict[str, Any]:
    """One entry of ``rtap.cycles``. Seconds are rounded to microseconds."""
    answer = None if cycle.answer is None else extract_answer(cycle.answer)
    shown: dict[str, Any] = {"index": cycle.index, "answer": answer}
    if with_think:
        shown |= {"think": cycle.think, "text": cycle.answer}
    return shown | {
        "confidence": cycle.confidence,
        "accepted": cycle.accepted,
        "tokens": cycle.tokens,
        "oops_tokens": cycle.oops_tokens,
        "prompt_tokens": cycle.prompt_tokens,
        "cached_tokens": cycle.cached_tokens,
        "seconds": round(cycle.seconds, 6),
        "confidence_seconds": None if cycle.confidence_seconds is None else round(cycle.confidence_seconds, 6),
        **({} if cycle.logprobs is None else {"logprobs": cycle.logprobs.shown()}),
    }


def trajectory_object(trajectory: Trajectory, *, with_think: bool) -> dict[str, Any]:
    """The ``rtap`` object of a response."""
    first = trajectory.first_answer_seconds
    shown: dict[str, Any] = {
        "policy": trajectory.policy,
        "stop_reason": trajectory.stop_reason,
        "cycles": [cycle_object(c, with_think=with_think) for c in trajectory.cycles],
        "confidence": trajectory.confidence,
        "first_answer_seconds": None if first is None else round(first, 6),
        "confidence_tokens": trajectory.confidence_tokens,
        "discarded_tokens": trajectory.discarded_tokens,
    }
    if trajectory.policy is Policy.VOTE:
        shown["candidates"] = [
            {"answer": shown["cycles"][one.first]["answer"], "votes": one.votes, "posterior": one.posterior}
            for one in candidates(trajectory.cycles)
        ]
    if trajectory.degraded is not None:
        shown["degraded"] = trajectory.degraded
    return shown


_REFERENCES = "#/components/schemas/"
_CEILINGS = {
    "max_cycles": "max_cycles_limit",
    "samples": "samples_limit",
    "deadline_seconds": "deadline_seconds_limit",
}


def describe_rtap(app: FastAPI, settings: Settings) -> None:
    """Make ``app.openapi`` describe ``rtap`` on the recursive routes."""
    describe_vllm = app.openapi  # FastAPI caches its document, so the field is added once

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_options(describe_vllm(), settings)
        return describe_vllm()

    app.openapi = describe


def _add_options(document: dict[str, Any], settings: Settings) -> None:
    options = RtapOptions.model_json_schema(ref_template=_REFERENCES + "{model}")
    for name, ceiling in _CEILINGS.items():
        number = next(one for one in options["properties"][name]["anyOf"] if one["type"] != "null")
        number["maximum"] = getattr(settings, ceiling)
    schemas: dict[str, Any] = document["components"]["schemas"]
    schemas |= options.pop("$defs") | {"RtapOptions": options}
    for path in RECURSIVE_PATHS & document["paths"].keys():
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schemas[body["$ref"].removeprefix(_REFERENCES)]["properties"]["rtap"] = {"$ref": _REFERENCES + "RtapOptions"}
