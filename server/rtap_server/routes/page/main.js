/** Entry point of the page: connects controls, runs and the server. */

import { Problem, ask, fetchConfig, fetchReadiness, getKey, sendFeedback, setKey, urlOf } from "./api.js";
import { Controls } from "./controls.js";
import { byId, confidence, count, h, plural, setText } from "./dom.js";
import { addChunk, cyclesOf, finish, interrupt, newRun, sentence, tokensOf } from "./run.js";
import { snippet } from "./snippets.js";
import { RunView } from "./view.js";

const READY_EVERY_MS = 15_000;
const WAIT_EVERY_MS = 1_000; // while the server is not ready
const STATES = {
  ready: ["ready", "Ready"],
  unreachable: ["down", "Not reachable: starting or stopped. Retrying…"],
  "not ready": ["waiting", "Not ready: loading or shutting down. Retrying…"],
  draining: ["waiting", "Shutting down: finishing running requests"],
  dead: ["down", "The engine has failed"],
};

const controls = new Controls(drawSnippet);
let views = [];
let abortController = null; // of the requests in progress
let needsKey = false; // the server refused the current key or a request without one
let mustConfigure = true; // the configuration has not been read with the current key

// ---------------------------------------------------------------------------------------------------- asking

async function askAll() {
  if (abortController || !controls.config) return;
  const columns = controls.compares
    ? [["single", "One pass"], [controls.recursivePolicy, "Recursive"], ["vote", "Vote"]]
    : [[controls.policy, null]];
  abortController = new AbortController();
  setRunning(true);
  byId("results").classList.toggle("compared", controls.compares);
  announce(columns.length > 1 ? "Asked three ways." : "Asked.");
  const now = performance.now();
  const started = columns.map(([policy, title]) => {
    const run = newRun(controls.settings(policy), now);
    const view = new RunView(run, { title, onVerdict: (isCorrect) => sendVerdict(run, isCorrect) });
    return { run, view, body: controls.body(policy) };
  });
  views = started.map(({ view }) => view);
  const note = h("p", { class: "note" }, "All three run at the same time, so each takes longer than alone. The bars compare the generated tokens.");
  byId("results").replaceChildren(...(controls.compares ? [note] : []), h("div", { class: "columns" }, ...views.map((view) => view.element)));
  await Promise.all(started.map((each) => runOne(each, abortController.signal)));
  abortController = null;
  setRunning(false);
  draw();
}

/** Send one request and draw the run while it streams. Errors are shown, not thrown. */
async function runOne({ run, view, body }, signal) {
  const title = view.isCompared ? `${view.element.getAttribute("aria-label")}: ` : "";
  let announced = 0;
  try {
    await ask(body, {
      signal,
      onChunk(chunk, line) {
        addChunk(run, chunk, performance.now());
        view.addRawEvent(line);
        if (run.cycles.size > announced && !view.isCompared) announceCycle(run);
        announced = run.cycles.size;
        drawSoon();
      },
    });
    finish(run, performance.now());
    announce(`${title}Answer: ${run.content || "none"}. ${sentence(run)}`);
  } catch (error) {
    if (error.name === "AbortError") {
      interrupt(run, null, performance.now());
      announce(`${title}${sentence(run)}`);
    } else {
      const problem = error instanceof Problem ? error : new Problem({ title: "This page failed", message: String(error) });
      interrupt(run, problem, performance.now());
      view.element.prepend(problemBox(problem));
      if (problem.status === 401) askForKey();
      watch(); // an error may be the first sign of a server that shuts down
    }
  }
  draw();
}

function announceCycle(run) {
  const last = [...run.cycles.values()].at(-1);
  const score = last.confidence === null ? "" : `, confidence ${confidence(last.confidence)}`;
  announce(`${run.settings.policy === "vote" ? "Sample" : "Cycle"} ${last.index + 1}: ${last.answer ?? "no answer"}${score}.`);
}

let isDrawing = false;

/** Draw at most once per frame. */
function drawSoon() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(draw);
}

function draw() {
  isDrawing = false;
  if (views.length > 1) {
    const most = Math.max(...views.map((view) => tokensOf(view.run)));
    const vote = views.find(({ run }) => run.settings.policy === "vote" && run.phase === "done");
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
  abortController?.abort();
}

async function sendVerdict(run, isCorrect) {
  try {
    const { verdicts } = await sendFeedback(run.id, isCorrect);
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
let problem = ""; // why a ready server cannot be used

/** Poll the readiness of the server, show it, and read the configuration when it is ready. */
async function watch() {
  clearTimeout(watching);
  const state = await fetchReadiness();
  let [kind, text] = STATES[state] ?? ["waiting", `Not ready: ${state}`];
  if (kind === "ready" && mustConfigure) await configure();
  if (kind === "ready" && problem) [kind, text] = ["waiting", problem];
  byId("state").dataset.state = kind;
  setText(byId("state"), kind === "ready" ? readyText() : text);
  byId("go").disabled = !controls.config || needsKey;
  clearTimeout(watching);
  watching = setTimeout(watch, kind === "ready" || needsKey ? READY_EVERY_MS : WAIT_EVERY_MS);
}

function readyText() {
  const models = controls.config.models;
  return models.length ? `Ready · ${byId("model").value || models[0]}` : "Ready";
}

/** Read the configuration. A refused key is not tried again. */
async function configure() {
  needsKey = false;
  try {
    controls.configure(await fetchConfig());
    mustConfigure = false;
    problem = "";
  } catch (error) {
    needsKey = error.status === 401;
    mustConfigure = !needsKey;
    problem = needsKey ? keyProblem() : error instanceof Problem ? error.title : "The configuration cannot be read";
    if (needsKey) askForKey();
  }
}

const keyProblem = () => (getKey() ? "This API key is not valid here" : "An API key is required");

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
    showResult("Copied");
  } catch {
    getSelection().selectAllChildren(byId("snippet")); // browsers offer the clipboard over HTTPS only
    showResult("Selected: copy it with your keyboard");
  }

  function showResult(text) {
    setText(byId("copy"), text);
    announce(text);
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
    // storage is forbidden: the theme is lost on reload
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

function announce(text) {
  setText(byId("announcer"), text);
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
