/** View of one run: answer, stop reason, figures and cycles. */

import { Row, axis } from "./cycles.js";
import { count, h, plural, setText } from "./dom.js";
import { figuresOf } from "./figures.js";
import { bestSoFar, cyclesOf, doubt, isOver, isVote, noun, openThinking, sentence, tally, tokensOf } from "./run.js";

const RAW_LINES = 2000; // maximum number of raw events to keep

/** `title`: heading of the column in a comparison, else null. `onVerdict(isCorrect)`: called with the user's verdict. */
export class RunView {
  constructor(run, { title = null, onVerdict }) {
    this.run = run;
    this.rows = new Map();
    this.openRow = null;
    this.openIndex = null; // of the cycle in openRow
    this.raw = [];
    this.isCompared = title !== null;
    this.caption = h("span", {}, "Answer");
    this.doubt = h("b", { class: "doubt" });
    this.answer = h("p", { class: "answer-text model-text", dir: "auto" });
    this.sentence = h("p", { class: "sentence" });
    this.bar = h("div", { class: "token-bar", "aria-hidden": "true", hidden: true }, h("i"));
    this.figures = h("dl", { class: "figures", hidden: true });
    this.how = h("details", { class: "how", hidden: true }, h("summary", {}, "How these figures are measured"), h("ul"));
    this.tally = h("ul", { class: "tally", hidden: true });
    this.cycles = h("ol", { class: "cycles", "aria-label": isVote(run) ? "Samples" : "Cycles" });
    // In a comparison the tally is enough.
    const folded = isVote(run) ? h("details", { class: "samples", open: !this.isCompared }, h("summary", {}, "The samples, each with its confidence"), this.cycles) : this.cycles;
    this.axis = axis(run);
    this.verdict = verdict(onVerdict);
    this.rawLines = h("pre", { class: "raw", tabIndex: 0, "aria-label": "Events" });
    this.rawDetails = h("details", { class: "events", ontoggle: () => this.showRaw() }, h("summary"), this.rawLines);
    this.element = h("article", { class: "run", "aria-label": title ?? "Run" },
      title === null ? null : h("h2", {}, title),
      h("div", { class: "answer" }, h("p", { class: "caption" }, this.caption, this.doubt), this.answer, this.sentence),
      this.bar, this.figures, this.how, this.verdict, this.tally, this.axis, folded, this.rawDetails);
    this.draw();
  }

  addRawEvent(line) {
    if (this.raw.length < RAW_LINES) this.raw.push(line);
  }

  showRaw() {
    if (this.rawDetails.open) setText(this.rawLines, this.raw.join("\n"));
  }

  draw() {
    const { run } = this;
    this.element.dataset.phase = run.phase;
    this.drawAnswer();
    setText(this.sentence, sentence(run));
    this.drawCycles();
    this.axis.hidden = isVote(run) || !cyclesOf(run).some((cycle) => cycle.confidence !== null);
    if (isVote(run)) this.drawTally();
    if (isOver(run)) this.drawFigures();
    this.verdict.hidden = this.isCompared || run.phase !== "done" || !run.content;
    this.rawDetails.hidden = this.raw.length === 0;
    setText(this.rawDetails.firstChild, `Raw events (${count(this.raw.length)}${this.raw.length === RAW_LINES ? ", the first" : ""})`);
    this.showRaw();
  }

  drawAnswer() {
    const { run } = this;
    const best = run.content ? null : bestSoFar(run);
    const draft = run.content || (isOver(run) && best) ? "" : run.draft?.text.trim() ?? "";
    const text = run.content || draft || best?.answer || "";
    const isFinal = run.phase === "done" && Boolean(run.content);
    this.answer.dataset.state = isFinal ? "final" : text ? "held" : "none";
    this.answer.dataset.size = !draft && text.length <= 48 ? "short" : "long";
    const held = draft ? `Answer of ${noun(run)} ${count(run.draft.index + 1)}, not judged yet`
      : isOver(run) ? "Best answer so far" : "Best answer so far, not returned yet";
    setText(this.caption, isFinal || !text ? "Answer" : held);
    setText(this.doubt, doubt(run));
    setText(this.answer, text || (isOver(run) ? "No answer" : "…"));
  }

  /** Set the width of the bar: tokens of this run relative to the run with the most. */
  scale(most) {
    this.bar.hidden = most === 0;
    this.bar.firstChild.style.inlineSize = `${(100 * tokensOf(this.run)) / most}%`;
  }

  drawCycles() {
    const { run } = this;
    cyclesOf(run).forEach((cycle, position) => {
      if (!this.rows.has(cycle.index)) {
        const isOpen = this.openRow !== null && this.openIndex === cycle.index;
        this.rows.set(cycle.index, isOpen ? this.openRow : new Row(run));
        if (isOpen) this.openRow = null;
      }
      const row = this.rows.get(cycle.index);
      const before = position > 0 && !isVote(run) ? cyclesOf(run)[position - 1] : null;
      row.drawCycle(cycle, before, cycle.index + 1);
      if (this.cycles.children[position] !== row.element) this.cycles.insertBefore(row.element, this.cycles.children[position] ?? null);
    });
    const thinking = openThinking(run);
    if ((thinking || run.draft) && !isOver(run)) {
      this.openRow ??= new Row(run);
      this.openIndex = run.draft?.index ?? run.cycles.size;
      if (this.openRow.element !== this.cycles.lastChild) this.cycles.append(this.openRow.element);
      this.openRow.drawOpen(thinking, this.openIndex + 1, Boolean(run.draft?.text));
    } else if (isOver(run) && this.openRow) {
      this.openRow.drawCut();
      this.openRow = null;
    }
  }

  drawTally() {
    const votes = tally(cyclesOf(this.run));
    const all = votes.reduce((sum, { weight }) => sum + weight, 0) || 1;
    this.tally.hidden = votes.length === 0;
    this.tally.replaceChildren(...votes.slice(0, 8).map(({ answer, votes: n, weight }) => {
      const fill = h("i");
      fill.style.inlineSize = `${(100 * weight) / all}%`;
      return h("li", {},
        h("span", { class: "model-text tally-answer", dir: "auto" }, answer),
        h("span", { class: "tally-bar", "aria-hidden": "true" }, fill),
        h("span", { class: "tally-count" }, `${plural(n, "vote")}, weight ${weight.toFixed(2)}`));
    }));
  }

  drawFigures() {
    const { run } = this;
    const entries = figuresOf(run);
    this.figures.hidden = this.how.hidden = entries.length === 0;
    this.figures.replaceChildren(...entries.map(({ name, value, note, how, chart }) => h("div", { title: how },
      h("dt", {}, name), h("dd", {}, chart ?? null, value, note ? h("small", {}, note) : null))));
    this.how.lastChild.replaceChildren(...entries.map(({ name, how }) => h("li", {}, h("b", {}, `${name}: `), how)));
  }
}

function verdict(onVerdict) {
  const status = h("span", { role: "status" });
  const box = h("p", { class: "was-right", hidden: true }, h("span", {}, "Is this correct?"));
  const send = async (isCorrect) => {
    buttons.forEach((button) => { button.disabled = true; });
    setText(status, await onVerdict(isCorrect));
  };
  const buttons = [["Yes", true], ["No", false]].map(([name, isCorrect]) => h("button", {
    type: "button", class: "chip", onclick: () => send(isCorrect), title: "Send your verdict to the server, for its calibration statistics",
  }, name));
  box.append(...buttons, status);
  return box;
}
