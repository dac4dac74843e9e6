// Requests to the gateway: its state, streams of images, and the progress of a request.

const KEY = "apiKey";
const PARTIAL_IMAGES = 3;
const PROGRESS_COMMENT = ": progress ";

/** The type of a report of progress, which a stream has in its comments. */
export const PROGRESS = "progress";

/** An error of a request: the server's sentence, its code and the field that it is about; or code `connection`. */
export class RequestError extends Error {
  constructor({ message, code, param = null }, status = 0) {
    super(message);
    this.code = code;
    this.param = param;
    this.status = status;
  }

  /** Whether the server is away for now, so that the request may be sent again when it is back. */
  get isServerAway() {
    return this.code === "connection" || this.code === "server_unavailable";
  }

  get needsKey() {
    return this.status === 401;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Returns an id for a request; `crypto.randomUUID` is missing on pages without TLS. */
export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "page-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Returns the gateway's `{ready, defaults, needs_key}`, or null if it does not answer. */
export async function serverState() {
  try {
    const response = await fetch("/page/state", { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

/**
 * Sends a request and yields its events: intermediate images and images, as the API names them, and `PROGRESS`.
 *
 * @param options fields of the API, without source images.
 * @param sources the source images, as files; with any the request is an edit.
 * @param requestId the request's id.
 * @param signal closes the connection, which cancels the request.
 * @throws {RequestError}
 */
export async function* imageEvents(options, sources, requestId, signal) {
  const fields = { ...options, stream: true, partial_images: PARTIAL_IMAGES };
  const headers = { ...authorization(), "x-request-id": requestId };
  const response = await connected(() =>
    sources.length
      ? fetch("/v1/images/edits", { method: "POST", headers, body: formOf(fields, sources), signal })
      : fetch("/v1/images/generations", {
          method: "POST",
          headers: { ...headers, "content-type": "application/json" },
          body: JSON.stringify(fields),
          signal,
        }),
  );
  if (!response.ok) throw await errorOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = new EventSplitter();
  for (;;) {
    const { done, value } = await connected(() => reader.read());
    if (done) return;
    for (const event of events.add(value)) {
      if (event.error) throw new RequestError(event.error);
      yield event;
    }
  }
}

/** Splits the text of a stream of Server-Sent Events into their data, and reports of progress. */
export class EventSplitter {
  #pieces = [];

  /** Returns the data of the events that `text` completes. */
  add(text) {
    // An event of several megabytes comes in many pieces: each is searched once.
    const last = this.#pieces.at(-1);
    const isSplitEnd = last?.endsWith("\n") && text.startsWith("\n");
    this.#pieces.push(text);
    if (!isSplitEnd && !text.includes("\n\n")) return [];
    const parts = this.#pieces.join("").split("\n\n");
    this.#pieces = [parts.pop()];
    return parts.map(dataOf).filter((data) => data !== null);
  }
}

function dataOf(event) {
  if (event.startsWith(PROGRESS_COMMENT)) return { type: PROGRESS, ...JSON.parse(event.slice(PROGRESS_COMMENT.length)) };
  const line = event.split("\n").find((each) => each.startsWith("data: "));
  return line === undefined ? null : JSON.parse(line.slice(6));
}

/** Returns the file of base64. */
export function fileOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

function authorization() {
  return key.get() ? { authorization: `Bearer ${key.get()}` } : {};
}

function formOf(fields, sources) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  sources.forEach((source, index) => form.append("image[]", source, `source-${index}`));
  return form;
}

async function connected(call) {
  try {
    return await call();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError({ message: error.message, code: "connection" });
  }
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new RequestError(error, response.status);
  } catch {
    return new RequestError({ message: `${response.status} ${response.statusText}`, code: "unknown" }, response.status);
  }
}
