// The source images of an edit: chosen, dropped anywhere on the page, or pasted.

import { byId, make, showFile } from "./elements.js";
import { text } from "./i18n.js";

const MAX_SOURCES = 4;
const TYPES = ["image/png", "image/jpeg", "image/webp"];

/** The chosen files; `onChange` is called after each change, `onRefused` with a sentence about a file that is not taken. */
export class Sources {
  files = [];

  constructor(onChange, onRefused) {
    this.onChange = onChange;
    this.onRefused = onRefused;
    this.list = byId("sources");
    this.input = byId("files");
    this.input.addEventListener("change", () => {
      this.add([...this.input.files]);
      this.input.value = "";
    });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
    this.#acceptDrops();
  }

  /** Adds files; those that are no images, and those above the limit, are refused. */
  add(files) {
    const images = files.filter((file) => TYPES.includes(file.type));
    const other = files.find((file) => !TYPES.includes(file.type));
    if (other) this.onRefused(text("sourceInvalid", other.name));
    if (this.files.length + images.length > MAX_SOURCES) this.onRefused(text("sourcesTooMany", MAX_SOURCES));
    this.set([...this.files, ...images].slice(0, MAX_SOURCES));
  }

  /** Replaces all files. */
  set(files) {
    this.files = [...files];
    this.render();
    this.onChange();
  }

  /** Writes the list; again after a change of the language. */
  render() {
    this.list.hidden = !this.files.length;
    this.list.replaceChildren(...this.files.map((file, index) => this.#item(file, index)));
  }

  #item(file, index) {
    const image = make("img", { alt: text("sourceAlt", index + 1) });
    showFile(image, file);
    const label = text("removeSource", index + 1);
    const remove = make("button", { type: "button", className: "remove", title: label, ariaLabel: label }, "×");
    remove.addEventListener("click", () => {
      this.set(this.files.filter((_, each) => each !== index));
      (this.list.querySelectorAll("button")[Math.min(index, this.files.length - 1)] ?? this.input).focus();
    });
    return make("li", {}, image, remove);
  }

  #acceptDrops() {
    const area = byId("drop");
    let depth = 0;
    const mark = (change) => {
      depth = Math.max(0, depth + change);
      area.classList.toggle("over", depth > 0);
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragenter", (event) => hasFiles(event) && mark(1));
    document.addEventListener("dragleave", (event) => hasFiles(event) && mark(-1));
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      mark(0);
      this.add([...event.dataTransfer.files]);
    });
  }
}
