// How far a request is, and about how long it still takes: from the server's state of it, and earlier requests' seconds.

const STORED = "speed";
const STAGES = ["ar_queue", "prefill", "decode", "dit_queue", "condition", "denoise", "vae", "encode"];
const MIN_DONE = 0.05;

/** Remembers how long the stages of a finished request took for each token, and each megapixel and step. */
export function remember(metadata, images) {
  const { decode, denoise, condition = 0, vae = 0, encode = 0 } = metadata.seconds;
  const pixels = images * megapixels(metadata.width, metadata.height);
  const speed = {
    token: decode / Math.max(1, images * (metadata.tokens.image + (metadata.tokens.preview ?? 0))),
    step: denoise / (pixels * metadata.steps),
    other: (condition + vae + encode) / pixels,
  };
  localStorage.setItem(STORED, JSON.stringify(speed));
}

/** Follows one request from its parameters and its states. */
export class Estimate {
  #speed = JSON.parse(localStorage.getItem(STORED) ?? "null");
  #stage = null;
  #began = { at: 0, done: 0 };
  #last = { at: 0, done: 0 };

  /** Sizes may be unknown (null): then only the current stage is estimated. */
  constructor({ width, height, steps, images }) {
    this.pixels = width && height ? images * megapixels(width, height) : null;
    this.tokens = width && height ? images * Math.ceil(width / 32) * Math.ceil(height / 32) : null;
    this.steps = steps;
  }

  /**
   * Returns the state of the whole request from the answer of `requestStatus`.
   *
   * @param now seconds on any clock.
   * @returns `{stage, done, total, fraction, eta}`; fraction and eta (seconds) are null where they are unknown.
   */
  of(status, now) {
    const requests = (status?.requests ?? []).filter((each) => STAGES.includes(each.stage));
    const current = requests.findLast((each) => ["running", "queued"].includes(each.state)) ?? requests.at(-1);
    if (!current) return { stage: "gateway_queue", done: 0, total: 1, fraction: null, eta: null };
    if (current.stage !== this.#stage) {
      this.#stage = current.stage;
      this.#began = this.#last = { at: now, done: current.done };
    }
    if (current.done > this.#last.done) this.#last = { at: now, done: current.done };
    const eta = this.#eta(current, now);
    const elapsed = current.seconds;
    const fraction = eta === null ? null : Math.min(1, elapsed / Math.max(1e-3, elapsed + eta));
    return { stage: current.stage, done: current.done, total: current.total, fraction, eta };
  }

  #eta(current, now) {
    const stage = STAGES.indexOf(current.stage);
    const decode = STAGES.indexOf("decode");
    const denoise = STAGES.indexOf("denoise");
    const share = current.total ? current.done / current.total : 0;
    const own = this.#remaining(current, now);
    const later = this.#speed && this.pixels;
    const rest = later ? this.#speed.other * this.pixels : 0;
    if (stage > denoise) return later ? rest * (1 - share) : null;
    if (stage === denoise) {
      const known = own ?? (later ? (1 - share) * this.#speed.step * this.steps * this.pixels : null);
      return known === null ? null : known + rest;
    }
    if (!later) return null;
    const rendering = this.#speed.step * this.steps * this.pixels + rest;
    if (stage > decode) return rendering;
    const decoding = this.#speed.token * this.tokens;
    return rendering + (stage === decode ? own ?? decoding * (1 - share) : decoding);
  }

  /** The seconds that are left of the current stage at its speed until now, or null before there is one. */
  #remaining(current, now) {
    const done = this.#last.done - this.#began.done;
    if (!current.total || done / current.total < MIN_DONE) return null;
    const each = (this.#last.at - this.#began.at) / done;
    // An image in progress counts by the time since it began, at most as long as the others.
    return each * (current.total - this.#last.done) - Math.min(each, now - this.#last.at);
  }
}

function megapixels(width, height) {
  return (width * height) / 1e6;
}
