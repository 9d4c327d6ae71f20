/** The timeline: a row a cycle, with its held answer, its thinking and its confidence against the threshold. */

import { confidence, count, h, plural, seconds, setText } from "./dom.js";
import { changes, cyclesOf, isVote, tally } from "./run.js";

/** One cycle, or one sample of a vote, in the timeline. */
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

  drawOpen(text, number) {
    this.name(number);
    this.element.dataset.state = "open";
    this.think.tabIndex = 0; // it scrolls while it grows
    setText(this.state, "being written");
    setText(this.summary, "Thinking…");
    setText(this.think, text);
  }

  /** The run ended before this one did. */
  drawCut() {
    this.element.dataset.state = "cut";
    this.think.removeAttribute("tabindex");
    setText(this.state, "cut off");
    setText(this.summary, "Its thinking until then");
  }

  drawCycle(cycle, before, number) {
    this.name(number);
    const wasOpen = !this.element.dataset.state || this.element.dataset.state === "open";
    const [state, words] = verdictOf(this.run, cycle);
    this.element.dataset.state = state;
    setText(this.state, words);
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
    if (cycle.confidence === null && this.meter.childNodes.length === 0 && this.run.asked.policy === "confidence") {
      this.meter.append(h("span", { class: "unscored" }, "not scored"));
    }
  }
}

/** [state, words] of a cycle that was written. */
function verdictOf(run, cycle) {
  if (cycle.answer === null) return ["cut", "cut before its answer"];
  const reaches = cycle.confidence !== null && cycle.confidence >= run.asked.threshold;
  const isDone = run.phase === "done";
  switch (run.asked.policy) {
    case "vote": {
      if (!isDone) return ["rejected", ""];
      if (cycle.accepted) return ["accepted", "stands for the majority"];
      const agrees = tally(cyclesOf(run)).find((entry) => entry.answer === cycle.answer)?.answer === run.content.trim();
      return ["rejected", agrees ? "agrees" : "differs"];
    }
    case "confidence":
      if (cycle.accepted) return ["accepted", reaches ? "accepted" : "returned: the best of them"];
      if (cycle.confidence === null) return ["rejected", "not returned"];
      return reaches ? ["rejected", "reaches the threshold"] : ["rejected", "not accepted"];
    default:
      return cycle.accepted ? ["accepted", "returned"] : ["rejected", "it went on"];
  }
}

/** The answer with what is new against the one before it marked. */
function marked(before, answer) {
  if (typeof before !== "string") return [answer];
  if (before === answer) return [answer, h("small", { class: "same" }, "as before")];
  const pieces = changes(before, answer);
  return pieces === null ? [answer] : pieces.map(([text, isNew]) => (isNew ? h("mark", {}, text) : text));
}

/** A bar from 0 to 1 with the threshold on it. */
function meter(run, value) {
  if (value === null) return [];
  const hasThreshold = run.asked.policy === "confidence";
  const fill = h("i");
  fill.style.inlineSize = `${Math.min(1, Math.max(0, value)) * 100}%`;
  const line = h("b", { hidden: !hasThreshold });
  line.style.insetInlineStart = `${run.asked.threshold * 100}%`;
  const label = `Confidence ${confidence(value)}${hasThreshold ? `, threshold ${confidence(run.asked.threshold)}` : ""}`;
  const bar = h("div", {
    class: "meter", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "1", "aria-valuenow": String(value),
  }, fill, line);
  bar.dataset.reaches = String(hasThreshold && value >= run.asked.threshold);
  return [bar, h("span", { class: "value", "aria-hidden": "true" }, confidence(value))];
}

/** What the meters below it show. */
export function axis(run) {
  const { policy, threshold } = run.asked;
  const line = h("b", {}, policy === "confidence" ? `threshold ${confidence(threshold)}` : "");
  line.style.insetInlineStart = `${threshold * 100}%`;
  line.dataset.side = threshold > 0.5 ? "left" : "right";
  return h("div", { class: "axis", "aria-hidden": "true" }, h("span", { class: "axis-name" }, "confidence"),
    h("div", { class: "axis-line" }, policy === "confidence" ? line : null));
}
