/** Figures of a run: tokens, times, confidence and savings, each with an explanation. */

import { confidence, count, plural, seconds } from "./dom.js";
import { cyclesOf, isVote, savings, tokensOf } from "./run.js";

/** List the figures as {name, value, note, how, chart}. */
export function figuresOf(run) {
  if (run.firstTokenAt === null) return [];
  const scored = cyclesOf(run).filter((cycle) => cycle.confidence !== null);
  const scores = scored.map((cycle) => cycle.confidence);
  const reasoning = run.usage?.completion_tokens_details?.reasoning_tokens;
  const read = run.rtap?.confidence_tokens;
  const discarded = run.rtap?.discarded_tokens;
  const found = [{
    name: "Tokens generated", value: count(tokensOf(run)), note: reasoning >= 0 ? `${count(reasoning)} thinking` : "",
    how: `Tokens of all ${isVote(run) ? "samples" : "cycles"}. Thinking is everything except the returned answer.`
      + `${read > 0 ? ` The confidence generator read ${count(read)}.` : ""}${discarded > 0 ? ` ${count(discarded)} more were discarded.` : ""}`,
  }];
  const at = (time) => (time === null ? null : (time - run.startedAt) / 1000);
  found.push({ name: "Time to first token", value: seconds(at(run.firstTokenAt)), how: "From sending the request to the first text received." });
  if (run.rtap) {
    found.push({
      name: "Time to first answer", value: seconds(run.rtap.first_answer_seconds),
      how: "From the start of the request to the first complete answer, measured by the server.",
    });
  }
  found.push({ name: "Total time", value: seconds(at(run.endedAt)), how: "From sending the request to the end of the stream, measured by this page." });
  if (!isVote(run) && scores.length > 1) {
    const accepted = scored.findIndex((cycle) => cycle.accepted);
    const returned = accepted < 0 ? scores.length - 1 : accepted;
    found.push({
      name: "Confidence", value: `${confidence(scores[0])}\u00a0→\u00a0${confidence(scores[returned])}`, chart: sparkline(scores, returned, run.settings),
      how: "Confidence of the first cycle and of the returned answer. The dot is the returned answer, the dashed line the threshold.",
    });
  }
  for (const { of, saved, share, note, how } of savings(run)) {
    const percent = `${note === "estimate" ? "≈\u00a0" : ""}${Math.round(share * 100)}\u00a0%`;
    found.push({
      name: `Saved ${of}`, value: percent, note: `${plural(saved, "token")}, ${note}`, how,
    });
  }
  return found;
}

const SVG = "http://www.w3.org/2000/svg";

/** Draw the confidence of each cycle, a dot at the returned one, and the threshold. */
function sparkline(scores, returned, { policy, threshold }) {
  const draw = (name, attributes) => {
    const shape = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    return shape;
  };
  const y = (value) => (18 - 16 * Math.min(1, Math.max(0, value))).toFixed(1);
  const points = scores.map((value, i) => `${(2 + (68 * i) / (scores.length - 1)).toFixed(1)},${y(value)}`);
  const chart = draw("svg", { class: "sparkline", viewBox: "0 0 72 20", width: "72", height: "20", "aria-hidden": "true" });
  if (policy === "confidence") chart.append(draw("line", { class: "limit", x1: "0", x2: "72", y1: y(threshold), y2: y(threshold) }));
  const [x, last] = points[returned].split(",");
  chart.append(draw("polyline", { points: points.join(" ") }), draw("circle", { cx: x, cy: last, r: "2" }));
  return chart;
}
