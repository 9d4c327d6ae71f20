/** Client of an rtap server: the openai SDK with `rtap` in chat calls and replies, and rtap's own routes. */

import OpenAI, { type ClientOptions } from 'openai';
import type { APIPromise } from 'openai/core/api-promise';
import type { Stream } from 'openai/streaming';

import type { ChatChunk, ChatReply, Feedback, RtapOptions, Score, ServerConfig } from './types.js';

type Params = OpenAI.Chat.Completions.ChatCompletionCreateParams;
type NonStreamingParams = OpenAI.Chat.Completions.ChatCompletionCreateParamsNonStreaming;
type StreamingParams = OpenAI.Chat.Completions.ChatCompletionCreateParamsStreaming;
type WithRtap = { rtap?: RtapOptions };
type RequestOptions = OpenAI.RequestOptions;

export const DEFAULT_URL = 'http://127.0.0.1:8000';

/** Read an environment variable; undefined in browsers. */
function environmentVariable(name: string): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } };
  return process?.env?.[name] || undefined;
}

/** Return the API's base URL for an address with or without `/v1`. */
export function apiUrl(url?: string | null): string {
  const root = (url || environmentVariable('RTAP_URL') || DEFAULT_URL).replace(/\/+$/, '');
  return root.endsWith('/v1') ? root : `${root}/v1`;
}

/**
 * Client of an rtap server.
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
 * `baseURL`: with or without `/v1`. `apiKey`: by default `RTAP_API_KEY`. All other options are the SDK's.
 * The SDK retries a failed request `maxRetries` times (default 2) and honours Retry-After on 429 and 503. Each retry is
 * a new request to the server. In a browser set `dangerouslyAllowBrowser: true` and use the user's own key.
 */
export class RTAP extends OpenAI {
  override chat: RtapChat = new RtapChat(this);

  constructor(options: ClientOptions = {}) {
    // The SDK requires a key; a server without keys accepts any.
    const apiKey = options.apiKey ?? environmentVariable('RTAP_API_KEY') ?? 'none';
    super({ ...options, baseURL: apiUrl(options.baseURL), apiKey });
  }

  /** Score an existing answer with the server's confidence generator. */
  score(pair: { question: string; think?: string; answer: string }, options?: RequestOptions): APIPromise<Score> {
    return this.post('/rtap/score', { ...options, body: pair });
  }

  /** Report whether an answer was correct. `request_id`: the reply's `id`. */
  feedback(
    verdict: { request_id: string; correct: boolean; choice?: number },
    options?: RequestOptions,
  ): APIPromise<Feedback> {
    return this.post('/rtap/feedback', { ...options, body: verdict });
  }

  /** Return the server's models, defaults and limits. */
  config(options?: RequestOptions): APIPromise<ServerConfig> {
    return this.get('/rtap/config', options);
  }
}

/** The SDK's `client.chat`. */
export class RtapChat extends OpenAI.Chat {
  override completions: RtapCompletions = new RtapCompletions(this._client);
}

/** The SDK's `client.chat.completions`, with types for `rtap`. */
export class RtapCompletions extends OpenAI.Chat.Completions {
  override create(body: NonStreamingParams & WithRtap, options?: RequestOptions): APIPromise<ChatReply>;
  override create(body: StreamingParams & WithRtap, options?: RequestOptions): APIPromise<Stream<ChatChunk>>;
  override create(body: Params & WithRtap, options?: RequestOptions): APIPromise<Stream<ChatChunk> | ChatReply>;
  override create(body: Params & WithRtap, options?: RequestOptions): APIPromise<Stream<ChatChunk> | ChatReply> {
    return super.create(body, options) as APIPromise<Stream<ChatChunk> | ChatReply>;
  }
}
