// A request from its start to its images: sends it, follows it, and sends it again when the server was away.

import { PROGRESS, RequestError, fileOf, imageEvents, newRequestId } from "./api.js";
import { Progress } from "./progress.js";
import { text } from "./i18n.js";

const MAX_TRIES = 4;
const SHOW_MS = 500;
const RETRY_MS = 1_500;
const WHOLE = /^[+-]?\d+$/;

/**
 * Runs a request and returns its run, without an id, as the history keeps it.
 *
 * @param options fields of the API.
 * @param sources files of source images.
 * @param connection waits for the server.
 * @param result shows progress and intermediate images.
 * @param signal cancels the request.
 * @throws {RequestError}, or the signal's AbortError.
 */
export async function run(options, sources, connection, result, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await attempt(options, sources, result, signal);
    } catch (error) {
      if (!(error instanceof RequestError && error.isServerAway) || tries === MAX_TRIES) throw error;
      result.start(options.prompt, sizeOf(options));
      result.showProgress({ stage: "waitingForServer", fraction: null, eta: null }, 0);
      await pause(RETRY_MS, signal);
      await connection.whenReady(signal);
    }
  }
}

async function attempt(options, sources, result, signal) {
  const started = performance.now();
  const elapsed = () => (performance.now() - started) / 1000;
  const requestId = newRequestId();
  result.start(options.prompt, sizeOf(options));
  const progress = new Progress();
  const timer = setInterval(() => result.showProgress(progress.at(elapsed()), elapsed()), SHOW_MS);
  const images = [];
  try {
    for await (const event of imageEvents(options, sources, requestId, signal)) {
      if (event.type === PROGRESS) {
        progress.report(event, elapsed());
        result.showProgress(progress.at(elapsed()), elapsed());
      }
      if (event.type.endsWith("partial_image")) result.showPartial(event.b64_json, event.output_format);
      if (event.type.endsWith("completed")) images.push(imageOf(event, options));
    }
  } finally {
    clearInterval(timer);
  }
  if (images.length === 0) throw new RequestError({ message: text("streamBroken"), code: "connection" });
  return { created: Date.now(), options, sources, images, seconds: elapsed() };
}

function imageOf(event, options) {
  const [width, height] = event.size.split("x").map(Number);
  // JSON's numbers lose the last digits of a seed beyond 53 bits; one that was asked for is known exactly.
  const seed = WHOLE.test(options.seed) ? folded(BigInt(options.seed) + BigInt(event.index)) : event.seeds[0];
  return { file: fileOf(event.b64_json, event.output_format), seed: String(seed), width, height };
}

function folded(seed) {
  return seed < 2n ** 64n ? seed : seed - 2n ** 64n;
}

/** Returns the sides that are asked for, or null where the server chooses them. */
function sizeOf(options) {
  const sides = options.size.split("x").map(Number);
  return sides.length === 2 && sides.every((side) => side > 0) ? sides : null;
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
