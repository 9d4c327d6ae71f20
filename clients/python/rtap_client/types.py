"""What travels: the ``rtap`` request options, the trajectory in a reply, and the server's own routes. Data only.

Replies are read as the openai SDK reads its own: without validation, unknown fields kept, so that a newer server does
not break an older client. Fields that are objects are Optional[X], not X | None, which older versions of the SDK cannot
take apart (no weak reference to a types.UnionType).
"""

# ruff: noqa: UP007, UP045

from typing import Any, Literal, Optional, TypedDict, Union, cast

from openai import BaseModel
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

Policy = Literal["confidence", "model", "single", "vote"]
"""Who decides to stop: the confidence generator, the model itself, one pass, a majority of samples."""
Select = Literal["best", "last"]
"""Which complete answer is returned: the one with the highest confidence or the last."""
StopReason = Literal["threshold", "model", "max_cycles", "max_tokens", "deadline", "no_gain", "vote", "drained"]
"""Why no further cycle was written."""


class RtapOptions(TypedDict, total=False):
    """The ``rtap`` object of a request. What is left out, or None, takes the server's default.

    The server checks values and caps them; a wrong one is an ``openai.BadRequestError`` that names the field.
    """

    policy: Policy | None
    """Who decides to stop."""
    threshold: float | None
    """Confidence in 0..1 that is good enough."""
    max_cycles: int | None
    """Cycles at most."""
    samples: int | None
    """Samples of a vote."""
    select: Select | None
    """Return the best or the last complete answer."""
    patience: int | None
    """Stop after this many cycles without a new highest confidence."""
    deadline_seconds: float | None
    """Answer with the best so far after this long."""
    probe_every: int | None
    """Ask for the answer inside a thought every so many tokens."""
    return_cycles: bool
    """Put each cycle's thinking into the reply."""


class Cycle(BaseModel):
    """One Think–Answer pair as it was written and judged."""

    index: int
    """Its place in the trajectory, from 0."""
    answer: str | None = None
    """None when the cycle was cut before its answer was complete."""
    think: str | None = None
    """The thinking; only with ``return_cycles``."""
    confidence: float | None = None
    """In 0..1; None when nothing scored it."""
    accepted: bool
    """Whether this answer is the one returned. In a cycle event: whether it ended the request."""
    tokens: int
    """Written in this cycle, the tags that the server injects included."""
    oops_tokens: int
    """Of these, tokens of phrases of self-doubt."""
    prompt_tokens: int
    """What the engine had to read for it."""
    cached_tokens: int
    """Of these, found in the prefix cache."""
    seconds: float
    """Writing and judging it."""
    confidence_seconds: float | None = None
    """Of these, waiting for the score."""


class Probes(BaseModel):
    """Answers that were asked for inside a thought."""

    asked: int
    thoughts_ended: int


class Trajectory(BaseModel):
    """How an answer came about: the ``rtap`` object of a reply."""

    policy: Policy
    """Who decided to stop."""
    stop_reason: StopReason
    """Why no further cycle was written."""
    cycles: list[Cycle]
    """In the order they were written; the samples of a vote in sample order."""
    confidence: float | None = None
    """Of the returned answer."""
    first_answer_seconds: float | None = None
    """From the request until the returned answer was known."""
    confidence_tokens: int
    """Read by the generator; in no usage."""
    discarded_tokens: int
    """Sampled ahead of a verdict that made them unwanted; in no usage."""
    probes: Optional[Probes] = None
    """Only where there were some."""
    degraded: str | None = None
    """Why the generator could not be used; None where it could."""

    @property
    def accepted(self) -> Cycle | None:
        """The cycle whose answer was returned; None where every cycle was cut."""
        return next((cycle for cycle in self.cycles if cycle.accepted), None)


class Message(ChatCompletionMessage):
    """The SDK's message and its reasoning."""

    reasoning: str | None = None
    """All thinking, and the answers that were not accepted."""


class ReplyChoice(Choice):
    """The SDK's choice and, with ``n`` above 1, its own trajectory."""

    message: Message  # pyright: ignore[reportIncompatibleVariableOverride]
    rtap: Optional[Trajectory] = None


class ChatReply(ChatCompletion):
    """The SDK's completion and how it came about."""

    choices: list[ReplyChoice]  # pyright: ignore[reportIncompatibleVariableOverride] - narrower, in data that is only read
    rtap: Optional[Trajectory] = None
    """Of the first choice. None from a server that is not rtap's."""


class CycleNote(BaseModel):
    """What a chunk with an empty delta says: a cycle has just ended."""

    event: Literal["cycle"]
    cycle: Cycle


class Delta(ChoiceDelta):
    """The SDK's delta and its reasoning."""

    reasoning: str | None = None


class ChunkChoiceWithReasoning(ChunkChoice):
    """The SDK's choice of a chunk."""

    delta: Delta  # pyright: ignore[reportIncompatibleVariableOverride]


class ChatChunk(ChatCompletionChunk):
    """The SDK's chunk. The last one of a stream carries the trajectory; ``rtap_client.events`` reads all this."""

    choices: list[ChunkChoiceWithReasoning]  # pyright: ignore[reportIncompatibleVariableOverride]
    rtap: Optional[Union[CycleNote, Trajectory]] = None
    rtap_choices: Optional[list[Trajectory]] = None
    """With ``n`` above 1: of every choice."""


class Score(BaseModel):
    """What the generator thinks of a pair that was written elsewhere."""

    confidence: float
    confidence_tokens: int
    """Read by the generator."""


class Feedback(BaseModel):
    """The server's calibration after a verdict."""

    request_id: str
    confidence: float | None = None
    """What the answer had; None for an unscored one."""
    verdicts: int
    """Recent verdicts that the figures below are over."""
    brier: float | None = None
    ece: float | None = None
    """Expected calibration error."""


class Defaults(BaseModel):
    """What a request gets for what it leaves out."""

    policy: Policy
    threshold: float
    max_cycles: int
    samples: int
    select: Select
    patience: int | None = None
    deadline_seconds: float | None = None


class Ceilings(BaseModel):
    """What a request may ask for at most."""

    max_cycles: int
    samples: int
    deadline_seconds: float
    body_bytes: int


class Calibration(BaseModel):
    """Shares of first-cycle confidences over equal bins of 0..1 when the generator was trained; empty if unknown."""

    reference: list[float]


class ConfidenceSource(BaseModel):
    """Where confidence comes from."""

    kind: Literal["pooling", "remote", "yesno", "logprob", "none"]
    timeout_seconds: float
    calibration: Calibration


class ServerConfig(BaseModel):
    """How a server recurses."""

    version: str
    models: list[str]
    """Names that a request may give as ``model``."""
    format: str
    defaults: Defaults
    limits: Ceilings
    confidence: ConfidenceSource


def trajectory(reply: Any) -> Trajectory | None:
    """The trajectory of any reply or chunk, also of one that the plain openai SDK has read; None where there is none.

    A cycle event is no trajectory.
    """
    found: Any = getattr(reply, "rtap", None)
    if isinstance(found, Trajectory):
        return found
    if not isinstance(found, dict) or "cycles" not in found:
        return None
    return Trajectory.construct(**cast(dict[str, Any], found))
