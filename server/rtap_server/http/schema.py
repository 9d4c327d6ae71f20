"""The ``rtap`` fields on the wire: request options in, trajectory and cycle objects out, and what one exchange keeps.

Pure data: reading bodies and rewriting streams is ``middleware.py``'s job.
"""

from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rtap_core.artifact import Artifact
from rtap_core.errors import InvalidRequest
from rtap_core.types import Cycle, Limits, Policy, Select, Trajectory
from rtap_server.settings import Settings

XARGS_PREFIX = "rtap_"
# Separates reasoning from content in the text that RecursiveEngine hands to vLLM's chat layers. The engine removes it
# from model text, so only the engine can write it.
ANSWER_MARK = "\x1e"
REASONING_PARSER = "rtap"  # its name among vLLM's reasoning parsers
# Clients disagree on the name: vLLM's, and that of DeepSeek and many readers. Replies have both.
REASONING, REASONING_CONTENT = "reasoning", "reasoning_content"


@dataclass(frozen=True, slots=True)
class Effort:
    """What a word of ``reasoning_effort`` means here, relative to the server's own defaults.

    cycles: factor of its max_cycles, at least one cycle and at most its limit. doubt: share of the way from its
    threshold to 1 that a confidence must go further."""

    cycles: float
    doubt: float = 0.0


# OpenAI's words and vLLM's further ones. Fields of ``rtap`` that a request gives win over its effort.
EFFORTS: Mapping[str, Effort] = {
    "none": Effort(0),
    "minimal": Effort(0),
    "low": Effort(0.25),
    "medium": Effort(1),
    "high": Effort(2, doubt=0.5),
    "xhigh": Effort(4, doubt=0.75),
    "max": Effort(4, doubt=0.75),
}


class RtapOptions(BaseModel):
    """The ``rtap`` request object. Absent fields take the server's defaults; unknown ones are refused.

    The descriptions are the table in docs/api.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Numbers are strict: "5" or true for a count is a client's mistake, not a number.
    policy: Policy | None = Field(
        default=None,
        description="who decides to stop: `confidence` (clears `threshold`), `model` (ends its own turn, as in the "
        "R-TAP paper), `single` (one pass), `vote` (majority of `samples`, weighted by confidence)",
    )
    threshold: float | None = Field(
        default=None, ge=0.0, le=1.0, strict=True, description="confidence that is good enough"
    )
    max_cycles: int | None = Field(default=None, ge=1, strict=True, description="cycles at most")
    samples: int | None = Field(
        default=None, ge=1, strict=True, description="samples of a vote; each may use `max_tokens`"
    )
    select: Select | None = Field(default=None, description="return the `best` or the `last` complete answer")
    patience: int | None = Field(
        default=None, ge=1, strict=True, description="stop after this many cycles without a new highest confidence"
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0, strict=True, description="answer with the best so far after this long"
    )
    probe_every: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="ask for the answer inside a thought every so many tokens ([below](#inside-a-thought))",
    )
    return_cycles: bool = Field(default=False, description="put each cycle's thinking into the reply")


def parse_options(raw: Any, settings: Settings, *, where: str = "rtap") -> RtapOptions:
    """Check one request's options against their types and the server's ceilings.

    Raises InvalidRequest that names the field."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where} must be an object such as {{'threshold': 0.8}}", param=where)
    try:
        options = RtapOptions.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        name = _shortened(".".join(str(part) for part in first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(RtapOptions.model_fields)
            raise InvalidRequest(f"unknown field {where}.{name}; known: {known}", param=f"{where}.{name}") from error
        given = _shortened(repr(first["input"]))
        raise InvalidRequest(f"{where}.{name}={given}: {first['msg']}", param=f"{where}.{name}") from error
    for name in ("max_cycles", "samples", "deadline_seconds"):
        value, limit = getattr(options, name), getattr(settings, f"{name}_limit")
        if value is not None and value > limit:
            raise InvalidRequest(
                f"{where}.{name}={value} is above this server's limit of {limit}", param=f"{where}.{name}"
            )
    return options


def _shortened(text: str) -> str:
    """What an error may repeat of a request."""
    return text if len(text) <= 100 else f"{text[:100]}…"


def effort_of(request: Mapping[str, Any]) -> str | None:
    """The reasoning effort of a request to any of the four endpoints; wrong types are vLLM's to refuse."""

    def inside(name: str) -> Mapping[str, Any]:
        value = request.get(name)
        return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}

    is_disabled = inside("thinking").get("type") == "disabled"  # /v1/messages
    given = (
        request.get("reasoning_effort") or inside("reasoning").get("effort") or inside("output_config").get("effort")
    )
    return "none" if is_disabled else given if isinstance(given, str) else None


def prefix_of(path: str, request: Mapping[str, Any]) -> str:
    """Text of the assistant's that a request wants continued, where vLLM will continue it; empty for all others. Wrong
    types are vLLM's to refuse."""
    items: Any = request.get({"/v1/chat/completions": "messages", "/v1/responses": "input"}.get(path, ""))
    if not isinstance(items, list) or not items or not isinstance(items[-1], dict):
        return ""
    last = cast(dict[str, Any], items[-1])
    if path == "/v1/responses":
        is_continued = last.get("status") in ("in_progress", "incomplete") and last.get("type", "message") == "message"
    else:
        try:
            is_continued = _LAX_BOOL.validate_python(request.get("continue_final_message") or False)
        except ValidationError:
            is_continued = False
    content: Any = last.get("content") if is_continued else None
    if isinstance(content, list):
        parts = [cast(dict[str, Any], part) for part in cast(list[Any], content) if isinstance(part, dict)]
        texts: list[Any] = [part.get("text") for part in parts]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def options_of(request: Mapping[str, Any], settings: Settings) -> RtapOptions | None:
    """The options of a request, its ``rtap`` field or ``vllm_xargs`` entries named ``rtap_<field>``; None where it has
    neither. Nothing else reads them.

    Raises InvalidRequest for wrong ones, and for both at once."""
    xargs: Any = request.get("vllm_xargs")
    entries = cast(dict[str, Any], xargs) if isinstance(xargs, dict) else {}
    by_xargs = {k.removeprefix(XARGS_PREFIX): v for k, v in entries.items() if k.startswith(XARGS_PREFIX)}
    if by_xargs and "rtap" in request:
        raise InvalidRequest("give the rtap options once: as 'rtap' or as 'vllm_xargs'", param="rtap")
    if by_xargs:
        return parse_options(by_xargs, settings, where="vllm_xargs.rtap_*")
    return parse_options(request["rtap"], settings) if "rtap" in request else None


def lax_int(value: Any) -> int | None:
    """A number as vLLM takes one; None for what it will refuse itself."""
    if value is None or type(value) is int:  # all of them, but for a client's mistake
        return value
    try:
        return _LAX_INT.validate_python(value)
    except ValidationError:
        return None


def tokens_of(
    request: Mapping[str, Any], options: RtapOptions | None, settings: Settings, *, max_model_len: int
) -> int:
    """How many tokens a request to any of the four endpoints may write: its max_tokens (else the model's length, in
    tokens) for each sample of each choice of each prompt. Wrong types are vLLM's to refuse."""

    def count(name: str) -> int | None:
        value = lax_int(request.get(name))
        return None if value is None else max(1, value)

    names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    given = next((tokens for name in names if (tokens := count(name)) is not None), max_model_len)
    options = options or RtapOptions()
    is_vote = (options.policy or settings.policy) is Policy.VOTE
    samples = (options.samples or settings.samples) if is_vote else 1
    prompt: Any = request.get("prompt")
    items = cast(list[Any], prompt) if isinstance(prompt, list) else []
    prompts = 1 if items and isinstance(items[0], int) else max(1, len(items))  # of token ids, one prompt
    return min(given, max_model_len) * (count("n") or 1) * samples * prompts


def resolve_limits(
    options: RtapOptions,
    settings: Settings,
    generator: Artifact,
    *,
    has_confidence: bool,
    max_tokens: int | None,
    effort: str | None = None,
) -> Limits:
    """One request's limits: its own values, else its effort's, else the server's, else what the generator was trained
    for. An effort that is no word of ours is vLLM's to refuse.

    Raises InvalidRequest where the policy needs a generator that is not loaded."""
    default_policy = settings.policy or (Policy.CONFIDENCE if has_confidence else Policy.MODEL)
    policy = options.policy or default_policy
    if policy is Policy.CONFIDENCE and not has_confidence:
        raise InvalidRequest(
            "policy 'confidence' needs a confidence generator, and this server has none; "
            "use policy 'model' or start it with --confidence-model",
            param="rtap.policy",
        )
    default_select = Select.BEST if policy is Policy.CONFIDENCE else Select.LAST
    asked = EFFORTS.get(effort or "", EFFORTS["medium"])
    threshold = next(v for v in (settings.threshold, generator.threshold, 0.5) if v is not None)
    cycles = min(max(1, round(settings.max_cycles * asked.cycles)), settings.max_cycles_limit)
    return Limits(
        policy=policy,
        threshold=threshold + asked.doubt * (1 - threshold) if options.threshold is None else options.threshold,
        max_cycles=options.max_cycles or cycles,
        samples=options.samples or settings.samples,
        select=options.select or settings.select or default_select,
        patience=options.patience or settings.patience,
        deadline_seconds=options.deadline_seconds or settings.deadline_seconds or settings.deadline_seconds_limit,
        max_tokens=max_tokens,
        probe_every=options.probe_every or settings.probe_every,
    )


def cycle_object(cycle: Cycle, *, with_think: bool) -> dict[str, Any]:
    """One entry of ``rtap.cycles``. Seconds are rounded to microseconds."""
    shown: dict[str, Any] = {"index": cycle.index, "answer": cycle.answer}
    if with_think:
        shown["think"] = cycle.think
    return shown | {
        "confidence": cycle.confidence,
        "accepted": cycle.accepted,
        "tokens": cycle.tokens,
        "oops_tokens": cycle.oops_tokens,
        "prompt_tokens": cycle.prompt_tokens,
        "cached_tokens": cycle.cached_tokens,
        "seconds": round(cycle.seconds, 6),
        "confidence_seconds": None if cycle.confidence_seconds is None else round(cycle.confidence_seconds, 6),
    }


def trajectory_object(trajectory: Trajectory, *, with_think: bool) -> dict[str, Any]:
    """The ``rtap`` response object."""
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
    if trajectory.num_probes:
        shown["probes"] = {"asked": trajectory.num_probes, "thoughts_ended": trajectory.num_stopped}
    if trajectory.degraded is not None:
        shown["degraded"] = trajectory.degraded
    return shown


def reasoning_tokens(trajectory: Trajectory) -> int:
    """All tokens written except the returned answer's."""
    written = sum(c.tokens for c in trajectory.cycles)
    return written - (0 if trajectory.selected is None else trajectory.cycles[trajectory.selected].answer_tokens)


@dataclass(slots=True)
class Exchange:
    """What one HTTP exchange shares between the middleware that frames it and the engine that answers it.

    effort: the request's reasoning effort, in the words of its endpoint. prefix: the last message, where the model goes
    on with it instead of writing one of its own. model: the name that was sent; vLLM refuses wrong ones.
    pending: cycle events not yet written to the stream, with their choice index. trajectories: finished ones by choice.
    """

    options: RtapOptions | None
    effort: str | None = None
    prefix: str = ""
    model: str = ""
    pending: deque[tuple[int, Cycle]] = field(default_factory=deque[tuple[int, Cycle]])
    trajectories: dict[int, Trajectory] = field(default_factory=dict[int, Trajectory])
    num_choices: int = 0

    def reserve(self, num_choices: int) -> int:
        """Index of the first of ``num_choices`` new choices; prompts of a batch arrive in order."""
        first = self.num_choices
        self.num_choices += num_choices
        return first


_LAX_BOOL = TypeAdapter(bool)  # what vLLM takes for one
_LAX_INT = TypeAdapter(int)
_current: ContextVar[Exchange | None] = ContextVar("rtap_exchange", default=None)


def begin_exchange(exchange: Exchange | None) -> None:
    """Make ``exchange`` the one of the running task and all it starts; None: it has none."""
    _current.set(exchange)


def current_exchange() -> Exchange | None:
    """The exchange of the running task; None on routes that never recurse."""
    return _current.get()
