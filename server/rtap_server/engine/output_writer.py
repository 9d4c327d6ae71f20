"""Convert trajectory events to vLLM RequestOutputs, streamed or whole."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import msgspec
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core import stopping
from rtap_core.format import TrajectoryFormat
from rtap_core.recursion import CycleEvent, DraftEvent, Event, StepEvent
from rtap_core.types import Cycle, Limits, Policy, Step, StopReason, Trajectory
from rtap_server.engine.request_state import RequestState

REASONING_PARSER = "rtap"  # registered name of our vLLM reasoning parser
# Responses have vLLM's field name and DeepSeek's, which many clients read.
REASONING, REASONING_CONTENT = "reasoning", "reasoning_content"
# Separates reasoning from content in the text for vLLM's reasoning parser. It is removed from model text.
ANSWER_MARK = "\x1e"
# Begins the text of an output that is a draft, as a JSON object. The reasoning parser makes it the field DRAFT of a
# delta, and ResponseRewriter the ``rtap`` field of the chunk.
DRAFT_MARK, DRAFT = 2 * ANSWER_MARK, "draft"


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


class _Piece(NamedTuple):
    """One step of an answer. text: its part of the answer. start: number of tokens before it in a whole output."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Any]
    start: int


class OutputWriter:
    """Outputs of one choice: a stream of deltas, or one output at the end.

    With a reasoning parser: thinking is streamed. Steps of an answer wait for the end of the trajectory; then those of
    the returned answer follow ANSWER_MARK, one output per step, so that vLLM's parsers see what the model wrote step by
    step. A rejected answer becomes reasoning. Where nothing can reject the answer (``stopping.streams_answer``), its
    steps do not wait. Without a reasoning parser (``/v1/completions``): all text unchanged, tags included.

    Every token id is passed on exactly once, so that vLLM's usage counts are right. Tokens outside the returned answer
    have the log-probability entry of ``_not_content``, which ResponseRewriter removes.

    ``shows_drafts``: steps of an answer that waits are also passed on at once, as drafts without tokens. Of the samples
    of a vote, one is shown at a time, its thought included.
    """

    def __init__(self, call: GenerateCall, choice: int, fmt: TrajectoryFormat) -> None:
        self._call, self._format, self._opening = call, fmt, fmt.answer_open or fmt.think_close
        self._is_stream = call.params.output_kind is RequestOutputKind.DELTA
        self._wants_logprobs = call.params.logprobs is not None
        self._streams_answer = self._is_stream and stopping.streams_answer(
            call.limits, ends_with_turn=not fmt.has_answer_tags
        )
        self.shows_drafts = call.state.drafts and self._is_stream and call.parses_reasoning and not self._streams_answer
        # Thought and answer, not yet passed on, of unfinished samples.
        self._samples: dict[int, tuple[list[str], list[str]]] = {}
        self._shown_sample = 0
        limits = call.limits  # a stop string may begin in any but the last step of an answer
        self._num_waiting_characters = 0 if limits.include_stop else max(map(len, limits.stop), default=1) - 1
        self._first: RequestOutput | None = None
        self._last_cycle: Cycle | None = None
        self._answers: dict[int, list[_Piece]] = {}  # waiting steps by cycle
        self._is_content = False  # ANSWER_MARK has been written
        self._part = self._new_part(choice)
        self._has_output = False  # any text or token

    def write(self, event: Event) -> Iterable[RequestOutput]:
        """Outputs for one event, possibly none."""
        if isinstance(event, StepEvent):
            is_first = self._first is None
            return self._step(event) or (self._opened() if is_first else ())
        if isinstance(event, DraftEvent):
            return self._add_to_sample(event.step)
        if isinstance(event, CycleEvent):
            self._samples.pop(event.cycle.index, None)
            outputs: Sequence[RequestOutput] = ()
            if event.stop is not None:
                self._last_cycle = event.cycle  # the trajectory decides whether it is returned
            elif self._reject(event.cycle):
                outputs = self._emit()
            return (*outputs, *self._sample_draft())
        return self._final(event.trajectory)

    def _step(self, event: StepEvent) -> Sequence[RequestOutput]:
        step, native = event.step, cast(RequestOutput | None, event.step.native)
        if self._first is None:
            self._first = native
        if not self._call.parses_reasoning:
            text = step.text
        elif event.in_answer:
            return self._answer_step(event)
        else:
            text = event.think.replace(ANSWER_MARK, "")
        if native is not None and self._is_complete(native, text):
            return (self._passed_on(native),)
        self._append(step.token_ids, self._logprobs(step, is_content=not self._call.parses_reasoning))
        self._part.text += text
        return self._emit() if self._part.text else ()

    def _answer_step(self, event: StepEvent) -> Sequence[RequestOutput]:
        step, text = event.step, event.answer.replace(ANSWER_MARK, "")
        passes_on = self._is_content and not step.finished and not self._num_waiting_characters
        if passes_on and step.native is not None and self._is_complete(step.native, text):
            return (self._passed_on(step.native),)
        self._part.text += event.think.replace(ANSWER_MARK, "")
        outputs = self._emit() if self._part.text else ()
        if self.shows_drafts and self._call.limits.policy is not Policy.VOTE:
            outputs = (*outputs, *self._draft(event.cycle_index, "", text))
        logprobs = _content_logprobs(self._logprobs(step, is_content=True), step, text, self._opening)
        waiting = self._answers.setdefault(event.cycle_index, [])
        _take_back(waiting, event.taken_back)
        waiting.append(_Piece(text, step.token_ids, logprobs, len(self._part.token_ids)))
        if not self._is_stream:
            self._append(step.token_ids, self._logprobs(step, is_content=False))  # until the answer is returned
        elif self._streams_answer and not step.finished and (text or self._is_content):
            ready = self._pop_ready(waiting)
            if ready:
                outputs = (*outputs, *self._release(ready), *(self._emit() if self._part.text else ()))
        return outputs

    def _add_to_sample(self, step: StepEvent) -> Sequence[RequestOutput]:
        if self._first is None:
            self._first = cast(RequestOutput | None, step.step.native)
        think, answer = self._samples.setdefault(step.cycle_index, ([], []))
        think.append(step.think.replace(ANSWER_MARK, ""))
        answer.append(step.answer.replace(ANSWER_MARK, ""))
        return self._sample_draft()

    def _sample_draft(self) -> Sequence[RequestOutput]:
        """New text of the sample that is shown: the first unfinished one, until it has finished."""
        if not self._samples:
            return ()
        if self._shown_sample not in self._samples:
            self._shown_sample = min(self._samples)
        think, answer = self._samples[self._shown_sample]
        self._samples[self._shown_sample] = [], []
        return self._draft(self._shown_sample, "".join(think), "".join(answer))

    def _draft(self, index: int, think: str, answer: str) -> Sequence[RequestOutput]:
        """An output without tokens: new text of the cycle or sample ``index``."""
        if not think and not answer:
            return ()
        draft: dict[str, Any] = {"index": index}
        draft |= {name: text for name, text in (("think", think), ("text", answer)) if text}
        part = self._new_part(self._part.index)
        part.text = DRAFT_MARK + msgspec.json.encode(draft).decode()
        return (self._wrap(part),)

    def _pop_ready(self, waiting: list[_Piece]) -> list[_Piece]:
        """Remove and return the steps from which no stop string can take back anything."""
        end, after = len(waiting), 0
        while end and after < self._num_waiting_characters:
            end -= 1
            after += len(waiting[end].text)
        if after < self._num_waiting_characters:
            return []
        ready = waiting[:end]
        del waiting[:end]
        return ready

    def _opened(self) -> Sequence[RequestOutput]:
        """An empty output for the first step, so that a chat stream starts before the first text."""
        return (
            (self._wrap(self._new_part(self._part.index)),) if self._is_stream and self._call.parses_reasoning else ()
        )

    def _is_complete(self, native: RequestOutput, text: str) -> bool:
        """True when the engine's own output can be passed on, as for nearly all tokens."""
        if not self._is_stream or not text or native.finished or self._part.text or self._part.token_ids:
            return False
        is_returned = self._is_content or not self._call.parses_reasoning
        return native.outputs[0].text == text and (is_returned or not self._wants_logprobs)

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

    def _logprobs(self, step: Step, *, is_content: bool) -> Sequence[Any]:
        """One entry per token, none unless the request wants them."""
        if not self._wants_logprobs:
            return ()
        if not is_content:
            return [_not_content(token_id) for token_id in step.token_ids]
        if step.native is None:  # certain, because the loop chose them
            return [{token_id: Logprob(0.0, rank=1)} for token_id in step.token_ids]
        return step.native.outputs[0].logprobs or ()

    def _append(self, token_ids: Sequence[int], logprobs: Sequence[Any]) -> None:
        _ids(self._part).extend(token_ids)
        if self._wants_logprobs:
            _entries(self._part).extend(logprobs)

    def _reject(self, cycle: Cycle) -> bool:
        """Append a rejected answer to the reasoning. False when there is none."""
        if not self._call.parses_reasoning or cycle.answer is None:
            return False
        answer = cycle.answer.replace(ANSWER_MARK, "")
        self._part.text += f"\n{self._format.answer_open or ''}{answer}{self._format.answer_close or ''}\n"
        return True

    def _final(self, trajectory: Trajectory) -> Iterator[RequestOutput]:
        if self._call.parses_reasoning:
            yield from self._returned(trajectory)
        finish = trajectory.finish
        is_cut = trajectory.stop_reason is StopReason.MAX_TOKENS or (finish is not None and finish.truncated)
        if trajectory.selected is None:
            is_cut = is_cut or trajectory.stop_reason in (StopReason.DEADLINE, StopReason.DRAINED)
        elif self._call.parses_reasoning:
            is_cut = False  # the answer is whole; without a parser the text is returned
        self._part.finish_reason = "length" if is_cut else "stop"
        if self._is_stream and not (self._has_output or self._part.text or self._part.token_ids):
            self._part.text = ANSWER_MARK  # vLLM drops a last chunk without text and tokens
        if self._call.parses_reasoning and trajectory.accepted is not None:
            self._part.stop_reason = trajectory.accepted.stop
        elif finish is not None:
            self._part.stop_reason = finish.stop_reason
        yield from self._emit()

    def _returned(self, trajectory: Trajectory) -> Iterator[RequestOutput]:
        """The returned answer, complete or cut, after all that is reasoning."""
        last = self._last_cycle
        if last is not None and not last.accepted:
            self._reject(last)
        pieces = self._answers.pop((trajectory.accepted or trajectory.cycles[-1]).index, None)
        self._give_up_waiting()
        if pieces is None:
            return
        if self._is_stream:
            yield from self._release(pieces)
            return
        self._part.text += ANSWER_MARK + "".join(piece.text for piece in pieces)
        if self._wants_logprobs:
            for piece in pieces:
                _entries(self._part)[piece.start : piece.start + len(piece.logprobs)] = piece.logprobs

    def _release(self, pieces: Iterable[_Piece]) -> Iterator[RequestOutput]:
        """Outputs of an answer's steps but the last, which waits for a finish reason.

        A step without text, such as a tag, joins the next one."""
        if not self._is_content:
            self._is_content = True
            if self._part.text:  # a delta is reasoning or content
                yield from self._emit()
            self._part.text = ANSWER_MARK
        for piece in pieces:
            if self._part.text:
                yield from self._emit()
            self._append(piece.token_ids, piece.logprobs)
            self._part.text = piece.text

    def _give_up_waiting(self) -> None:
        """Pass on the tokens of answers that are not returned."""
        for piece in itertools.chain.from_iterable(self._answers.values() if self._is_stream else ()):
            self._append(piece.token_ids, [_not_content(i) for i in piece.token_ids] if self._wants_logprobs else ())
        self._answers.clear()

    def abort(self, finish_reason: str) -> Iterable[RequestOutput]:
        """The output so far, with the finish reason of an aborted cycle."""
        self._give_up_waiting()
        self._part.finish_reason = finish_reason
        return self._emit()

    def _emit(self) -> tuple[RequestOutput, ...]:
        """The collected text and tokens: in a stream at once, else at the end."""
        if not self._is_stream and self._part.finish_reason is None:
            return ()
        part, self._part = self._part, self._new_part(self._part.index)
        self._has_output = self._has_output or bool(part.text or part.token_ids)
        return (self._wrap(part),)

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


def _take_back(pieces: list[_Piece], count: int) -> None:
    """Remove the last ``count`` characters of an answer."""
    for at in reversed(range(len(pieces))):
        if not count:
            break
        text = pieces[at].text
        kept = max(0, len(text) - count)
        count -= len(text) - kept
        pieces[at] = pieces[at]._replace(text=text[:kept])


def _ids(part: CompletionOutput) -> list[int]:
    """The mutable list behind our own part; a copy for each token would be quadratic."""
    return cast(list[int], part.token_ids)


def _entries(part: CompletionOutput) -> list[Any]:
    return cast(list[Any], part.logprobs)


def _not_content(token_id: int) -> dict[int, Logprob]:
    """Log-probability entry of a token that is not in the returned answer."""
    return {token_id: Logprob(0.0, rank=1, decoded_token=ANSWER_MARK)}


def _content_logprobs(entries: Sequence[Any], step: Step, text: str, opening: str) -> Sequence[Any]:
    """``entries`` of one step without those of tags. text: the part of it in the answer, which follows ``opening``.

    A step has several tokens when its reader was slow."""
    written, text = step.text, text.strip()
    if not entries or text == written.strip() or text not in written:
        return entries
    begin = end = at = 0
    if text:
        before, tag, _ = written.partition(opening) if opening else ("", "", "")
        begin = written.find(text, len(before + tag) if tag else 0)
        if begin < 0:
            return entries
        end = len(written) - len(written[begin + len(text) :].lstrip())
        begin = len(written[:begin].rstrip())
    kept: list[Any] = []
    for token_id, entry in zip(step.token_ids, entries, strict=True):
        begins, at = at, at + len(entry[token_id].decoded_token or "")
        kept.append(entry if begins < end and at > begin else _not_content(token_id))
    return kept
