/** The page: who talks to whom. State is the controls', the runs' and the server's; this only carries it around. */

import { Problem, ask, fetchConfig, fetchReadiness, getKey, sendFeedback, setKey, urlOf } from "./api.js";
import { Controls } from "./controls.js";
import { byId, confidence, count, h, plural, setText } from "./dom.js";
import { breakOff, cyclesOf, finish, isOver, newRun, sentence, take, tokensOf } from "./run.js";
import { snippet } from "./snippets.js";
import { RunView } from "./view.js";

const READY_EVERY_MS = 15_000;
const WAIT_EVERY_MS = 1_000; // while it is not ready
const STATES = {
  ready: ["ready", "Ready"],
  unreachable: ["down", "Not reachable: starting, or stopped. Trying again…"],
  "not ready": ["waiting", "Not ready: loading, or being stopped. Trying again…"],
  draining: ["waiting", "Being stopped: finishing what it has begun"],
  dead: ["down", "The engine has failed"],
};

const controls = new Controls(drawSnippet);
let views = [];
let stopping = null; // AbortController of what is running
let needsKey = false; // it has refused the one there is, or that there is none
let mustConfigure = true; // its configuration has not been read with this key

// ---------------------------------------------------------------------------------------------------- asking

async function askAll() {
  if (stopping || !controls.config) return;
  const columns = controls.compares
    ? [["single", "One pass"], [controls.recursivePolicy, "Recursive"], ["vote", "Vote"]]
    : [[controls.policy, null]];
  stopping = new AbortController();
  setRunning(true);
  byId("results").classList.toggle("compared", controls.compares);
  announce(columns.length > 1 ? "Asked three ways." : "Asked.");
  const now = performance.now();
  const started = columns.map(([policy, title]) => {
    const run = newRun(controls.asked(policy), now);
    const view = new RunView(run, { title, onVerdict: (isRight) => judge(run, isRight) });
    return { run, view, body: controls.body(policy) };
  });
  views = started.map(({ view }) => view);
  const note = h("p", { class: "note" }, "All three are asked at the same time, so each takes longer than it would alone. The bars compare the tokens that they wrote.");
  byId("results").replaceChildren(...(controls.compares ? [note] : []), h("div", { class: "columns" }, ...views.map((view) => view.element)));
  await Promise.all(started.map((each) => runOne(each, stopping.signal)));
  stopping = null;
  setRunning(false);
  draw();
}

/** Ask for one run and draw it as it goes. Never throws: what goes wrong is shown in its place. */
async function runOne({ run, view, body }, signal) {
  const title = view.isCompared ? `${view.element.getAttribute("aria-label")}: ` : "";
  let judged = 0;
  try {
    await ask(body, {
      signal,
      onChunk(chunk, line) {
        take(run, chunk, performance.now());
        view.keep(line);
        if (run.cycles.size > judged && !view.isCompared) announceCycle(run);
        judged = run.cycles.size;
        drawSoon();
      },
    });
    finish(run, performance.now());
    announce(`${title}Answer: ${run.content || "none"}. ${sentence(run)}`);
  } catch (error) {
    if (error.name === "AbortError") {
      breakOff(run, null, performance.now());
      announce(`${title}${sentence(run)}`);
    } else {
      const problem = error instanceof Problem ? error : new Problem({ title: "This page failed", message: String(error) });
      breakOff(run, problem, performance.now());
      view.element.prepend(problemBox(problem));
      if (problem.status === 401) askForKey();
      watch(); // a refusal may be the first sign of a server that is being stopped
    }
  }
  draw();
}

function announceCycle(run) {
  const last = [...run.cycles.values()].at(-1);
  const score = last.confidence === null ? "" : `, confidence ${confidence(last.confidence)}`;
  announce(`${run.asked.policy === "vote" ? "Sample" : "Cycle"} ${last.index + 1}: ${last.answer ?? "no answer"}${score}.`);
}

let isDrawing = false;

/** At most one drawing a frame, however fast tokens come. */
function drawSoon() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(draw);
}

function draw() {
  isDrawing = false;
  if (views.length > 1) {
    const most = Math.max(...views.map((view) => tokensOf(view.run)));
    const vote = views.find(({ run }) => run.asked.policy === "vote" && run.phase === "done");
    for (const view of views) {
      view.scale(views.some(({ run }) => cyclesOf(run).length) ? most : 0);
      if (vote) view.run.vote = { samples: cyclesOf(vote.run).length, tokens: tokensOf(vote.run) };
    }
  }
  for (const view of views) view.draw();
}

function setRunning(isRunning) {
  const go = byId("go");
  const stop = byId("stop");
  if (!isRunning && document.activeElement === stop) go.focus();
  go.setAttribute("aria-disabled", String(isRunning));
  stop.hidden = !isRunning;
  document.body.classList.toggle("running", isRunning);
}

function stop() {
  stopping?.abort();
}

async function judge(run, isRight) {
  try {
    const { verdicts } = await sendFeedback(run.id, isRight);
    return `Noted: ${plural(verdicts, "verdict")} so far.`;
  } catch (error) {
    return error instanceof Problem ? `Not noted: ${error.message}` : "Not noted.";
  }
}

// ---------------------------------------------------------------------------------------------------- problems

function problemBox(problem) {
  const again = h("button", { type: "button", onclick: () => byId("ask").requestSubmit() }, "Ask again");
  const wait = problem.retryAfter === null ? "" : `The server asks to wait ${plural(Math.ceil(problem.retryAfter), "second")}.`;
  return h("div", { class: "problem", role: "alert" },
    h("h3", {}, problem.title),
    h("p", { class: "model-text" }, problem.message),
    wait ? h("p", {}, wait) : null,
    h("p", { class: "request-id" }, `${problem.status ? `HTTP ${problem.status} · ` : ""}Request id `, h("code", {}, problem.requestId || "none")),
    again);
}

function askForKey() {
  if (!byId("key-dialog").open) {
    byId("key").value = getKey();
    byId("key-dialog").showModal();
  }
}

// ---------------------------------------------------------------------------------------------------- the server

let watching = 0;
let problem = ""; // why a server that is ready cannot be used

/** Show whether the server is ready, and get its configuration as soon as it is. */
async function watch() {
  clearTimeout(watching);
  const state = await fetchReadiness();
  let [kind, words] = STATES[state] ?? ["waiting", `Not ready: ${state}`];
  if (kind === "ready" && mustConfigure) await configure();
  if (kind === "ready" && problem) [kind, words] = ["waiting", problem];
  byId("state").dataset.state = kind;
  setText(byId("state"), kind === "ready" ? readyWords() : words);
  byId("go").disabled = !controls.config || needsKey;
  clearTimeout(watching);
  watching = setTimeout(watch, kind === "ready" || needsKey ? READY_EVERY_MS : WAIT_EVERY_MS);
}

function readyWords() {
  const models = controls.config.models;
  return models.length ? `Ready · ${byId("model").value || models[0]}` : "Ready";
}

/** Read the configuration. What stands against it is kept as `problem`; a refused key is not tried again by itself. */
async function configure() {
  needsKey = false;
  try {
    controls.configure(await fetchConfig());
    mustConfigure = false;
    problem = "";
  } catch (error) {
    needsKey = error.status === 401;
    mustConfigure = !needsKey;
    problem = needsKey ? keyWords() : error instanceof Problem ? error.title : "Its configuration cannot be read";
    if (needsKey) askForKey();
  }
}

const keyWords = () => (getKey() ? "This API key is not known here" : "An API key is needed");

function useKey(key) {
  setKey(key);
  mustConfigure = true;
  byId("key-dialog").close();
  watch();
}

// ---------------------------------------------------------------------------------------------------- code and theme

function drawSnippet() {
  if (!controls.config || !byId("code").open) return;
  const language = document.querySelector("input[name=language]:checked").value;
  const policy = controls.compares ? controls.recursivePolicy : controls.policy;
  setText(byId("snippet"), snippet(language, controls.body(policy), urlOf("v1/"), { withKey: Boolean(getKey()) }));
}

async function copySnippet() {
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    tell("Copied");
  } catch {
    getSelection().selectAllChildren(byId("snippet")); // no clipboard without HTTPS
    tell("Selected: copy it with your keyboard");
  }

  function tell(words) {
    setText(byId("copy"), words);
    announce(words);
    setTimeout(() => setText(byId("copy"), "Copy"), 2000);
  }
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  setText(byId("theme-button"), `Theme: ${theme}`);
  try {
    localStorage.setItem("rtap.theme", theme);
  } catch {
    // then it is this page's alone
  }
}

function storedTheme() {
  try {
    const theme = localStorage.getItem("rtap.theme");
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto";
  }
}

function announce(words) {
  setText(byId("announcer"), words);
}

// ---------------------------------------------------------------------------------------------------- wiring

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askAll();
});
byId("stop").addEventListener("click", stop);
byId("mode").addEventListener("change", () => controls.refresh());
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("key-dialog").open) stop();
});
byId("code").addEventListener("toggle", drawSnippet);
byId("languages").addEventListener("change", drawSnippet);
byId("copy").addEventListener("click", copySnippet);
byId("theme-button").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
byId("key-button").addEventListener("click", askForKey);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-forget").addEventListener("click", () => useKey(""));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
});
setTheme(storedTheme());
watch();
