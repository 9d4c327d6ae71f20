/** What travels: the `rtap` request options, the trajectory in a reply, and the server's own routes. Types only. */

import type OpenAI from 'openai';

/** Who decides to stop: the confidence generator, the model itself, one pass, a majority of samples. */
export type Policy = 'confidence' | 'model' | 'single' | 'vote';
/** Which complete answer is returned: the one with the highest confidence or the last. */
export type Select = 'best' | 'last';
/** Why no further cycle was written. */
export type StopReason =
  | 'threshold'
  | 'model'
  | 'max_cycles'
  | 'max_tokens'
  | 'deadline'
  | 'no_gain'
  | 'vote'
  | 'drained';

/** The `rtap` object of a request. What is left out, or null, takes the server's default; it checks and caps values. */
export interface RtapOptions {
  /** Who decides to stop. */
  policy?: Policy | null;
  /** Confidence in 0..1 that is good enough. */
  threshold?: number | null;
  /** Cycles at most. */
  max_cycles?: number | null;
  /** Samples of a vote. */
  samples?: number | null;
  /** Return the best or the last complete answer. */
  select?: Select | null;
  /** Stop after this many cycles without a new highest confidence. */
  patience?: number | null;
  /** Answer with the best so far after this long. */
  deadline_seconds?: number | null;
  /** Ask for the answer inside a thought every so many tokens. */
  probe_every?: number | null;
  /** Put each cycle's thinking into the reply. */
  return_cycles?: boolean;
}

/** One Think–Answer pair as it was written and judged. */
export interface Cycle {
  /** Its place in the trajectory, from 0. */
  index: number;
  /** null when the cycle was cut before its answer was complete. */
  answer: string | null;
  /** The thinking; only with `return_cycles`. */
  think?: string;
  /** In 0..1; null when nothing scored it. */
  confidence: number | null;
  /** Whether this answer is the one returned. In a cycle event: whether it ended the request. */
  accepted: boolean;
  /** Written in this cycle, the tags that the server injects included. */
  tokens: number;
  /** Of these, tokens of phrases of self-doubt. */
  oops_tokens: number;
  /** What the engine had to read for it. */
  prompt_tokens: number;
  /** Of these, found in the prefix cache. */
  cached_tokens: number;
  /** Writing and judging it. */
  seconds: number;
  /** Of these, waiting for the score. */
  confidence_seconds: number | null;
}

/** How an answer came about: the `rtap` object of a reply. */
export interface Trajectory {
  policy: Policy;
  stop_reason: StopReason;
  /** In the order they were written; the samples of a vote in sample order. */
  cycles: Cycle[];
  /** Of the returned answer. */
  confidence: number | null;
  /** From the request until the returned answer was known. */
  first_answer_seconds: number | null;
  /** Read by the generator; in no usage. */
  confidence_tokens: number;
  /** Sampled ahead of a verdict that made them unwanted; in no usage. */
  discarded_tokens: number;
  /** Answers asked for inside a thought; only where there were some. */
  probes?: { asked: number; thoughts_ended: number };
  /** Why the generator could not be used. */
  degraded?: string;
}

type Chat = OpenAI.Chat.Completions.ChatCompletion;
type Chunk = OpenAI.Chat.Completions.ChatCompletionChunk;
type ChunkChoice = OpenAI.Chat.Completions.ChatCompletionChunk.Choice;

/** The SDK's message and its reasoning: all thinking, and the answers that were not accepted. */
export type Message = OpenAI.Chat.Completions.ChatCompletionMessage & { reasoning?: string | null };

/** The SDK's choice and, with `n` above 1, its own trajectory. */
export type ReplyChoice = OpenAI.Chat.Completions.ChatCompletion.Choice & { message: Message; rtap?: Trajectory };

/** The SDK's completion and how the first choice came about; no `rtap` from a server that is not rtap's. */
export type ChatReply = Omit<Chat, 'choices'> & { choices: ReplyChoice[]; rtap?: Trajectory };

/** The SDK's chunk. `events` reads all this. */
export type ChatChunk = Omit<Chunk, 'choices'> & {
  choices: (ChunkChoice & { delta: ChunkChoice['delta'] & { reasoning?: string | null } })[];
  /** A cycle has just ended; or, in the last chunk, the trajectory. */
  rtap?: { event: 'cycle'; cycle: Cycle } | Trajectory;
  /** With `n` above 1: of every choice. */
  rtap_choices?: Trajectory[];
};

/** What the generator thinks of a pair that was written elsewhere. */
export interface Score {
  confidence: number;
  confidence_tokens: number;
}

/** The server's calibration after a verdict. */
export interface Feedback {
  request_id: string;
  /** What the answer had; null for an unscored one. */
  confidence: number | null;
  /** Recent verdicts that the figures below are over. */
  verdicts: number;
  brier: number | null;
  /** Expected calibration error. */
  ece: number | null;
}

/** How a server recurses. */
export interface ServerConfig {
  version: string;
  /** Names that a request may give as `model`. */
  models: string[];
  format: string;
  /** What a request gets for what it leaves out. */
  defaults: {
    policy: Policy;
    threshold: number;
    max_cycles: number;
    samples: number;
    select: Select;
    patience: number | null;
    deadline_seconds: number | null;
  };
  /** What a request may ask for at most. */
  limits: { max_cycles: number; samples: number; deadline_seconds: number; body_bytes: number };
  confidence: {
    kind: 'pooling' | 'remote' | 'yesno' | 'logprob' | 'none';
    timeout_seconds: number;
    calibration: { reference: number[] };
  };
}
