/** A stream of chat chunks as events. Works on streams of `RTAP` and of the plain openai client. */

import { OpenAIError } from 'openai';
import type OpenAI from 'openai';
import type { Stream } from 'openai/streaming';

import type { ChatChunk, Cycle, Trajectory } from './types.js';

type Chunk = OpenAI.Chat.Completions.ChatCompletionChunk;
type ToolCall = OpenAI.Chat.Completions.ChatCompletionChunk.Choice.Delta.ToolCall;

/** `thinking`: a piece of reasoning, or an answer that was not accepted. `answer`: a piece of the accepted one. */
export type RtapEvent =
  | { type: 'thinking'; text: string; choice: number }
  | { type: 'answer'; text: string; choice: number }
  | { type: 'tool_call'; call: ToolCall; choice: number }
  | { type: 'cycle'; cycle: Cycle; choice: number }
  | DoneEvent;

/** The end of a stream: the first choice's answer and trajectory; `trajectories` has those of all choices. */
export interface DoneEvent {
  type: 'done';
  /** To give feedback on. */
  id: string;
  text: string;
  finishReason: string;
  /** Absent from a server that is not rtap's. */
  rtap: Trajectory | undefined;
  trajectories: Trajectory[];
  /** Absent unless the request asked for it with `stream_options: { include_usage: true }`. */
  usage: OpenAI.CompletionUsage | undefined;
}

/** A stream that ended before its answer did: the server or something between was stopped. */
export class IncompleteStream extends OpenAIError {}

/**
 * The events of `client.chat.completions.create({ …, stream: true })`; the last is `done`.
 *
 * When the iteration is left early (`break`, an exception) the connection is closed, and the server stops writing.
 */
export async function* events(stream: Stream<Chunk> | Stream<ChatChunk>): AsyncGenerator<RtapEvent, void, undefined> {
  const texts: string[] = [];
  let id = '';
  let finishReason: string | null = null;
  let trajectories: Trajectory[] = [];
  let usage: OpenAI.CompletionUsage | undefined;
  try {
    for await (const chunk of stream as Stream<ChatChunk>) {
      id = chunk.id || id;
      usage = chunk.usage ?? usage;
      const told = chunk.rtap;
      if (told && 'cycles' in told) trajectories = chunk.rtap_choices ?? [told];
      for (const { index: choice, delta, finish_reason } of chunk.choices) {
        if (choice === 0) {
          finishReason = finish_reason ?? finishReason;
          if (delta.content) texts.push(delta.content);
        }
        if (told && 'cycle' in told) yield { type: 'cycle', cycle: told.cycle, choice };
        if (delta.reasoning) yield { type: 'thinking', text: delta.reasoning, choice };
        if (delta.content) yield { type: 'answer', text: delta.content, choice };
        for (const call of delta.tool_calls ?? []) yield { type: 'tool_call', call, choice };
      }
    }
  } finally {
    stream.controller.abort();
  }
  if (finishReason === null) throw new IncompleteStream('the stream ended before its answer did; ask again');
  yield { type: 'done', id, text: texts.join(''), finishReason, rtap: trajectories[0], trajectories, usage };
}
