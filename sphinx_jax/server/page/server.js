/** The server's interface: readiness, the model's card, and a streamed answer. Errors are its own sentences. */

import { events } from "./events.js";

const KEY = "sphinx-jax.key";

/** A request that failed: `status` is 0 if the server did not answer, 200 if the stream ended in an error. */
class RequestError extends Error {
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The key is kept in the tab's session storage, and nowhere else. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server does not answer; check that it runs, then try again.", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return new RequestError(message, response.status, body?.error?.param ?? null);
}

/** {status, progress}: "ready", what /health says while it is not, or "unreachable". */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    if (response.ok) return { status: "ready" };
    const body = await response.json().catch(() => ({}));
    return { status: body.status ?? "failed", progress: body.progress ?? "" };
  } catch {
    return { status: "unreachable" };
  }
}

/** The card of the model that is served. Raises RequestError, of status 401 if it needs a key. */
export async function modelCard() {
  const { data } = await (await send("v1/models")).json();
  return data[0];
}

/**
 * Stream an answer; `onText(delta)` is called with each piece. Returns {finish, usage, firstToken, seconds}: times in
 * seconds, `firstToken` from the request to the first text, `seconds` from there to the last.
 *
 * Raises RequestError on an error, also in the middle, and AbortError when `signal` stops it.
 */
export async function streamAnswer(request, signal, onText) {
  const begin = performance.now();
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const result = { finish: null, usage: null, firstToken: null, seconds: 0 };
  let first = null;
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestError(chunk.error.message, 200);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      first ??= performance.now();
      result.firstToken = (first - begin) / 1000;
      result.seconds = (performance.now() - first) / 1000;
      onText(choice.delta.content);
    }
    result.finish = choice?.finish_reason ?? result.finish;
    result.usage = chunk.usage ?? result.usage;
  }
  if (result.finish === null) throw new RequestError("The connection ended before the answer was complete.", 200);
  return result;
}

async function* readEvents(body) {
  try {
    yield* events(body);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The connection broke before the answer was complete.", 200);
  }
}
