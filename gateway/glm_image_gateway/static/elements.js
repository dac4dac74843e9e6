// Small helpers to find and make elements.

import { text } from "./i18n.js";

/** Returns the element of an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Returns a new element with properties and children; `data` are its data attributes. */
export function make(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** Returns a button whose visible text has the name `name`. */
export function button(name, onClick, className = "") {
  const element = make("button", { type: "button", className, data: { text: name } }, text(name));
  element.addEventListener("click", onClick);
  return element;
}

/** Sets the address of an image to a file's; the file's memory is freed once the image is loaded. */
export function showFile(image, file) {
  const url = URL.createObjectURL(file);
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
}

/** Has the browser save a file. */
export function download(file, name) {
  const url = URL.createObjectURL(file);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
