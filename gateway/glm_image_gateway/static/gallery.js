// The history on the page: a thumbnail for each run of this browser.

import { byId, make, showFile } from "./elements.js";
import { allRuns, clearRuns, deleteRuns } from "./history.js";
import { text } from "./i18n.js";

const MAX_LABEL = 80;

/** The list; `onShow` is called with a run that the user chooses. */
export class Gallery {
  runs = [];

  constructor(onShow) {
    this.onShow = onShow;
    byId("history-clear").addEventListener("click", () => this.#clear());
  }

  /** Reads the history and writes the list. */
  async load() {
    this.runs = await allRuns();
    this.render();
  }

  /** Writes the list; again after a change of the language. */
  render() {
    byId("history").hidden = !this.runs.length;
    byId("history-list").replaceChildren(...this.runs.map((run) => this.#item(run)));
  }

  #item(run) {
    const label = [...run.options.prompt].slice(0, MAX_LABEL).join("");
    const image = make("img", { alt: "", loading: "lazy" });
    showFile(image, run.images[0].file);
    const show = make("button", { type: "button", className: "show", title: label, ariaLabel: text("showAgain", label) }, image);
    if (run.images.length > 1) show.append(make("span", { className: "badge", ariaHidden: "true" }, String(run.images.length)));
    show.addEventListener("click", () => this.onShow(run));
    const remove = make("button", { type: "button", className: "remove", ariaLabel: text("deleteEntry", label), title: text("delete") }, "×");
    remove.addEventListener("click", () => this.#delete(run));
    return make("li", {}, show, remove);
  }

  async #delete(run) {
    const index = this.runs.indexOf(run);
    await deleteRuns([run]);
    await this.load();
    const buttons = byId("history-list").querySelectorAll(".remove");
    (buttons[Math.min(index, buttons.length - 1)] ?? byId("prompt")).focus();
  }

  async #clear() {
    if (!confirm(text("clearQuestion"))) return;
    await clearRuns();
    await this.load();
    byId("prompt").focus();
  }
}
