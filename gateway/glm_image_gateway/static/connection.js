// The connection to the server: asks for its state again and again, more often while it is not ready.

import { serverState } from "./api.js";

const READY_MS = 15_000;
const AWAY_MS = 1_500;

/** States: `connecting`, `ready`, `notReady` (the gateway answers, the server does not), `unreachable`. */
export class Connection {
  state = "connecting";
  needsKey = false;
  #waiting = [];
  #timer = 0;
  #check = null;

  /** `onChange(state, answer)` is called after each answer; `answer` as the gateway has it, or null. */
  constructor(onChange) {
    this.onChange = onChange;
    addEventListener("online", () => this.check());
  }

  /** Asks now. */
  check() {
    this.#check ??= this.#ask().finally(() => (this.#check = null));
    return this.#check;
  }

  /** Waits until the server is ready. */
  async whenReady(signal) {
    await this.check();
    if (this.state === "ready") return;
    await new Promise((resolve, reject) => {
      this.#waiting.push(resolve);
      signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
  }

  async #ask() {
    clearTimeout(this.#timer);
    const answer = await serverState();
    if (answer) this.needsKey = answer.needs_key;
    this.state = answer === null ? "unreachable" : answer.ready ? "ready" : "notReady";
    this.#timer = setTimeout(() => this.check(), this.state === "ready" ? READY_MS : AWAY_MS);
    this.onChange(this.state, answer);
    if (this.state === "ready") for (const resolve of this.#waiting.splice(0)) resolve();
  }
}
