// The form: what the user asks for, as fields of the API. The server checks the values, and its sentences are shown.

import { byId, make } from "./elements.js";
import { text } from "./i18n.js";

const RATIOS = ["1:1", "4:3", "3:4", "16:9", "9:16"];
const GRID = 32;
const MAX_SIDE = 2048;
const FALLBACK = { width: 1024, height: 1024, num_inference_steps: 50, guidance_scale: 1.5 };
const AUTO = "auto";

const INPUTS = {
  prompt: "prompt",
  size: "width",
  width: "width",
  height: "height",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  seed: "seed",
  n: "count",
  output_format: "format",
  image: "files",
};

/** The form's values; `hasSources` says whether there are source images, which may decide the size. */
export class Form {
  #defaults = null;
  #isAuto = false;
  #area = 0;

  constructor(hasSources) {
    this.hasSources = hasSources;
    for (const id of ["steps", "guidance"]) this.#connect(byId(id), byId(`${id}-slider`));
    for (const id of ["width", "height"]) byId(id).addEventListener("input", () => this.#setSize());
    byId("swap").addEventListener("click", () => this.#setSize(byId("height").value, byId("width").value));
    byId("seed-clear").addEventListener("click", () => (byId("seed").value = ""));
    this.prefill(FALLBACK);
  }

  /** Writes the server's defaults, unless they are there already. */
  setDefaults(defaults) {
    if (!defaults || this.#defaults) return;
    this.#defaults = defaults;
    this.prefill({ ...FALLBACK, ...defaults });
  }

  prefill({ width, height, num_inference_steps, guidance_scale }) {
    this.#area = width * height;
    this.#setValue("steps", num_inference_steps);
    this.#setValue("guidance", guidance_scale);
    this.#setSize(width, height);
  }

  /** Returns the fields of the API; steps and guidance without a value are the defaults. */
  read() {
    const value = (id) => byId(id).value.trim();
    const isAuto = this.#isAuto && this.hasSources();
    const defaults = { ...FALLBACK, ...this.#defaults };
    const fields = {
      prompt: byId("prompt").value,
      size: isAuto ? AUTO : `${value("width")}x${value("height")}`,
      num_inference_steps: value("steps") || String(defaults.num_inference_steps),
      guidance_scale: value("guidance") || String(defaults.guidance_scale),
      // As text: JavaScript's numbers have 53 bits.
      seed: value("seed"),
      n: value("count"),
      output_format: value("format"),
    };
    return Object.fromEntries(Object.entries(fields).filter(([name, each]) => name === "prompt" || each !== ""));
  }

  /** Writes fields of the API into the form. */
  fill(fields) {
    byId("prompt").value = fields.prompt;
    this.#setValue("steps", fields.num_inference_steps);
    this.#setValue("guidance", fields.guidance_scale);
    byId("seed").value = fields.seed ?? "";
    byId("count").value = fields.n ?? 1;
    byId("format").value = fields.output_format ?? "png";
    if (fields.size === AUTO) this.setAuto(true);
    else this.#setSize(...fields.size.split("x"));
  }

  /** Chooses the size of the first source image, or one of the form's own. */
  setAuto(isAuto) {
    this.#isAuto = isAuto;
    this.renderSizes();
  }

  /** Marks the input that an error is about, and moves the focus there; null removes all marks. */
  mark(field) {
    for (const id of Object.values(INPUTS)) byId(id).removeAttribute("aria-invalid");
    const input = byId(INPUTS[field]);
    input?.setAttribute("aria-invalid", "true");
    input?.focus();
  }

  /** Writes the buttons of sizes; again after a change of the language or of the source images. */
  renderSizes() {
    const isAuto = this.#isAuto && this.hasSources();
    const size = `${byId("width").value}x${byId("height").value}`;
    const chips = RATIOS.map((ratio) => {
      const [width, height] = sides(ratio, this.#area);
      const label = `${ratio}, ${width} × ${height}`;
      return this.#chip(ratio, label, !isAuto && size === `${width}x${height}`, shape(ratio), () => this.#setSize(width, height));
    });
    if (this.hasSources()) {
      const name = text("sizeAsSource");
      chips.unshift(this.#chip(name, name, isAuto, null, () => this.setAuto(true)));
    }
    const focused = [...byId("presets").children].indexOf(document.activeElement);
    byId("presets").replaceChildren(...chips);
    chips[focused]?.focus();
    byId("presets").parentElement.classList.toggle("auto", isAuto);
  }

  #chip(name, label, isPressed, icon, onClick) {
    const chip = make("button", { type: "button", ariaLabel: label, title: label, ariaPressed: String(isPressed) });
    chip.append(...(icon ? [icon] : []), name);
    chip.addEventListener("click", onClick);
    return chip;
  }

  #setSize(width = byId("width").value, height = byId("height").value) {
    byId("width").value = width;
    byId("height").value = height;
    this.setAuto(false);
  }

  #setValue(id, value) {
    byId(id).value = value ?? "";
    byId(`${id}-slider`).value = value ?? "";
  }

  #connect(input, slider) {
    input.addEventListener("input", () => (slider.value = input.value));
    slider.addEventListener("input", () => (input.value = slider.value));
  }
}

/** Returns the sides of a ratio, multiples of the model's grid, with about `area` pixels. */
function sides(ratio, area) {
  const [x, y] = ratio.split(":").map(Number);
  const side = (length) => Math.min(MAX_SIDE, Math.max(GRID, Math.round(length / GRID) * GRID));
  return [side(Math.sqrt((area * x) / y)), side(Math.sqrt((area * y) / x))];
}

/** Returns a small rectangle of a ratio. */
function shape(ratio) {
  const [x, y] = ratio.split(":").map(Number);
  const icon = make("span", { className: "shape", ariaHidden: "true" });
  icon.style.width = `${(14 * x) / Math.max(x, y)}px`;
  icon.style.height = `${(14 * y) / Math.max(x, y)}px`;
  return icon;
}
