/** Timeline with one row per cycle: answer, thinking, and confidence against the threshold. */

import { confidence, count, h, plural, seconds, setText } from "./dom.js";
import { acceptedAnswer, changes, isVote, voteKey } from "./run.js";

/** Row of one cycle, or of one sample of a vote. */
export class Row {
  constructor(run) {
    this.run = run;
    this.number = h("span", { class: "number", "aria-hidden": "true" });
    this.title = h("span");
    this.state = h("span", { class: "verdict" });
    this.held = h("p", { class: "held model-text", dir: "auto", hidden: true });
    this.think = h("pre", { class: "model-text", dir: "auto" });
    this.summary = h("summary");
    this.details = h("details", { class: "thinking", open: true }, this.summary, this.think);
    this.summary.addEventListener("click", () => { this.isByHand = true; });
    this.meter = h("div", { class: "meter-cell" });
    this.element = h("li", { class: "cycle" }, this.number,
      h("div", { class: "cycle-main" }, h("p", { class: "cycle-title" }, this.title, this.state), this.held, this.details),
      this.meter);
  }

  name(number) {
    setText(this.number, String(number));
    setText(this.title, `${isVote(this.run) ? "Sample" : "Cycle"} ${count(number)}`);
  }

  drawOpen(text, number, isAnswering) {
    this.name(number);
    this.element.dataset.state = "open";
    this.think.tabIndex = 0; // scrollable by keyboard while it grows
    setText(this.state, isAnswering ? "writing its answer" : "generating");
    setText(this.summary, isAnswering ? "Thought" : "Thinking…");
    setText(this.think, text);
    this.details.hidden = !text;
  }

  /** The run ended before this cycle. */
  drawCut() {
    this.element.dataset.state = "cut";
    this.think.removeAttribute("tabindex");
    setText(this.state, "cut off");
    setText(this.summary, "Thinking so far");
  }

  drawCycle(cycle, before, number) {
    this.name(number);
    const wasOpen = !this.element.dataset.state || this.element.dataset.state === "open";
    const [state, label] = statusOf(this.run, cycle);
    this.element.dataset.state = state;
    setText(this.state, label);
    this.think.removeAttribute("tabindex");
    setText(this.summary, `Thought for ${seconds(cycle.seconds)} · ${plural(cycle.tokens, "token")}`);
    setText(this.think, cycle.think);
    this.details.hidden = !cycle.think;
    if (wasOpen && !this.isByHand) this.details.open = false;
    this.held.hidden = cycle.answer === null;
    if (cycle.answer !== null && this.shown !== cycle.answer) {
      this.shown = cycle.answer;
      this.held.replaceChildren(...marked(before?.answer, cycle.answer));
    }
    if (this.scored !== cycle.confidence) {
      this.scored = cycle.confidence;
      this.meter.replaceChildren(...meter(this.run, cycle.confidence));
    }
    if (cycle.confidence === null && this.meter.childNodes.length === 0 && this.run.settings.policy === "confidence") {
      this.meter.append(h("span", { class: "unscored" }, "not scored"));
    }
  }
}

/** Return [state, label] of a finished cycle. */
function statusOf(run, cycle) {
  if (cycle.answer === null) return ["cut", "cut before the answer"];
  const reaches = cycle.confidence !== null && cycle.confidence >= run.settings.threshold;
  const isDone = run.phase === "done";
  switch (run.settings.policy) {
    case "vote": {
      if (!isDone) return ["rejected", ""];
      if (cycle.accepted) return ["accepted", "returned for the majority"];
      return ["rejected", voteKey(cycle.answer) === voteKey(acceptedAnswer(run)) ? "agrees" : "differs"];
    }
    case "confidence":
      if (cycle.accepted) return reaches ? ["accepted", "accepted"] : ["unsure", "returned: the best answer"];
      if (cycle.confidence === null) return ["rejected", "not returned"];
      return reaches ? ["rejected", "reaches the threshold"] : ["rejected", "not accepted"];
    default:
      return cycle.accepted ? ["accepted", "returned"] : ["rejected", "continued"];
  }
}

/** Mark the parts of an answer that the previous one does not have. */
function marked(before, answer) {
  if (typeof before !== "string") return [answer];
  if (before === answer) return [answer, h("small", { class: "same" }, "unchanged")];
  const pieces = changes(before, answer);
  return pieces === null ? [answer] : pieces.map(([text, isNew]) => (isNew ? h("mark", {}, text) : text));
}

/** Draw a confidence as a bar, with a line at the threshold. */
function meter(run, value) {
  if (value === null) return [];
  const hasThreshold = run.settings.policy === "confidence";
  const fill = h("i");
  fill.style.inlineSize = `${Math.min(1, Math.max(0, value)) * 100}%`;
  const line = h("b", { hidden: !hasThreshold });
  line.style.insetInlineStart = `${run.settings.threshold * 100}%`;
  const label = `Confidence ${confidence(value)}${hasThreshold ? `, threshold ${confidence(run.settings.threshold)}` : ""}`;
  const bar = h("div", {
    class: "meter", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "1", "aria-valuenow": String(value),
  }, fill, line);
  bar.dataset.reaches = String(hasThreshold && value >= run.settings.threshold);
  return [bar, h("span", { class: "value", "aria-hidden": "true" }, confidence(value))];
}

/** Label of the meters below. */
export function axis(run) {
  const { policy, threshold } = run.settings;
  const line = h("b", {}, policy === "confidence" ? `threshold ${confidence(threshold)}` : "");
  line.style.insetInlineStart = `${threshold * 100}%`;
  line.dataset.side = threshold > 0.5 ? "left" : "right";
  return h("div", { class: "axis", "aria-hidden": "true" }, h("span", { class: "axis-name" }, "confidence"),
    h("div", { class: "axis-line" }, policy === "confidence" ? line : null));
}
