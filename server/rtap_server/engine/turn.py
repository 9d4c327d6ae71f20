"""All cycles of a turn out of one request to the engine, cut where they end, as the loop's Engine protocol has it.

For a model that ends its turn by itself nothing is decided between its cycles: so nothing is read again there, and
whether a further one comes is told by the next token, not by a request of its own.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from rtap_core import stopping
from rtap_core.types import Policy, Step
from rtap_server.engine.output_writer import Call, part_of
from rtap_server.engine.server_state import Plan
from rtap_server.engine.vllm_cycles import Cycles

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import CycleSpans


def is_written_through(call: Call, plan: Plan) -> bool:
    """Whether a choice may be one request to the engine: the model alone ends it, the end of a cycle is a token that is
    seen as text, and nothing was asked for that an engine does to each request, or to text, by itself."""
    limits, params = call.limits, call.params
    decides = limits.policy is Policy.MODEL and not stopping.needs_score(limits) and stopping.max_cycles(limits) > 1
    is_plain = params.detokenize and not params.stop and not params.min_tokens and params.structured_outputs is None
    return decides and is_plain and plan.shows_cycle_end and bool(plan.cycle_end_ids)


class Turn:
    """One turn of one choice. What the engine has sampled when the loop ends it is thrown away."""

    def __init__(self, cycles: Cycles, plan: Plan, spans: "CycleSpans | None" = None) -> None:
        """cycles: where the engine does not stop at the end of a cycle. plan: one that shows that end."""
        self.end_of_turn_ids = cycles.end_of_turn_ids
        self._cycles, self._spans = cycles, spans
        (self._end_id,), self._closing = plan.cycle_end_ids, plan.format.answer_close or ""
        self._stream: AsyncGenerator[Step, None] | None = None
        self._rest: Step | None = None

    @property
    def discarded_tokens(self) -> int:
        """Sampled beyond the last cycle, as far as the engine has told of them."""
        return 0 if self._rest is None else len(self._rest.token_ids)

    def encode(self, text: str) -> list[int]:
        return self._cycles.encode(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None, may_be_cut: bool
    ) -> AsyncGenerator[Step, None]:
        """The first call makes the request; each further one goes on where the one before has ended."""
        del may_be_cut  # it is cut here, whatever the loop does
        read = None
        if self._stream is None:
            self._stream = self._cycles.cycle(prompt_token_ids, index=index, max_tokens=max_tokens, may_be_cut=True)
        else:
            read = len(prompt_token_ids)  # all of it is in the engine's cache
            if self._spans is not None:
                self._spans.headers(index)  # the span of the cycle begins; those of the engine are the first one's
        is_finished = False
        while not is_finished:
            step = await anext(self._stream) if self._rest is None else self._rest
            step, self._rest = cut(step, self._end_id, self._closing)
            is_finished = step.finished
            yield step if read is None else step._replace(prompt_tokens=read, cached_tokens=read)

    async def aclose(self) -> None:
        """Abort what is still being written."""
        if self._stream is not None:
            await self._stream.aclose()


def cut(step: Step, end_id: int, closing: str) -> tuple[Step, Step | None]:
    """(a step up to the end of a cycle, what is beyond that); an engine tells of several tokens when nobody reads for a
    while. The step as it is where no cycle ends in it."""
    if end_id not in step.token_ids:
        return step, None
    end = list(step.token_ids).index(end_id) + 1
    if end == len(step.token_ids):
        return step._replace(finished=True), None
    before, tag, after = step.text.partition(closing)
    first, last = slice(None, end), slice(end, None)
    head = _piece(step, before + tag, first, part_of(step.native, before + tag, first, is_last=False))
    return (
        head._replace(finished=True, truncated=False, ended_turn=False),
        _piece(step, after, last, part_of(step.native, after, last, is_last=True)),
    )


def _piece(step: Step, text: str, tokens: slice, native: Any) -> Step:
    logprobs = None if step.logprobs is None else step.logprobs[tokens]
    return step._replace(text=text, token_ids=step.token_ids[tokens], logprobs=logprobs, native=native)
