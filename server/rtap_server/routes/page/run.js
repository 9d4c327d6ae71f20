/** One run as data: chunks of a stream folded into cycles, an answer and figures, and the sentences about them.
 * Pure: no DOM, no clock, no network. Whatever a server sends is checked before it is believed. */

import { confidence, count, isNumber, isText, plural } from "./dom.js";

export const VOTE_SAMPLES = 8; // what savings are compared with

/** A run that has been asked and not answered. `asked`: the values in force: policy, threshold, max_cycles, samples. */
export function newRun(asked, now) {
  return {
    asked, startedAt: now, firstTokenAt: null, endedAt: null, phase: "waiting", id: "",
    cycles: new Map(), // by index
    open: "", // thinking of a cycle that has not ended
    told: null, // the answer that a rejected cycle is about to repeat
    content: "", rtap: null, usage: null, problem: null,
    vote: null, // {samples, tokens} of a vote on the same question, where one was measured
  };
}

/** Take one chunk of a chat completion's stream into the run. */
export function take(run, chunk, now) {
  if (isText(chunk.id)) run.id = chunk.id;
  const choice = Array.isArray(chunk.choices) ? chunk.choices[0] : undefined;
  const delta = choice?.delta ?? {};
  const thought = isText(delta.reasoning) ? delta.reasoning : "";
  const content = isText(delta.content) ? delta.content : "";
  if ((thought || content) && run.firstTokenAt === null) run.firstTokenAt = now;
  if (thought) {
    run.phase = "thinking";
    run.open = withoutTold(run, run.open + thought);
  }
  run.content += content;
  if (chunk.usage && typeof chunk.usage === "object") run.usage = chunk.usage;
  const told = chunk.rtap;
  if (!told || typeof told !== "object") return;
  if (told.event === "cycle") {
    const cycle = takeCycle(run, told.cycle);
    if (!cycle) return;
    if (!cycle.think) cycle.think = run.open;
    run.told = cycle.answer;
    run.open = "";
    run.phase = "judged";
  } else if (!told.event) {
    run.rtap = told;
    for (const cycle of Array.isArray(told.cycles) ? told.cycles : []) takeCycle(run, cycle);
  }
}

/** After a rejected cycle its answer is repeated among the reasoning, in the format's tags. It is shown already. */
function withoutTold(run, text) {
  if (run.told === null) return text;
  const answer = run.told;
  run.told = null;
  const at = text.indexOf(answer);
  if (at < 0 || at > 40) return text; // not the repetition: tags are short
  return text.slice(at + answer.length).replace(/^(<\/[^<>\s]{1,40}>)?\n/, "");
}

function takeCycle(run, raw) {
  if (!raw || typeof raw !== "object" || !Number.isInteger(raw.index) || raw.index < 0) return null;
  const known = run.cycles.get(raw.index);
  const cycle = {
    index: raw.index,
    answer: isText(raw.answer) ? raw.answer : null,
    think: isText(raw.think) ? raw.think : known?.think ?? "",
    confidence: raw.confidence >= 0 && raw.confidence <= 1 && isNumber(raw.confidence) ? raw.confidence : null,
    accepted: raw.accepted === true,
    tokens: isNumber(raw.tokens) ? raw.tokens : 0,
    seconds: isNumber(raw.seconds) ? raw.seconds : null,
  };
  run.cycles.set(raw.index, cycle);
  return cycle;
}

/** The stream has ended well. */
export function finish(run, now) {
  Object.assign(run, { phase: "done", endedAt: now, open: "" });
}

/** It has not: `problem` is a Problem, or null where the user stopped it. What was written stays. */
export function breakOff(run, problem, now) {
  Object.assign(run, { phase: problem ? "failed" : "stopped", endedAt: now, problem });
}

export const isOver = (run) => run.endedAt !== null;

export const cyclesOf = (run) => [...run.cycles.values()].sort((a, b) => a.index - b.index);

export const isVote = (run) => run.asked.policy === "vote";

const noun = (run) => (isVote(run) ? "sample" : "cycle");

/** The held answer with the highest confidence so far; the last one where nothing scores. */
export function bestSoFar(run) {
  const complete = cyclesOf(run).filter((cycle) => cycle.answer !== null);
  return complete.reduce((best, c) => (best === null || (c.confidence ?? 1) >= (best.confidence ?? 1) ? c : best), null);
}

/** What is going on, or why it ended, in a sentence. */
export function sentence(run) {
  if (run.phase === "failed") return "";
  if (run.phase === "stopped") return stoppedSentence(run);
  if (!isOver(run)) return runningSentence(run);
  const degraded = isText(run.rtap?.degraded)
    ? ` The confidence generator gave no score (${run.rtap.degraded}), so the model decided itself when to stop.` : "";
  return reason(run) + degraded;
}

function stoppedSentence(run) {
  const best = bestSoFar(run);
  const kept = best ? "The best answer until then is shown." : "No answer was complete.";
  return `You stopped it after ${plural(run.cycles.size, noun(run))}. ${kept}`;
}

function runningSentence(run) {
  if (run.phase === "waiting") return "Waiting for the first token…";
  const { policy, max_cycles: most, samples } = run.asked;
  if (policy === "vote") return `${count(run.cycles.size)} of ${plural(samples, "sample")} written…`;
  if (policy === "single") return "Thinking, in one pass…";
  return `Cycle ${count(run.cycles.size + 1)} of at most ${count(most)}: thinking…`;
}

function reason(run) {
  const { policy, threshold, max_cycles: most, samples } = run.asked;
  const n = run.cycles.size;
  const best = "the best answer until then is returned";
  const kept = run.content ? best : "no answer was complete";
  switch (run.rtap?.stop_reason) {
    case "threshold":
      return `Confidence ${confidence(run.rtap.confidence)} reached the threshold ${confidence(threshold)} `
        + `after ${count(n)} of at most ${plural(most, "cycle")}.`;
    case "model":
      return `The model ended its turn itself after ${plural(n, "cycle")}.`;
    case "max_cycles":
      if (policy === "single") return "One pass, as asked.";
      return policy === "model"
        ? `All ${plural(n, "cycle")} were used; the model would have gone on.`
        : `All ${plural(n, "cycle")} were used and none reached the threshold ${confidence(threshold)}; the answer that was best is returned.`;
    case "max_tokens":
      return `The budget of tokens was used up after ${plural(n, noun(run))}; ${kept}.`;
    case "deadline":
      return `The deadline passed after ${plural(n, noun(run))}; ${kept}.`;
    case "drained":
      return `The server is being stopped, so it ended after ${plural(n, noun(run))}; ${kept}.`;
    case "no_gain":
      return `Further cycles brought no higher confidence, so it stopped after ${plural(n, "cycle")}; ${best}.`;
    case "vote": {
      const weighed = cyclesOf(run).some((cycle) => cycle.confidence !== null) ? ", weighed by confidence" : "";
      return `The majority of ${plural(n || samples, "sample")}${weighed}.`;
    }
    default:
      return isText(run.rtap?.stop_reason) ? `It ended with “${run.rtap.stop_reason}”.` : "The answer is complete.";
  }
}

/** Samples that agree, heaviest first: {answer, votes, weight}. Answers are compared as the server does. */
export function tally(cycles) {
  const found = new Map();
  for (const cycle of cycles) {
    if (cycle.answer === null) continue;
    const key = cycle.answer.replace(/\s+/g, "").toLowerCase().replace(/\.$/, "");
    const entry = found.get(key) ?? { answer: cycle.answer, votes: 0, weight: 0 };
    entry.votes += 1;
    entry.weight += cycle.confidence ?? 1;
    found.set(key, entry);
  }
  return [...found.values()].sort((a, b) => b.weight - a.weight);
}

export const tokensOf = (run) => (isNumber(run.usage?.completion_tokens)
  ? run.usage.completion_tokens : cyclesOf(run).reduce((sum, cycle) => sum + cycle.tokens, 0));

/** Tokens that were not written, against two ways of spending more: {of, saved, share, note, how}. */
export function savings(run) {
  const cycles = cyclesOf(run);
  const { policy, max_cycles: most } = run.asked;
  if (run.phase !== "done" || cycles.length === 0 || policy === "vote") return [];
  const spent = tokensOf(run);
  const entry = (of, other, note, how) => ({ of, saved: Math.round(other - spent), share: (other - spent) / other, note, how });
  const first = cycles[0].tokens;
  const found = [];
  if (policy !== "single") {
    found.push(entry(
      `against all ${plural(most, "cycle")}`, (most * spent) / cycles.length, "estimate",
      `Estimate: ${count(most)} cycles of ${count(Math.round(spent / cycles.length))} tokens, this run’s mean, less the ${count(spent)} that were written.`,
    ));
  }
  found.push(run.vote ? entry(
    `against the vote of ${run.vote.samples}`, run.vote.tokens, "measured",
    `The ${count(run.vote.tokens)} tokens of the vote beside it, less the ${count(spent)} that were written.`,
  ) : entry(
    `against a vote of ${VOTE_SAMPLES}`, VOTE_SAMPLES * first, "estimate",
    `Estimate: ${VOTE_SAMPLES} samples of ${count(first)} tokens, as many as the first cycle took, less the ${count(spent)} that were written.`,
  ));
  return found;
}

/** `after` in pieces, [text, isNew]: what of it is not in `before`. Longest common subsequence over words and signs;
 * null where the texts are too long for that or have little in common, and marks would say nothing. */
export function changes(before, after) {
  if (before.length + after.length > 4000) return null;
  const split = (text) => text.match(/[\p{L}\p{N}_]+|\s+|[^\p{L}\p{N}_\s]/gu) ?? [];
  const [a, b] = [split(before), split(after)];
  if (a.length > 200 || b.length > 200) return null;
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  if (common[0][0] * 3 < b.length) return null;
  const pieces = [];
  for (let i = 0, j = 0; j < b.length; j++) {
    while (i < a.length && a[i] !== b[j] && common[i + 1][j] >= common[i][j + 1]) i++;
    const isNew = i >= a.length || a[i] !== b[j];
    if (!isNew) i++;
    const last = pieces.at(-1);
    if (last && last[1] === isNew) last[0] += b[j];
    else pieces.push([b[j], isNew]);
  }
  return pieces;
}
