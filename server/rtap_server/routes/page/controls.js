/** Settings: presets, limits from the server's configuration, and the request body.
 * A request contains only values that differ from the server's defaults. */

import { byId, confidence, count, h, isNumber, isText, plural, setText } from "./dom.js";

const POLICIES = ["confidence", "model", "single", "vote"];

// Example questions: in the phrasing of the bundled models, and for all other models.
const BUNDLED_EXAMPLES = [
  ["Countdown", "make 82 from 3, 7, 25"],
  ["Countdown, harder", "Make 264 with 24, 14, 25."],
  ["Arithmetic", "What is 39 * 34 + 77?"],
];
const EXAMPLES = [
  ["Countdown", "Using each of the numbers 3, 7 and 25 at most once, with + - * / and brackets, write an expression that equals 82."],
  ["Arithmetic", "What is 39 * 34 + 77?"],
  ["Knights and knaves", "Knights always tell the truth, knaves always lie. A says: B lies. B says: A and C are of the same kind. C says: A tells the truth. Who is what?"],
];

export class Controls {
  /** `onChange` is called after every change by the user or a preset. */
  constructor(onChange) {
    this.config = null;
    this.onChange = onChange;
    byId("settings").open = matchMedia("(min-width: 60rem)").matches;
    for (const kind of ["input", "change"]) {
      byId("settings").addEventListener(kind, () => this.refresh());
    }
    byId("question").addEventListener("input", () => this.refresh());
  }

  /** Apply the server's configuration. Settings that the user has made are kept. */
  configure(config) {
    const isFirst = this.config === null;
    this.config = readConfig(config);
    const { limits, models } = this.config;
    byId("max_cycles").max = limits.max_cycles;
    byId("samples").max = limits.samples;
    byId("deadline_seconds").max = limits.deadline_seconds;
    byId("model").replaceChildren(...models.map((name) => h("option", { value: name }, name)));
    policyInput("confidence").disabled = !this.config.scores;
    byId("starts").replaceChildren(...this.starts().map(([name, title, values]) => {
      const set = () => this.set(values);
      return h("button", { type: "button", class: "chip", title, onclick: set }, name);
    }));
    const isBundled = models.includes("rtap");
    byId("examples").replaceChildren(...(isBundled ? BUNDLED_EXAMPLES : EXAMPLES).map(([name, question]) => {
      const set = () => this.ask(question);
      return h("button", { type: "button", class: "chip", title: question, onclick: set }, name);
    }));
    setText(byId("hint"), isBundled
      ? "The bundled models can only solve puzzles of these kinds." : "");
    setText(byId("ceilings"), `This server allows ${plural(limits.max_cycles, "cycle")}, ${plural(limits.samples, "sample")} and `
      + `${count(limits.deadline_seconds)} s per request. Confidence: ${this.config.kind}. rtap ${this.config.version}.`);
    byId("settings-pane").hidden = false;
    if (isFirst) this.set(this.config.defaults);
    if (isFirst && !byId("question").value) byId("question").value = (isBundled ? BUNDLED_EXAMPLES : EXAMPLES)[0][1];
    this.refresh();
  }

  /** List the presets as [name, explanation, values]. */
  starts() {
    const { defaults, limits, scores } = this.config;
    const recursive = scores ? "confidence" : "model";
    const careful = { policy: recursive, threshold: 1 - (1 - defaults.threshold) / 2, max_cycles: Math.min(2 * defaults.max_cycles, limits.max_cycles) };
    return [
      ["Server’s defaults", "The settings of a request without options", defaults],
      ["Quick", "Two cycles at most", { policy: recursive, max_cycles: Math.min(2, limits.max_cycles) }],
      ["Careful", "Twice the cycles, and a threshold halfway between the server’s and 1", careful],
      ["As in the paper", "The model decides when to stop, and its last answer is returned", { policy: "model" }],
    ].map(([name, title, values]) => [name, title, { ...defaults, ...values }]);
  }

  set(values) {
    for (const name of ["threshold", "max_cycles", "samples"]) byId(name).value = values[name];
    for (const name of ["deadline_seconds", "patience"]) byId(name).value = values[name] ?? "";
    policyInput(values.policy).checked = true;
    byId("select").value = "";
    this.refresh();
  }

  ask(question) {
    byId("question").value = question;
    byId("question").focus();
    this.refresh();
  }

  get compares() {
    return document.querySelector("input[name=mode]:checked").value === "compare";
  }

  get policy() {
    return document.querySelector("input[name=policy]:checked")?.value ?? "confidence";
  }

  /** Update the values next to the sliders, and hide the sliders that the policy does not use. */
  refresh() {
    if (!this.config) return;
    const threshold = confidence(this.threshold);
    setText(byId("threshold-shown"), threshold);
    setText(byId("max_cycles-shown"), byId("max_cycles").value);
    setText(byId("samples-shown"), byId("samples").value);
    byId("threshold").setAttribute("aria-valuetext", threshold);
    document.body.classList.toggle("compares", this.compares);
    const used = this.compares ? ["compare", this.recursivePolicy] : [this.policy];
    for (const slider of document.querySelectorAll(".slider")) {
      slider.hidden = !slider.dataset.for.split(" ").some((name) => used.includes(name));
    }
    this.onChange();
  }

  /** Policy of the column "Recursive" in a comparison. */
  get recursivePolicy() {
    if (this.policy === "confidence" || this.policy === "model") return this.policy;
    return this.config.scores ? "confidence" : "model";
  }

  /** The slider is quantised: near the server's threshold, return that exactly. */
  get threshold() {
    const shown = Number(byId("threshold").value);
    const { threshold } = this.config.defaults;
    return Math.abs(shown - threshold) < 0.005 ? threshold : shown;
  }

  /** Return the settings of a run. */
  settings(policy = this.policy) {
    const number = (name) => Number(byId(name).value);
    return { policy, threshold: this.threshold, max_cycles: policy === "single" ? 1 : number("max_cycles"), samples: number("samples") };
  }

  /** Return the request body without values that are the server's default. */
  body(policy = this.policy) {
    const { defaults } = this.config;
    const rtap = {};
    const option = (name, value) => {
      if (value !== defaults[name]) rtap[name] = value;
    };
    const given = (name) => (byId(name).value === "" ? null : byId(name).valueAsNumber);
    option("policy", policy);
    if (policy === "confidence") option("threshold", this.threshold);
    if (policy === "confidence" || policy === "model") option("max_cycles", Number(byId("max_cycles").value));
    if (policy === "vote") option("samples", Number(byId("samples").value));
    if (byId("select").value) rtap.select = byId("select").value;
    for (const name of ["patience", "deadline_seconds"]) if (given(name) !== null) option(name, given(name));
    const body = { model: byId("model").value, messages: [{ role: "user", content: byId("question").value }] };
    for (const name of ["max_tokens", "temperature", "seed"]) if (given(name) !== null) body[name] = given(name);
    return { ...body, rtap: { ...rtap, return_cycles: true } };
  }
}

function policyInput(policy) {
  return document.querySelector(`input[name=policy][value=${POLICIES.includes(policy) ? policy : "confidence"}]`);
}

/** Validate a configuration and fill in missing values. */
function readConfig(raw) {
  const { defaults = {}, limits = {}, confidence: generator = {} } = raw ?? {};
  const number = (value, fallback) => (isNumber(value) && value > 0 ? value : fallback);
  const kind = isText(generator.kind) ? generator.kind : "none";
  return {
    version: isText(raw?.version) ? raw.version : "",
    models: Array.isArray(raw?.models) ? raw.models.filter(isText) : [],
    kind,
    scores: kind !== "none",
    defaults: {
      policy: POLICIES.includes(defaults.policy) ? defaults.policy : "model",
      threshold: isNumber(defaults.threshold) ? defaults.threshold : 0.5,
      max_cycles: number(defaults.max_cycles, 8),
      samples: number(defaults.samples, 8),
      patience: defaults.patience ?? null,
      deadline_seconds: defaults.deadline_seconds ?? null,
    },
    limits: {
      max_cycles: number(limits.max_cycles, 1),
      samples: number(limits.samples, 1),
      deadline_seconds: number(limits.deadline_seconds, 600),
    },
  };
}
