"""Types of the API: the ``rtap`` request object, the trajectory in a reply, and the bodies of the server's own routes.

Replies are parsed like the openai SDK's: without validation, keeping unknown fields, so that an older client works with
a newer server. Object fields are Optional[X]: older SDK versions cannot parse X | None.
"""

# ruff: noqa: UP007, UP045

from typing import Any, Literal, Optional, TypedDict, Union, cast

from openai import BaseModel
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

Policy = Literal["confidence", "model", "single", "vote"]
"""When to stop: at a confidence, when the model ends its turn, after one cycle, or by a vote of samples."""
Select = Literal["best", "last"]
"""Which complete answer to return: the one with the highest confidence, or the last."""
Continuation = Literal["continue", "fresh"]
"""Start of a further cycle: after all earlier ones, or on the question alone."""
StopReason = Literal[
    "threshold", "model", "max_cycles", "max_tokens", "deadline", "no_gain", "samples", "agreement", "drained"
]
"""Why the trajectory ended."""


class RtapOptions(TypedDict, total=False):
    """The ``rtap`` object of a request. Omitted fields and None take the server's default.

    A value that the server refuses raises ``openai.BadRequestError``, which names the field.
    """

    policy: Policy | None
    """When to stop."""
    threshold: float | None
    """Stop at this confidence, in 0..1."""
    max_cycles: int | None
    """Maximum number of cycles."""
    samples: int | None
    """Number of samples in a vote."""
    select: Select | None
    """Return the best or the last complete answer."""
    recursion: Continuation | None
    """Continue the trajectory in further cycles, or make fresh attempts."""
    patience: int | None
    """Stop after this many cycles without a higher confidence."""
    deadline_seconds: float | None
    """Return the best answer so far after this time."""
    return_cycles: bool
    """Include each cycle's thinking in the reply."""
    drafts: bool
    """Stream answers while they are written, before they are judged: DraftEvents of a stream."""


class Logprobs(BaseModel):
    """Features of a cycle's log-probabilities."""

    mean: float
    lowest: float
    lowest_tenth: float
    """Mean of the least likely tenth of the tokens."""
    answer: float
    """Mean over the tokens of the final answer."""
    tokens: int


class Cycle(BaseModel):
    """One Think–Answer cycle."""

    index: int
    """Position in the trajectory, from 0."""
    answer: str | None = None
    """None if the cycle was cut before its answer was complete."""
    think: str | None = None
    """The thinking; only with ``return_cycles``."""
    text: str | None = None
    """The whole text of the answer; only with ``return_cycles``."""
    confidence: float | None = None
    """In 0..1; None if the cycle was not scored."""
    accepted: bool
    """True for the returned answer. In a cycle event: True if the cycle ended the request."""
    tokens: int
    """Generated tokens, including the tags that the server inserts."""
    oops_tokens: int
    """Of these, tokens of self-doubt phrases."""
    prompt_tokens: int
    """Prompt length of the cycle."""
    cached_tokens: int
    """Of these, found in the prefix cache."""
    seconds: float
    """Time of generating and scoring."""
    confidence_seconds: float | None = None
    """Of this, time of scoring."""
    logprobs: Logprobs | None = None
    """Only with confidence ``logprob``."""


class Candidate(BaseModel):
    """A distinct answer of a vote."""

    answer: str
    votes: int
    """Number of samples with this answer."""
    posterior: float
    """Probability that it is right, or without confidences that it is the model's most frequent answer."""


class Trajectory(BaseModel):
    """The ``rtap`` object of a reply: the cycles behind the answer and why they ended."""

    policy: Policy
    """The stop policy that was used."""
    stop_reason: StopReason
    """Why the trajectory ended."""
    cycles: list[Cycle]
    """In order; the samples of a vote in sample order."""
    confidence: float | None = None
    """Confidence of the returned answer."""
    first_answer_seconds: float | None = None
    """Seconds from the start of the request to the first complete answer."""
    confidence_tokens: int
    """Tokens that the confidence generator read; not in usage."""
    discarded_tokens: int
    """Tokens sampled after the last cycle; not in usage."""
    candidates: Optional[list[Candidate]] = None
    """Distinct answers of a vote, the leader first; None without a vote."""
    degraded: str | None = None
    """Why the confidence generator could not be used; None if it could."""

    @property
    def accepted(self) -> Cycle | None:
        """The cycle whose answer was returned; None if every cycle was cut."""
        return next((cycle for cycle in self.cycles if cycle.accepted), None)


class Message(ChatCompletionMessage):
    """The SDK's message with ``reasoning``."""

    reasoning: str | None = None
    """The thinking, and the answers that were not accepted."""


class ReplyChoice(Choice):
    """The SDK's choice with, if ``n`` is above 1, its trajectory."""

    message: Message  # pyright: ignore[reportIncompatibleVariableOverride]
    rtap: Optional[Trajectory] = None


class ChatReply(ChatCompletion):
    """The SDK's completion with its trajectory."""

    choices: list[ReplyChoice]  # pyright: ignore[reportIncompatibleVariableOverride] - narrower, in data that is only read
    rtap: Optional[Trajectory] = None
    """Trajectory of the first choice; None if the server is not an rtap server."""


class CycleUpdate(BaseModel):
    """The ``rtap`` field of a chunk that reports a finished cycle."""

    event: Literal["cycle"]
    cycle: Cycle


class Draft(BaseModel):
    """New text of a cycle that is being written."""

    index: int
    """Of the cycle, or of the sample of a vote."""
    text: str = ""
    """Of its answer."""
    think: str = ""
    """Of its thinking; only in a vote."""


class DraftUpdate(BaseModel):
    """The ``rtap`` field of a chunk that brings new text of an answer still to be judged."""

    event: Literal["draft"]
    draft: Draft


class Delta(ChoiceDelta):
    """The SDK's delta with ``reasoning``."""

    reasoning: str | None = None


class ChunkChoiceWithReasoning(ChunkChoice):
    """The SDK's choice of a chunk, with ``Delta``."""

    delta: Delta  # pyright: ignore[reportIncompatibleVariableOverride]


class ChatChunk(ChatCompletionChunk):
    """The SDK's chunk with updates and, in the last one, the trajectory. ``rtap_client.events`` reads them."""

    choices: list[ChunkChoiceWithReasoning]  # pyright: ignore[reportIncompatibleVariableOverride]
    rtap: Optional[Union[CycleUpdate, DraftUpdate, Trajectory]] = None
    rtap_choices: Optional[list[Trajectory]] = None
    """Trajectories of all choices, if ``n`` is above 1."""


class Score(BaseModel):
    """Confidence of an existing answer."""

    confidence: float
    confidence_tokens: int
    """Tokens that the generator read."""


class Feedback(BaseModel):
    """Calibration statistics after a verdict."""

    request_id: str
    confidence: float | None = None
    """Confidence of the answer; None if it was not scored."""
    verdicts: int
    """Number of recent verdicts in the statistics below."""
    brier: float | None = None
    ece: float | None = None
    """Expected calibration error."""


class Defaults(BaseModel):
    """Defaults of the ``rtap`` object."""

    policy: Policy
    threshold: float
    max_cycles: int
    samples: int
    select: Select
    recursion: Continuation
    patience: int | None = None
    deadline_seconds: float | None = None


class Ceilings(BaseModel):
    """Maximum values of a request."""

    max_cycles: int
    samples: int
    deadline_seconds: float
    body_bytes: int


class Calibration(BaseModel):
    """Reference distribution of the confidence generator."""

    reference: list[float]
    """Shares of first-cycle confidences in equal bins of 0..1 at training time; empty if unknown."""


class ConfidenceSource(BaseModel):
    """The confidence generator."""

    kind: Literal["pooling", "remote", "yesno", "logprob", "none"]
    model: Optional[str] = None
    """Checkpoint of kind pooling."""
    timeout_seconds: float
    is_calibrated: bool = False
    """Confidences are probabilities, and votes weigh answers by them."""
    calibration: Calibration


class ServerConfig(BaseModel):
    """Configuration of a server: models, defaults and limits."""

    version: str
    model: str
    """Path or Hub name of the policy."""
    models: list[str]
    """Names accepted as ``model``."""
    format: str
    format_source: str
    """Evidence for the format: the flag, config.json, chat template or vocabulary."""
    cycle_open: str
    """Text that begins a continued cycle."""
    policy_source: str
    """Source of the default policy."""
    defaults: Defaults
    limits: Ceilings
    confidence: ConfidenceSource


def trajectory(reply: Any) -> Trajectory | None:
    """Return the trajectory of a reply or chunk of this client or the plain openai SDK; None if it has none."""
    found: Any = getattr(reply, "rtap", None)
    if isinstance(found, Trajectory):
        return found
    if not isinstance(found, dict) or "cycles" not in found:
        return None
    return Trajectory.construct(**cast(dict[str, Any], found))
