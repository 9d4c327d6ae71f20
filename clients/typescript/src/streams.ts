/** Events of a chat stream, of `RTAP` or of the plain openai client. */

import { OpenAIError } from 'openai';
import type OpenAI from 'openai';
import type { Stream } from 'openai/streaming';

import type { ChatChunk, Cycle, Draft, Trajectory } from './types.js';

type Chunk = OpenAI.Chat.Completions.ChatCompletionChunk;
type ToolCall = OpenAI.Chat.Completions.ChatCompletionChunk.Choice.Delta.ToolCall;

/**
 * `thinking`: reasoning, or an answer that was not accepted. `answer`: text of the accepted answer.
 * `draft`: an answer still to be judged, with `rtap: { drafts: true }`; the `cycle` with its index ends it.
 */
export type RtapEvent =
  | { type: 'thinking'; text: string; choice: number }
  | { type: 'answer'; text: string; choice: number }
  | { type: 'tool_call'; call: ToolCall; choice: number }
  | { type: 'cycle'; cycle: Cycle; choice: number }
  | { type: 'draft'; draft: Draft; choice: number }
  | DoneEvent;

/** End of a stream, with the answer of the first choice. `trajectories`: of every choice. */
export interface DoneEvent {
  type: 'done';
  /** The `request_id` of `feedback`. */
  id: string;
  text: string;
  finishReason: string;
  /** Trajectory of the first choice; undefined if the server is not an rtap server. */
  rtap: Trajectory | undefined;
  trajectories: Trajectory[];
  /** Undefined unless the request set `stream_options: { include_usage: true }`. */
  usage: OpenAI.CompletionUsage | undefined;
}

/** The stream ended before the answer was complete: the server or a proxy was stopped. */
export class IncompleteStream extends OpenAIError {}

/**
 * Yield the events of `client.chat.completions.create({ …, stream: true })`, ending with `done`.
 *
 * Leaving the iteration early closes the connection, and the server aborts the request.
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
      const rtap = chunk.rtap;
      if (rtap && 'cycles' in rtap) trajectories = chunk.rtap_choices ?? [rtap];
      for (const { index: choice, delta, finish_reason } of chunk.choices) {
        if (choice === 0) {
          finishReason = finish_reason ?? finishReason;
          if (delta.content) texts.push(delta.content);
        }
        if (rtap && 'cycle' in rtap) yield { type: 'cycle', cycle: rtap.cycle, choice };
        if (rtap && 'draft' in rtap) yield { type: 'draft', draft: rtap.draft, choice };
        if (delta.reasoning) yield { type: 'thinking', text: delta.reasoning, choice };
        if (delta.content) yield { type: 'answer', text: delta.content, choice };
        for (const call of delta.tool_calls ?? []) yield { type: 'tool_call', call, choice };
      }
    }
  } finally {
    stream.controller.abort();
  }
  if (finishReason === null) throw new IncompleteStream('the stream ended before the answer was complete; send the request again');
  yield { type: 'done', id, text: texts.join(''), finishReason, rtap: trajectories[0], trajectories, usage };
}
