/** Types of the API: the `rtap` request object, the trajectory in a reply, and the bodies of rtap's own routes. */

import type OpenAI from 'openai';

/** When to stop: at a confidence, when the model ends its turn, after one cycle, or by a vote of samples. */
export type Policy = 'confidence' | 'model' | 'single' | 'vote';
/** Which complete answer to return: the one with the highest confidence, or the last. */
export type Select = 'best' | 'last';
/** Start of a further cycle: after all earlier ones, or on the question alone. */
export type Continuation = 'continue' | 'fresh';
/** Why the trajectory ended. */
export type StopReason =
  | 'threshold'
  | 'model'
  | 'max_cycles'
  | 'max_tokens'
  | 'deadline'
  | 'no_gain'
  | 'samples'
  | 'agreement'
  | 'drained';

/** The `rtap` object of a request. Omitted fields and null take the server's default. */
export interface RtapOptions {
  /** When to stop. */
  policy?: Policy | null;
  /** Stop at this confidence, in 0..1. */
  threshold?: number | null;
  /** Maximum number of cycles. */
  max_cycles?: number | null;
  /** Number of samples in a vote. */
  samples?: number | null;
  /** Return the best or the last complete answer. */
  select?: Select | null;
  /** Continue the trajectory in further cycles, or make fresh attempts. */
  recursion?: Continuation | null;
  /** Stop after this many cycles without a higher confidence. */
  patience?: number | null;
  /** Return the best answer so far after this time. */
  deadline_seconds?: number | null;
  /** Include each cycle's thinking and whole answer in the reply. */
  return_cycles?: boolean;
  /** Stream answers while they are written, before they are judged: `draft` events of a stream. */
  drafts?: boolean;
}

/** One Think–Answer cycle. */
export interface Cycle {
  /** Position in the trajectory, from 0. */
  index: number;
  /** null if the cycle was cut before its answer was complete. */
  answer: string | null;
  /** The thinking; only with `return_cycles`. */
  think?: string;
  /** The whole text of the answer; only with `return_cycles`. */
  text?: string | null;
  /** In 0..1; null if the cycle was not scored. */
  confidence: number | null;
  /** True for the returned answer. In a cycle event: true if the cycle ended the request. */
  accepted: boolean;
  /** Generated tokens, including the tags that the server inserts. */
  tokens: number;
  /** Of these, tokens of self-doubt phrases. */
  oops_tokens: number;
  /** Prompt length of the cycle. */
  prompt_tokens: number;
  /** Of these, found in the prefix cache. */
  cached_tokens: number;
  /** Time of generating and scoring. */
  seconds: number;
  /** Of this, time of scoring. */
  confidence_seconds: number | null;
  /** Features of the log-probabilities; only with confidence `logprob`. */
  logprobs?: Logprobs;
}

/** Features of a cycle's log-probabilities. */
export interface Logprobs {
  mean: number;
  lowest: number;
  /** Mean of the least likely tenth of the tokens. */
  lowest_tenth: number;
  /** Mean over the tokens of the final answer. */
  answer: number;
  tokens: number;
}

/** New text of a cycle that is being written. */
export interface Draft {
  /** Of the cycle, or of the sample of a vote. */
  index: number;
  /** Of its answer. */
  text?: string;
  /** Of its thinking; only in a vote. */
  think?: string;
}

/** A distinct answer of a vote. */
export interface Candidate {
  answer: string;
  /** Number of samples with this answer. */
  votes: number;
  /** Probability that it is right, or without confidences that it is the model's most frequent answer. */
  posterior: number;
}

/** The `rtap` object of a reply: the cycles behind the answer and why they ended. */
export interface Trajectory {
  policy: Policy;
  stop_reason: StopReason;
  /** In order; the samples of a vote in sample order. */
  cycles: Cycle[];
  /** Confidence of the returned answer. */
  confidence: number | null;
  /** Seconds from the start of the request to the first complete answer. */
  first_answer_seconds: number | null;
  /** Tokens that the confidence generator read; not in usage. */
  confidence_tokens: number;
  /** Tokens sampled after the last cycle; not in usage. */
  discarded_tokens: number;
  /** Distinct answers of a vote, the leader first; absent without a vote. */
  candidates?: Candidate[];
  /** Why the confidence generator could not be used; absent if it could. */
  degraded?: string;
}

type Chat = OpenAI.Chat.Completions.ChatCompletion;
type Chunk = OpenAI.Chat.Completions.ChatCompletionChunk;
type ChunkChoice = OpenAI.Chat.Completions.ChatCompletionChunk.Choice;

/** The SDK's message with `reasoning`: the thinking, and the answers that were not accepted. */
export type Message = OpenAI.Chat.Completions.ChatCompletionMessage & { reasoning?: string | null };

/** The SDK's choice with, if `n` is above 1, its trajectory. */
export type ReplyChoice = OpenAI.Chat.Completions.ChatCompletion.Choice & { message: Message; rtap?: Trajectory };

/** The SDK's completion with the trajectory of its first choice; no `rtap` if the server is not an rtap server. */
export type ChatReply = Omit<Chat, 'choices'> & { choices: ReplyChoice[]; rtap?: Trajectory };

/** The SDK's chunk with updates and, in the last one, the trajectory. `events` reads them. */
export type ChatChunk = Omit<Chunk, 'choices'> & {
  choices: (ChunkChoice & { delta: ChunkChoice['delta'] & { reasoning?: string | null } })[];
  /** A finished cycle, a draft or, in the last chunk, the trajectory. */
  rtap?: { event: 'cycle'; cycle: Cycle } | { event: 'draft'; draft: Draft } | Trajectory;
  /** Trajectories of all choices, if `n` is above 1. */
  rtap_choices?: Trajectory[];
};

/** Confidence of an existing answer. */
export interface Score {
  confidence: number;
  confidence_tokens: number;
}

/** Calibration statistics after a verdict. */
export interface Feedback {
  request_id: string;
  /** Confidence of the answer; null if it was not scored. */
  confidence: number | null;
  /** Number of recent verdicts in the statistics below. */
  verdicts: number;
  brier: number | null;
  /** Expected calibration error. */
  ece: number | null;
}

/** Configuration of a server: models, defaults and limits. */
export interface ServerConfig {
  version: string;
  /** Path or Hub name of the policy. */
  model: string;
  /** Names accepted as `model`. */
  models: string[];
  format: string;
  /** Evidence for the format: the flag, config.json, chat template or vocabulary. */
  format_source: string;
  /** Text that begins a continued cycle. */
  cycle_open: string;
  /** Source of the default policy. */
  policy_source: string;
  /** Defaults of the `rtap` object. */
  defaults: {
    policy: Policy;
    threshold: number;
    max_cycles: number;
    samples: number;
    select: Select;
    recursion: Continuation;
    patience: number | null;
    deadline_seconds: number | null;
  };
  /** Maximum values of a request. */
  limits: { max_cycles: number; samples: number; deadline_seconds: number; body_bytes: number };
  confidence: {
    kind: 'pooling' | 'remote' | 'yesno' | 'logprob' | 'none';
    /** Checkpoint of kind pooling. */
    model: string | null;
    timeout_seconds: number;
    /** Confidences are probabilities, and votes weigh answers by them. */
    is_calibrated: boolean;
    calibration: { reference: number[] };
  };
}
