/** State of one run: cycles, answer and usage read from the chunks of a stream, and sentences about them.
 * Pure functions. Everything from the server is validated. */

import { confidence, count, isNumber, isText, plural } from "./dom.js";

export const VOTE_SAMPLES = 8; // size of the vote that savings are compared with

/** Create a run. `settings`: policy, threshold, max_cycles, samples. */
export function newRun(settings, now) {
  return {
    settings, startedAt: now, firstTokenAt: null, endedAt: null, phase: "waiting", id: "",
    cycles: new Map(), // by index
    open: "", // thinking of the current cycle
    draft: null, // {index, think, text} of the cycle that is being written
    rejectedAnswer: null, // the stream repeats it as reasoning; null afterwards
    content: "", rtap: null, usage: null, problem: null,
    vote: null, // {samples, tokens} of the vote in the same comparison
  };
}

/** Add one chunk of a chat completion stream. */
export function addChunk(run, chunk, now) {
  if (isText(chunk.id)) run.id = chunk.id;
  const choice = Array.isArray(chunk.choices) ? chunk.choices[0] : undefined;
  const delta = choice?.delta ?? {};
  const thought = isText(delta.reasoning) ? delta.reasoning : "";
  const content = isText(delta.content) ? delta.content : "";
  if ((thought || content) && run.firstTokenAt === null) run.firstTokenAt = now;
  if (thought) {
    run.phase = "thinking";
    run.open = withoutRejectedAnswer(run, run.open + thought);
  }
  run.content += content;
  if (content) run.draft = null;
  if (chunk.usage && typeof chunk.usage === "object") run.usage = chunk.usage;
  const rtap = chunk.rtap;
  if (!rtap || typeof rtap !== "object") return;
  if (rtap.event === "cycle") {
    const cycle = addCycle(run, rtap.cycle);
    if (!cycle) return;
    if (!cycle.think) cycle.think = run.open;
    run.rejectedAnswer = isText(rtap.cycle.text) ? rtap.cycle.text : cycle.answer;
    if (run.draft?.index === cycle.index) run.draft = null;
    run.open = "";
    run.phase = "scored";
  } else if (rtap.event === "draft") {
    addDraft(run, rtap.draft, now);
  } else if (!rtap.event) {
    run.rtap = rtap;
    for (const cycle of Array.isArray(rtap.cycles) ? rtap.cycles : []) addCycle(run, cycle);
  }
}

/** Add text of a cycle that is being written. A finished cycle has no draft. */
function addDraft(run, raw, now) {
  if (!raw || typeof raw !== "object" || !Number.isInteger(raw.index) || run.cycles.has(raw.index)) return;
  if (!isText(raw.think) && !isText(raw.text)) return;
  if (run.draft?.index !== raw.index) run.draft = { index: raw.index, think: "", text: "" };
  if (isText(raw.think)) run.draft.think += raw.think;
  if (isText(raw.text)) run.draft.text += raw.text;
  run.firstTokenAt ??= now;
  run.phase = "thinking";
}

/** Remove a rejected answer, which the stream repeats in its tags as reasoning, and which is shown already. */
function withoutRejectedAnswer(run, text) {
  if (run.rejectedAnswer === null) return text;
  const answer = run.rejectedAnswer;
  run.rejectedAnswer = null;
  const at = text.indexOf(answer);
  if (at < 0 || at > 40) return text; // not the repeated answer: tags are short
  return text.slice(at + answer.length).replace(/^(<\/[^<>\s]{1,40}>)?\n/, "");
}

function addCycle(run, raw) {
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

/** End a run whose stream is complete. */
export function finish(run, now) {
  Object.assign(run, { phase: "done", endedAt: now, open: "", draft: null });
}

/** End a run early. `problem`: a Problem, or null if the user stopped it. */
export function interrupt(run, problem, now) {
  Object.assign(run, { phase: problem ? "failed" : "stopped", endedAt: now, problem });
}

export const isOver = (run) => run.endedAt !== null;

export const cyclesOf = (run) => [...run.cycles.values()].sort((a, b) => a.index - b.index);

export const isVote = (run) => run.settings.policy === "vote";

export const noun = (run) => (isVote(run) ? "sample" : "cycle");

/** The thinking of the cycle that is being written. The stream reports that of a sample when it has ended, and its draft
 * at once. */
export const openThinking = (run) => (isVote(run) && run.draft ? run.draft.think : run.open);

/** Return the cycle with the highest confidence; the last complete one if none is scored. */
export function bestSoFar(run) {
  const complete = cyclesOf(run).filter((cycle) => cycle.answer !== null);
  return complete.reduce((best, c) => (best === null || (c.confidence ?? 1) >= (best.confidence ?? 1) ? c : best), null);
}

/** Describe the state of the run, or why it ended. */
export function sentence(run) {
  if (run.phase === "failed") return "";
  if (run.phase === "stopped") return stoppedSentence(run);
  if (!isOver(run)) return runningSentence(run);
  const degraded = isText(run.rtap?.degraded)
    ? ` The confidence generator gave no score (${run.rtap.degraded}), so the model decided when to stop.` : "";
  return reason(run) + degraded;
}

function stoppedSentence(run) {
  const best = bestSoFar(run);
  const kept = best ? "The best answer so far is shown." : "No answer was complete.";
  return `Stopped after ${plural(run.cycles.size, noun(run))}. ${kept}`;
}

function runningSentence(run) {
  if (run.phase === "waiting") return "Waiting for the first token…";
  const { policy, max_cycles: most, samples } = run.settings;
  if (policy === "vote") return `${count(run.cycles.size)} of ${plural(samples, "sample")} generated…`;
  if (policy === "single") return "Thinking, in one pass…";
  const doing = run.draft?.text ? "answering" : "thinking";
  return `Cycle ${count(run.cycles.size + 1)} of at most ${count(most)}: ${doing}…`;
}

/** "Not sure (0.13, needs 0.76)" where the returned answer's confidence is below the threshold; else "". */
export function doubt(run) {
  const { policy, threshold } = run.settings;
  const value = run.rtap?.confidence;
  const isBelow = policy === "confidence" && run.phase === "done" && isNumber(value) && value < threshold;
  return isBelow ? `Not sure (${confidence(value)}, needs ${confidence(threshold)})` : "";
}

function reason(run) {
  const { policy, threshold, max_cycles: most, samples } = run.settings;
  const n = run.cycles.size;
  const best = "the best answer so far is returned";
  const kept = run.content ? best : "no answer was complete";
  switch (run.rtap?.stop_reason) {
    case "threshold":
      return `Confidence ${confidence(run.rtap.confidence)} reached the threshold ${confidence(threshold)} `
        + `after ${count(n)} of at most ${plural(most, "cycle")}.`;
    case "model":
      return `The model ended its turn after ${plural(n, "cycle")}.`;
    case "max_cycles":
      if (policy === "single") return "One pass, as requested.";
      return policy === "model"
        ? `All ${plural(n, "cycle")} were used; the model had not ended its turn.`
        : `All ${plural(n, "cycle")} were used and none reached the threshold ${confidence(threshold)}; the best answer is returned.`;
    case "max_tokens":
      return `The token limit was reached after ${plural(n, noun(run))}; ${kept}.`;
    case "deadline":
      return `The deadline was reached after ${plural(n, noun(run))}; ${kept}.`;
    case "drained":
      return `The server is shutting down, so the run ended after ${plural(n, noun(run))}; ${kept}.`;
    case "no_gain":
      return `Confidence stopped rising, so the run ended after ${plural(n, "cycle")}; ${best}.`;
    case "agreement":
      return `${plural(n, "sample")} agreed well enough; the leading answer is returned.`;
    case "samples": {
      const weighted = cyclesOf(run).some((cycle) => cycle.confidence !== null) ? ", weighted by confidence" : "";
      return `The majority of ${plural(n || samples, "sample")}${weighted}.`;
    }
    default:
      return isText(run.rtap?.stop_reason) ? `The run ended with “${run.rtap.stop_reason}”.` : "The answer is complete.";
  }
}

/** Answers with the same key count as equal. */
export const voteKey = (answer) => answer.replace(/\s+/g, "").toLowerCase().replace(/\.$/, "");

/** The answer of the returned cycle, as the cycles list it; empty if there is none. */
export const acceptedAnswer = (run) => cyclesOf(run).find((cycle) => cycle.accepted)?.answer ?? "";

/** Count the votes: {answer, votes, weight}, highest weight first. */
export function tally(cycles) {
  const found = new Map();
  for (const cycle of cycles) {
    if (cycle.answer === null) continue;
    const key = voteKey(cycle.answer);
    const entry = found.get(key) ?? { answer: cycle.answer, votes: 0, weight: 0 };
    entry.votes += 1;
    entry.weight += cycle.confidence ?? 1;
    found.set(key, entry);
  }
  return [...found.values()].sort((a, b) => b.weight - a.weight);
}

export const tokensOf = (run) => (isNumber(run.usage?.completion_tokens)
  ? run.usage.completion_tokens : cyclesOf(run).reduce((sum, cycle) => sum + cycle.tokens, 0));

/** Compare the tokens of a run with all cycles and with a vote: {of, saved, share, note, how}. */
export function savings(run) {
  const cycles = cyclesOf(run);
  const { policy, max_cycles: most } = run.settings;
  if (run.phase !== "done" || cycles.length === 0 || policy === "vote") return [];
  const spent = tokensOf(run);
  const entry = (of, other, note, how) => ({ of, saved: Math.round(other - spent), share: (other - spent) / other, note, how });
  const first = cycles[0].tokens;
  const found = [];
  if (policy !== "single") {
    found.push(entry(
      `against all ${plural(most, "cycle")}`, (most * spent) / cycles.length, "estimate",
      `Estimate: ${count(most)} cycles at this run’s mean of ${count(Math.round(spent / cycles.length))} tokens, minus the ${count(spent)} generated.`,
    ));
  }
  found.push(run.vote ? entry(
    `against the vote of ${run.vote.samples}`, run.vote.tokens, "measured",
    `The ${count(run.vote.tokens)} tokens of the vote in this comparison, minus the ${count(spent)} generated.`,
  ) : entry(
    `against a vote of ${VOTE_SAMPLES}`, VOTE_SAMPLES * first, "estimate",
    `Estimate: ${VOTE_SAMPLES} samples of ${count(first)} tokens, the length of the first cycle, minus the ${count(spent)} generated.`,
  ));
  return found.filter(({ saved }) => saved >= 0);
}

/** Split `after` into pieces [text, isNew] by the longest common subsequence of words with `before`.
 * null if the texts are too long or have little in common. */
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
