// The view of a request: its progress, intermediate images, images with their actions, or error.

import { button, byId, download, make, showFile } from "./elements.js";
import { duration, text } from "./i18n.js";

const FIXED_TEXTS = ["sent", "waitingForServer"];
const ANNOUNCED = { decode: "announceDecode", denoise: "announceDenoise" };

/** The part of the page with the result; `actions` has `again(run, image)` and `edit(image)`. */
export class Result {
  #announced = null;

  constructor(actions) {
    this.actions = actions;
    byId("error-close").addEventListener("click", () => this.showError(null));
  }

  /** Shows that a request runs; `size` is `[width, height]`, or null while it is unknown. */
  start(prompt, size) {
    this.prompt = prompt;
    this.size = size;
    this.#announced = null;
    this.showError(null);
    byId("empty").hidden = true;
    this.showProgress({ stage: "sent", fraction: null, eta: null }, 0);
    this.#replaceImages(this.#frame(make("div", { className: "blank" })));
  }

  /** Shows how far the request is; the state as `Progress.at` returns it. */
  showProgress({ stage, done, total, fraction, eta }, elapsed) {
    byId("stage").textContent = text(stage, done, total);
    byId("eta").textContent = [text("elapsed", duration(Math.floor(elapsed))), eta === null || eta < 1 ? "" : text("eta", duration(Math.round(eta)))]
      .filter(Boolean)
      .join(" · ");
    const bar = byId("progress");
    if (fraction === null) bar.removeAttribute("value");
    else bar.value = fraction;
    if (stage === this.#announced) return;
    this.#announced = stage;
    if (ANNOUNCED[stage]) announce(text(ANNOUNCED[stage]));
    else if (FIXED_TEXTS.includes(stage)) announce(text(stage));
  }

  /** Shows an intermediate image in place of the one before. */
  showPartial(base64, format) {
    const image = byId("images").querySelector("img.partial");
    const url = `data:image/${format};base64,${base64}`;
    const alt = text("previewAlt", this.prompt);
    if (image) image.src = url;
    else {
      this.#replaceImages(this.#frame(make("img", { className: "partial", src: url, alt })));
      announce(text("announcePreview"));
    }
  }

  /** Removes the view of a request without images, and restores the images of the previous one. */
  stop() {
    if (byId("images").querySelector(".pending")) {
      byId("images").replaceChildren();
      byId("images").hidden = true;
      byId("empty").hidden = Boolean(this.run);
      if (this.run) this.showRun(this.run);
    }
  }

  /** Shows the images of a run. */
  showRun(run) {
    this.run = run;
    byId("empty").hidden = true;
    this.#replaceImages(...run.images.map((image) => this.#figure(run, image)));
  }

  /** Shows an error's sentence; null hides it. */
  showError(message) {
    byId("error").hidden = message === null;
    byId("error-text").textContent = message ?? "";
  }

  /** Writes the images' texts again, after a change of the language. */
  render() {
    if (this.run && byId("images").querySelector("figure")) this.showRun(this.run);
  }

  #frame(content) {
    const frame = make("div", { className: "frame pending" }, content);
    if (this.size) fit(frame, ...this.size);
    return frame;
  }

  #replaceImages(...children) {
    const images = byId("images");
    images.hidden = false;
    images.classList.toggle("several", children.length > 1);
    images.replaceChildren(...children);
  }

  #figure(run, image) {
    const picture = make("img", { alt: run.options.prompt, width: image.width, height: image.height });
    showFile(picture, image.file);
    const open = make("button", { type: "button", className: "frame", title: text("enlarge") }, picture);
    fit(open, image.width, image.height);
    open.addEventListener("click", () => view(picture.alt, image.file));
    const { num_inference_steps: steps, guidance_scale: guidance } = run.options;
    const facts = text("facts", image.width, image.height, steps, guidance, image.seed);
    const actions = make(
      "div",
      { className: "actions" },
      button("download", () => download(image.file, fileName(image))),
      button("again", () => this.actions.again(run, image)),
      button("edit", () => this.actions.edit(image)),
    );
    const caption = make(
      "figcaption",
      {},
      make("p", { className: "said" }, run.options.prompt),
      make("p", { className: "facts" }, `${facts} · ${duration(run.seconds)}`),
      actions,
    );
    return make("figure", {}, open, caption);
  }
}

/** Has screen readers read a text. */
export function announce(message) {
  byId("live").textContent = message;
}

function view(alt, file) {
  const image = byId("viewer-image");
  showFile(image, file);
  image.alt = alt;
  byId("viewer-text").textContent = alt;
  byId("viewer").showModal();
}

/** Gives a frame an image's proportions, within the window. */
function fit(frame, width, height) {
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.style.setProperty("--ratio", width / height);
}

function fileName(image) {
  const extension = image.file.type.replace("image/", "").replace("jpeg", "jpg");
  return `glm-image_${image.width}x${image.height}_${image.seed}.${extension}`;
}
