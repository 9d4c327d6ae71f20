/** What the page asks the server for: configuration, readiness, streams, feedback. Knows HTTP and nothing of the view. */

const KEY = "rtap.key";
let keyWithoutStorage = "";

/** The API key of this tab; "" for none. Where the browser forbids storage it lives as long as the page. */
export function getKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return keyWithoutStorage;
  }
}

export function setKey(key) {
  keyWithoutStorage = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // kept above
  }
}

/** Relative to the page, so that it works behind a path prefix too. */
export const urlOf = (path) => new URL(path, document.baseURI).href;

/** A failure in words: a title, what the server said, and what to quote when reporting it. */
export class Problem extends Error {
  constructor({ status = 0, title, message, requestId = "", retryAfter = null }) {
    super(message);
    Object.assign(this, { status, title, requestId, retryAfter });
  }
}

const TITLES = {
  400: "The server refused this request",
  401: "This server wants an API key",
  403: "This is not allowed",
  404: "The server does not have this",
  413: "The question is too long",
  429: "This key’s limit is reached",
  500: "The server failed",
  504: "The server took too long",
};

function titleOf(status, type, message) {
  if (status === 503 && /drain|about to end/i.test(`${type} ${message}`)) return "The server is being stopped";
  if (status === 503 && type === "overloaded_error") return "The server is full";
  if (status === 503) return "The server is not ready";
  return TITLES[status] ?? `The server answered ${status}`;
}

/** A refusal as a Problem; bodies that are not OpenAI's error object (a proxy's page, say) give way to a sentence. */
async function problemOf(response, requestId) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // no JSON
  }
  const message = typeof error.message === "string" ? error.message : "It gave no reason that this page can read.";
  const wait = Number(response.headers.get("retry-after"));
  return new Problem({
    status: response.status,
    title: titleOf(response.status, String(error.type ?? ""), message),
    message,
    requestId: response.headers.get("x-request-id") ?? requestId,
    retryAfter: wait > 0 ? wait : null,
  });
}

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** One request. Its id is ours and sent along, so that there is one to quote even when nothing comes back. */
async function send(path, { body, signal } = {}) {
  const requestId = newId();
  const headers = { "X-Request-Id": requestId };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(urlOf(path), {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "The server cannot be reached", requestId,
      message: "It may be starting, stopped, or the network is down.",
    });
  }
  if (!response.ok) throw await problemOf(response, requestId);
  return { response, requestId: response.headers.get("x-request-id") ?? requestId };
}

export async function fetchConfig() {
  return (await send("v1/rtap/config")).response.json();
}

export async function sendFeedback(id, correct) {
  return (await send("v1/rtap/feedback", { body: { request_id: id, correct } })).response.json();
}

/** "ready"; "unreachable"; else what /ready says of itself: "not ready", "draining", … */
export async function fetchReadiness() {
  try {
    const response = await fetch(urlOf("ready"), { cache: "no-store" });
    if (response.ok) return "ready";
    const { status } = await response.json().catch(() => ({}));
    return typeof status === "string" ? status : "not ready";
  } catch {
    return "unreachable";
  }
}

/** Ask, and give each chunk of the stream to `onChunk(chunk, line)`. Resolves after [DONE]; throws a Problem or, when
 * `signal` aborts, an AbortError: the connection is closed, which is what makes the server stop writing. */
export async function ask(body, { signal, onChunk }) {
  const sent = { ...body, stream: true, stream_options: { include_usage: true } };
  const { response, requestId } = await send("v1/chat/completions", { body: sent, signal });
  const broken = (message) => new Problem({ title: "The answer broke off", message, requestId });
  try {
    for await (const line of dataLines(response.body)) {
      if (line === "[DONE]") return;
      const chunk = JSON.parse(line);
      if (chunk?.error) {
        const message = typeof chunk.error.message === "string" ? chunk.error.message : "The server gave no reason.";
        throw broken(message);
      }
      if (chunk && typeof chunk === "object") onChunk(chunk, line);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
    if (error instanceof SyntaxError) throw broken("The server sent something that is no event of an answer.");
    throw broken("The connection was lost before the answer was complete.");
  }
  throw broken("The server closed the connection before the answer was complete.");
}

/** The `data:` payloads of a stream of server-sent events. Comments and other fields are passed over. */
export async function* dataLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading wants no more of it
  }
}
