/** HTTP requests of the page: configuration, readiness, streams, feedback. */

const KEY = "rtap.key";
let keyWithoutStorage = "";

/** Return the API key of this tab, or "". If the browser forbids storage, the key is lost on reload. */
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
    // keyWithoutStorage has it
  }
}

/** Resolve a path relative to the page, so that a path prefix of a proxy works. */
export const urlOf = (path) => new URL(path, document.baseURI).href;

/** An error to show: title, message, status and request id. */
export class Problem extends Error {
  constructor({ status = 0, title, message, requestId = "", retryAfter = null }) {
    super(message);
    Object.assign(this, { status, title, requestId, retryAfter });
  }
}

const TITLES = {
  400: "The server refused this request",
  401: "An API key is required",
  403: "Not allowed",
  404: "Not found on this server",
  413: "The question is too long",
  429: "This key’s limit is reached",
  500: "The server failed",
  504: "The server took too long",
};

function titleOf(status, type, message) {
  if (status === 503 && /drain|shutting down/i.test(`${type} ${message}`)) return "The server is shutting down";
  if (status === 503 && type === "overloaded_error") return "The server is full";
  if (status === 503) return "The server is not ready";
  return TITLES[status] ?? `The server answered ${status}`;
}

/** Turn an error response into a Problem. The body may be something else than OpenAI's error object. */
async function problemOf(response, requestId) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not JSON, such as the error page of a proxy
  }
  const message = typeof error.message === "string" ? error.message : "The server gave no reason.";
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

/** Send one request. The page chooses the request id, so that an error without a reply has one too. */
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
      message: "It may be starting or stopped, or the network is down.",
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

/** Return "ready", "unreachable", or the status in the body of /ready: "not ready", "draining", … */
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

/** Send a question and call `onChunk(chunk, line)` for each chunk. Resolves after [DONE].
 * Throws a Problem or, when `signal` aborts, an AbortError. The closed connection makes the server abort. */
export async function ask(body, { signal, onChunk }) {
  const rtap = { ...body.rtap, drafts: true };
  const request = { ...body, rtap, stream: true, stream_options: { include_usage: true } };
  const { response, requestId } = await send("v1/chat/completions", { body: request, signal });
  const interrupted = (message) => new Problem({ title: "The answer was interrupted", message, requestId });
  try {
    for await (const line of dataLines(response.body)) {
      if (line === "[DONE]") return;
      const chunk = JSON.parse(line);
      if (chunk?.error) {
        const message = typeof chunk.error.message === "string" ? chunk.error.message : "The server gave no reason.";
        throw interrupted(message);
      }
      if (chunk && typeof chunk === "object") onChunk(chunk, line);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
    if (error instanceof SyntaxError) throw interrupted("The server sent an invalid event.");
    throw interrupted("The connection was lost before the answer was complete.");
  }
  throw interrupted("The server closed the connection before the answer was complete.");
}

/** Yield the `data:` payloads of server-sent events. Comments and other fields are skipped. */
export async function* dataLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let incomplete = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (incomplete + value).split("\n");
      incomplete = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
