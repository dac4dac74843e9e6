// How far a request is, and about how long it still takes: the server's latest estimate, counted down.

const HELD_SECONDS = 2; // the gateway sends the first report within this time after the server has the request

/** Follows one request from the progress that its stream reports. */
export class Progress {
  #latest = { stage: "sent", done: 0, total: 1, eta_seconds: null };
  #at = 0;

  /** Takes a report; one without an estimate keeps that of the same stage. `now` is in seconds on any clock. */
  report(state, now) {
    const eta = state.eta_seconds ?? (state.stage === this.#latest.stage ? this.#left(now) : null);
    this.#latest = { ...state, eta_seconds: eta };
    this.#at = now;
  }

  /**
   * Returns the state at `now`, for a request that was sent at 0.
   *
   * @returns `{stage, done, total, fraction, eta}`; fraction and eta (seconds) are null where they are unknown.
   */
  at(now) {
    const { done, total } = this.#latest;
    const isWaiting = this.#latest.stage === "sent" && now >= HELD_SECONDS;
    const stage = isWaiting ? "gateway_queue" : this.#latest.stage;
    const eta = this.#left(now);
    return { stage, done, total, fraction: eta === null ? null : now / Math.max(1e-3, now + eta), eta };
  }

  #left(now) {
    const eta = this.#latest.eta_seconds;
    return eta === null ? null : Math.max(0, eta - (now - this.#at));
  }
}
