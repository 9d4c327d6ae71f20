"""Convert trajectory events to vLLM RequestOutputs (delta, cumulative or final)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.format import TrajectoryFormat
from rtap_core.recursion import CycleEvent, Event, StepEvent
from rtap_core.types import Cycle, Limits, StopReason, Trajectory
from rtap_server.engine.request_state import RequestState

REASONING_PARSER = "rtap"  # registered name of our vLLM reasoning parser
# Responses have vLLM's field name and DeepSeek's, which many clients read.
REASONING, REASONING_CONTENT = "reasoning", "reasoning_content"
# Separates reasoning from content in the text for vLLM's reasoning parser. It is removed from model text.
ANSWER_MARK = "\x1e"


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One ``generate`` call of a vLLM route. options: its keyword arguments, passed on to every cycle.

    parses_reasoning: the route has a reasoning parser, so text is reasoning, ANSWER_MARK, content; else unchanged."""

    state: RequestState
    first_choice: int
    prompt: dict[str, Any]
    params: SamplingParams
    request_id: str
    options: dict[str, Any]
    limits: Limits
    parses_reasoning: bool

    def prompt_with(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The prompt continued to ``token_ids``, with its images and cache salt.

        Without its arrival time, from which vLLM would measure the latency of every cycle."""
        first_only = ("prompt", "prompt_token_offsets", "arrival_time")
        rest = {key: value for key, value in self.prompt.items() if key not in first_only}
        return {**rest, "prompt_token_ids": list(token_ids)}


class OutputWriter:
    """Outputs of one choice.

    With a reasoning parser: thinking is streamed; an answer is held until it is scored, then written as reasoning or,
    after ANSWER_MARK, as content. Without one (``/v1/completions``): all text unchanged, tags included.
    Every token id is passed on exactly once, so that vLLM's usage counts are right.
    """

    def __init__(self, call: GenerateCall, choice: int, fmt: TrajectoryFormat) -> None:
        self._call, self._format = call, fmt
        self._kind = call.params.output_kind
        self._is_stream = self._kind is RequestOutputKind.DELTA
        self._wants_logprobs = call.params.logprobs is not None
        self._first: RequestOutput | None = None
        self._held: Cycle | None = None
        self._part = self._new_part(choice)
        self._total = self._new_part(choice)
        self._has_output = False  # any text or token

    def write(self, event: Event) -> Sequence[RequestOutput]:
        """Outputs for one event, possibly none."""
        if isinstance(event, StepEvent):
            is_first = self._first is None
            return self._step(event) or (self._opened() if is_first else ())
        if isinstance(event, CycleEvent):
            if event.stop is not None:
                self._held = event.cycle  # the trajectory decides whether it is returned
            elif self._reject(event.cycle):
                return self._emit()
            return ()
        return self._final(event.trajectory)

    def _step(self, event: StepEvent) -> Sequence[RequestOutput]:
        native: RequestOutput | None = event.step.native
        if self._first is None:
            self._first = native
        text = event.think.replace(ANSWER_MARK, "") if self._call.parses_reasoning else event.step.text
        if self._call.parses_reasoning and event.in_answer:
            outputs = self._emit_text(text) if text else ()  # the answer's token ids wait for its score
            self._append(event, native)
            return outputs
        if self._is_stream and native is not None and self._is_complete(native, text):
            return (self._passed_on(native),)
        self._append(event, native)
        self._part.text += text
        return self._emit() if self._part.text else ()

    def _opened(self) -> Sequence[RequestOutput]:
        """An empty output for the first step, so that a chat stream starts before the first text."""
        return (
            (self._wrap(self._new_part(self._part.index)),) if self._is_stream and self._call.parses_reasoning else ()
        )

    def _is_complete(self, native: RequestOutput, text: str) -> bool:
        """True when the engine's own output can be passed on, as for nearly all tokens."""
        is_waiting = bool(self._part.text or self._part.token_ids)
        return bool(text) and not native.finished and not is_waiting and native.outputs[0].text == text

    def _passed_on(self, native: RequestOutput) -> RequestOutput:
        """The engine's output with the request's id, choice index, prompt and logprobs."""
        part, self._has_output = native.outputs[0], True
        part.index = self._part.index
        if not self._wants_logprobs:
            part.logprobs = None
        native.request_id, native.prompt = self._call.request_id, self._call.prompt.get("prompt")
        native.prompt_token_ids = self._call.prompt["prompt_token_ids"]
        assert self._first is not None
        native.num_cached_tokens = self._first.num_cached_tokens
        native.num_cache_creation_tokens = self._first.num_cache_creation_tokens
        return native

    def _append(self, event: StepEvent, native: RequestOutput | None) -> None:
        _ids(self._part).extend(event.step.token_ids)
        if self._wants_logprobs:
            # Certain, because the loop chose them; vLLM's responses need an entry for every token id.
            injected: list[Any] = [{token_id: Logprob(0.0, rank=1)} for token_id in event.step.token_ids]
            _logprobs(self._part).extend(injected if native is None else native.outputs[0].logprobs or ())

    def _reject(self, cycle: Cycle) -> bool:
        """Append a rejected answer to the reasoning. False when there is none."""
        if not self._call.parses_reasoning or cycle.answer is None:
            return False
        answer = cycle.answer.replace(ANSWER_MARK, "")
        self._part.text += f"\n{self._format.answer_open or ''}{answer}{self._format.answer_close or ''}\n"
        return True

    def _final(self, trajectory: Trajectory) -> Sequence[RequestOutput]:
        outputs: Sequence[RequestOutput] = ()
        if self._call.parses_reasoning:
            if self._held is not None and not self._held.accepted:
                self._reject(self._held)
            answer = trajectory.answer or trajectory.partial_answer
            if answer is not None:
                outputs = self._emit() if self._part.text else ()  # a delta is reasoning or content
                self._part.text = ANSWER_MARK + answer.replace(ANSWER_MARK, "")
        finish = trajectory.finish
        cut = trajectory.stop_reason is StopReason.MAX_TOKENS or (finish is not None and finish.truncated)
        is_cut = trajectory.stop_reason in (StopReason.DEADLINE, StopReason.DRAINED)
        is_unanswered = is_cut and trajectory.selected is None
        self._part.finish_reason = "length" if cut or is_unanswered else "stop"
        if self._is_stream and not (self._has_output or self._part.text or self._part.token_ids):
            self._part.text = ANSWER_MARK  # vLLM drops a last chunk without text and tokens
        if self._call.parses_reasoning and trajectory.accepted is not None:
            self._part.stop_reason = trajectory.accepted.stop
        elif finish is not None:
            self._part.stop_reason = finish.stop_reason
        return (*outputs, *self._emit())

    def abort(self, finish_reason: str) -> Sequence[RequestOutput]:
        """The output so far, with the finish reason of an aborted cycle."""
        self._part.finish_reason = finish_reason
        return self._emit()

    def _emit_text(self, text: str) -> Sequence[RequestOutput]:
        """Output ``text`` while token ids are held back."""
        held, self._part = self._part, self._new_part(self._part.index)
        self._part.text = text
        outputs = self._emit()
        self._part = held
        return outputs

    def _emit(self) -> tuple[RequestOutput, ...]:
        """The collected text and tokens, in the caller's output kind."""
        part, self._part = self._part, self._new_part(self._part.index)
        self._has_output = self._has_output or bool(part.text or part.token_ids)
        if self._is_stream:
            return (self._wrap(part),)
        total = self._total
        total.text += part.text
        _ids(total).extend(part.token_ids)
        if self._wants_logprobs:
            _logprobs(total).extend(part.logprobs or ())
        total.finish_reason, total.stop_reason = part.finish_reason, part.stop_reason
        if self._kind is RequestOutputKind.FINAL_ONLY and part.finish_reason is None:
            return ()
        shown = copy.copy(total)
        shown.token_ids = list(total.token_ids)
        return (self._wrap(shown),)

    def _new_part(self, choice: int) -> CompletionOutput:
        return CompletionOutput(
            index=choice,
            text="",
            token_ids=[],
            cumulative_logprob=None,
            logprobs=[] if self._wants_logprobs else None,
            lora_request=self._call.options.get("lora_request"),
        )

    def _wrap(self, part: CompletionOutput) -> RequestOutput:
        first = self._first
        return RequestOutput(
            request_id=self._call.request_id,
            prompt=self._call.prompt.get("prompt"),
            prompt_token_ids=self._call.prompt["prompt_token_ids"],
            prompt_logprobs=first.prompt_logprobs if first else None,
            outputs=[part],
            finished=part.finish_reason is not None,
            metrics=first.metrics if first else None,
            lora_request=part.lora_request,
            num_cached_tokens=first.num_cached_tokens if first else None,
            num_cache_creation_tokens=first.num_cache_creation_tokens if first else None,
        )


def part_of(native: RequestOutput, text: str, tokens: slice, *, is_last: bool) -> RequestOutput:
    """The engine's output with some of its tokens; only the last part keeps the finish reason."""
    whole, output = native.outputs[0], copy.copy(native)
    part = copy.copy(whole)
    part.text, part.token_ids = text, whole.token_ids[tokens]
    part.logprobs = None if whole.logprobs is None else whole.logprobs[tokens]
    if not is_last:
        part.finish_reason, part.stop_reason, output.finished = None, None, False
    output.outputs = [part]
    return output


def _ids(part: CompletionOutput) -> list[int]:
    """The mutable list behind our own part; a copy for each token would be quadratic."""
    return cast(list[int], part.token_ids)


def _logprobs(part: CompletionOutput) -> list[Any]:
    return cast(list[Any], part.logprobs)
