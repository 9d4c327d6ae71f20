"""Events of a trajectory as vLLM RequestOutputs, in the output kind that the caller of ``generate`` asked for."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.format import TrajectoryFormat
from rtap_core.recursion import CycleEvent, Event, StepEvent
from rtap_core.types import Cycle, Limits, StopReason, Trajectory
from rtap_server.http.auth import Visit
from rtap_server.http.schema import ANSWER_MARK, Exchange


@dataclass(frozen=True, slots=True)
class Call:
    """One ``generate`` call of vLLM's routes. options: its keyword arguments, handed to every cycle.

    split: the caller parses reasoning, so text is written as reasoning, ANSWER_MARK, content; otherwise as it is.
    visit: of the key that asks, where keys are asked for."""

    exchange: Exchange
    first_choice: int
    prompt: dict[str, Any]
    params: SamplingParams
    request_id: str
    options: dict[str, Any]
    limits: Limits
    split: bool
    visit: Visit | None = None

    def prompt_with(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The prompt continued to ``token_ids``, with its images and cache salt. Its text is of the first part only, so
        is its time of arrival: vLLM would count each cycle's latency from the beginning of the first."""
        of_the_first = ("prompt", "prompt_token_offsets", "arrival_time")
        rest = {key: value for key, value in self.prompt.items() if key not in of_the_first}
        return {**rest, "prompt_token_ids": list(token_ids)}


class Writer:
    """Writes one choice of one call.

    Split text: thinking as it comes; an answer is held until it is judged, then written as reasoning, or after the
    mark as content. Raw text (``/v1/completions``): everything as it was written, tags included.
    Every token id is handed on exactly once, so vLLM's own usage counts are right.
    """

    def __init__(self, call: Call, choice: int, fmt: TrajectoryFormat) -> None:
        self._call, self._format = call, fmt
        self._kind = call.params.output_kind
        self._is_stream = self._kind is RequestOutputKind.DELTA
        self._wants_logprobs = call.params.logprobs is not None
        self._first: RequestOutput | None = None
        self._held: Cycle | None = None
        self._part = self._new_part(choice)
        self._total = self._new_part(choice)
        self._has_told = False  # any text or token

    def write(self, event: Event) -> Sequence[RequestOutput]:
        """Outputs for one event; none while there is nothing to tell the client."""
        if isinstance(event, StepEvent):
            is_first = self._first is None
            return self._step(event) or (self._opened() if is_first else ())
        if isinstance(event, CycleEvent):
            if event.stop is not None:
                self._held = event.cycle  # whether it is returned is told by the trajectory
            elif self._reject(event.cycle):
                return self._emit()
            return ()
        return self._final(event.trajectory)

    def _step(self, event: StepEvent) -> Sequence[RequestOutput]:
        native: RequestOutput | None = event.step.native
        if self._first is None:
            self._first = native
        text = event.think.replace(ANSWER_MARK, "") if self._call.split else event.step.text
        if self._call.split and event.in_answer:
            outputs = self._emit_text(text) if text else ()  # the answer's ids wait for the verdict
            self._append(event, native)
            return outputs
        if self._is_stream and native is not None and self._is_all(native, text):
            return (self._adopted(native),)
        self._append(event, native)
        self._part.text += text
        return self._emit() if self._part.text else ()

    def _opened(self) -> Sequence[RequestOutput]:
        """An output without text or tokens for the first step: a chat stream begins with the role, and that need not
        wait for the text that follows the first token, a tag."""
        return (self._wrap(self._new_part(self._part.index)),) if self._is_stream and self._call.split else ()

    def _is_all(self, native: RequestOutput, text: str) -> bool:
        """Whether the engine's own output is all that there is to tell, as for nearly all tokens."""
        is_waiting = bool(self._part.text or self._part.token_ids)
        return bool(text) and not native.finished and not is_waiting and native.outputs[0].text == text

    def _adopted(self, native: RequestOutput) -> RequestOutput:
        """The engine's output as one of this request: its choice, its prompt, and no more than it asked for."""
        part, self._has_told = native.outputs[0], True
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
            injected: list[Any] = [{} for _ in event.step.token_ids]
            _logprobs(self._part).extend(injected if native is None else native.outputs[0].logprobs or ())

    def _reject(self, cycle: Cycle) -> bool:
        """Put a held answer among the reasoning. False when there is none."""
        if not self._call.split or cycle.answer is None:
            return False
        answer = cycle.answer.replace(ANSWER_MARK, "")
        self._part.text += f"\n{self._format.answer_open or ''}{answer}{self._format.answer_close or ''}\n"
        return True

    def _final(self, trajectory: Trajectory) -> Sequence[RequestOutput]:
        outputs: Sequence[RequestOutput] = ()
        if self._call.split:
            if self._held is not None and not self._held.accepted:
                self._reject(self._held)
            answer = trajectory.answer or trajectory.partial_answer
            if answer is not None:
                outputs = self._emit() if self._part.text else ()  # no delta is of both kinds
                self._part.text = ANSWER_MARK + answer.replace(ANSWER_MARK, "")
        finish = trajectory.finish
        cut = trajectory.stop_reason is StopReason.MAX_TOKENS or (finish is not None and finish.truncated)
        is_cut = trajectory.stop_reason in (StopReason.DEADLINE, StopReason.DRAINED)
        too_late = is_cut and trajectory.selected is None
        self._part.finish_reason = "length" if cut or too_late else "stop"
        if self._is_stream and not (self._has_told or self._part.text or self._part.token_ids):
            self._part.text = ANSWER_MARK  # vLLM streams no end of what has neither text nor tokens; nobody sees it
        if finish is not None and finish.ended_turn:  # the loop's own stop is nobody's business
            self._part.stop_reason = finish.native.outputs[0].stop_reason
        return (*outputs, *self._emit())

    def abort(self, finish_reason: str) -> Sequence[RequestOutput]:
        """The engine gave up: what there is, with its reason."""
        self._part.finish_reason = finish_reason
        return self._emit()

    def _emit_text(self, text: str) -> Sequence[RequestOutput]:
        """Text alone, while token ids are being held."""
        held, self._part = self._part, self._new_part(self._part.index)
        self._part.text = text
        outputs = self._emit()
        self._part = held
        return outputs

    def _emit(self) -> tuple[RequestOutput, ...]:
        """What has gathered, in the caller's output kind."""
        part, self._part = self._part, self._new_part(self._part.index)
        self._has_told = self._has_told or bool(part.text or part.token_ids)
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
    """The engine's output with some of its tokens; how it ended is told by the last part."""
    whole, output = native.outputs[0], copy.copy(native)
    part = copy.copy(whole)
    part.text, part.token_ids = text, whole.token_ids[tokens]
    part.logprobs = None if whole.logprobs is None else whole.logprobs[tokens]
    if not is_last:
        part.finish_reason, part.stop_reason, output.finished = None, None, False
    output.outputs = [part]
    return output


def _ids(part: CompletionOutput) -> list[int]:
    """The list behind a part of ours, to grow in place: copying per token would be quadratic."""
    return cast(list[int], part.token_ids)


def _logprobs(part: CompletionOutput) -> list[Any]:
    return cast(list[Any], part.logprobs)
