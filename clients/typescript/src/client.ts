/** `RTAP`: the official OpenAI client with `rtap` in chat calls and in their results. */

import OpenAI, { type ClientOptions } from 'openai';
import type { APIPromise } from 'openai/core/api-promise';
import type { Stream } from 'openai/streaming';

import type { ChatChunk, ChatReply, Feedback, RtapOptions, Score, ServerConfig } from './types.js';

type Params = OpenAI.Chat.Completions.ChatCompletionCreateParams;
type Whole = OpenAI.Chat.Completions.ChatCompletionCreateParamsNonStreaming;
type Streamed = OpenAI.Chat.Completions.ChatCompletionCreateParamsStreaming;
type WithRtap = { rtap?: RtapOptions };
type RequestOptions = OpenAI.RequestOptions;

export const DEFAULT_URL = 'http://127.0.0.1:8000';

/** A variable of the environment, where there is one: not in browsers. */
function variable(name: string): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } };
  return process?.env?.[name] || undefined;
}

/** The base URL of an API, from an address with or without `/v1`. */
export function address(url?: string | null): string {
  const root = (url || variable('RTAP_URL') || DEFAULT_URL).replace(/\/+$/, '');
  return root.endsWith('/v1') ? root : `${root}/v1`;
}

/**
 * A client of an rtap server.
 *
 * ```ts
 * const client = new RTAP();                                  // RTAP_URL, else http://127.0.0.1:8000
 * const reply = await client.chat.completions.create({
 *   model: 'rtap',
 *   messages: [{ role: 'user', content: 'make 82 from 3, 7, 25' }],
 *   rtap: { threshold: 0.8, max_cycles: 4 },
 * });
 * console.log(reply.choices[0]?.message.content, reply.rtap?.confidence, reply.rtap?.stop_reason);
 * ```
 *
 * `baseURL` may come without `/v1`. Keys: `apiKey`, else `RTAP_API_KEY`. All else is the SDK's: a request that fails or
 * is told to come again (429, 503 with Retry-After) is repeated `maxRetries` times (2), with one Idempotency-Key, so
 * that the server does its work once. In a browser give `dangerouslyAllowBrowser: true`, and a key that its user owns.
 */
export class RTAP extends OpenAI {
  protected override idempotencyHeader = 'Idempotency-Key';
  override chat: RtapChat = new RtapChat(this);

  constructor(options: ClientOptions = {}) {
    // A server without keys takes any, and the SDK insists on one.
    const apiKey = options.apiKey ?? variable('RTAP_API_KEY') ?? 'none';
    super({ ...options, baseURL: address(options.baseURL), apiKey });
  }

  /** How sure the server's generator is of a Think–Answer pair that was written elsewhere. */
  score(pair: { question: string; think?: string; answer: string }, options?: RequestOptions): APIPromise<Score> {
    return this.post('/rtap/score', { ...options, body: pair });
  }

  /** Say whether an answer was right. `request_id`: the `id` of its reply. */
  feedback(
    verdict: { request_id: string; correct: boolean; choice?: number },
    options?: RequestOptions,
  ): APIPromise<Feedback> {
    return this.post('/rtap/feedback', { ...options, body: verdict });
  }

  /** How the server recurses: its models, defaults and ceilings. */
  config(options?: RequestOptions): APIPromise<ServerConfig> {
    return this.get('/rtap/config', options);
  }
}

/** The SDK's `client.chat`. */
export class RtapChat extends OpenAI.Chat {
  override completions: RtapCompletions = new RtapCompletions(this._client);
}

/** The SDK's `client.chat.completions`. The body goes out as it is given, so only types are added. */
export class RtapCompletions extends OpenAI.Chat.Completions {
  override create(body: Whole & WithRtap, options?: RequestOptions): APIPromise<ChatReply>;
  override create(body: Streamed & WithRtap, options?: RequestOptions): APIPromise<Stream<ChatChunk>>;
  override create(body: Params & WithRtap, options?: RequestOptions): APIPromise<Stream<ChatChunk> | ChatReply>;
  override create(body: Params & WithRtap, options?: RequestOptions): APIPromise<Stream<ChatChunk> | ChatReply> {
    return super.create(body, options) as APIPromise<Stream<ChatChunk> | ChatReply>;
  }
}
