// Starts the page and connects its parts.

import { RequestError, key } from "./api.js";
import { Connection } from "./connection.js";
import { button, byId, make } from "./elements.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { addRun } from "./history.js";
import { duration, onLanguage, startLanguages, text } from "./i18n.js";
import { Result, announce } from "./result.js";
import { run } from "./run.js";
import { Sources } from "./sources.js";

const EXAMPLES = ["example1", "example2", "example3"];

const result = new Result({ again, edit });
const sources = new Sources(
  () => form.setAuto(sources.files.length > 0),
  (message) => result.showError(message),
);
const form = new Form(() => sources.files.length > 0);
const gallery = new Gallery((shown) => {
  if (running) return;
  result.showError(null);
  result.showRun(shown);
  byId("images").scrollIntoView({ block: "nearest" });
});
const connection = new Connection(showState);
let running = null;

async function generate() {
  if (running) return;
  form.mark(null);
  const controller = new AbortController();
  const options = form.read();
  setRunning(controller);
  try {
    const done = await run(options, sources.files, connection, result, controller.signal);
    setRunning(null);
    result.showRun(done);
    announce(text("announceDone", done.images.length, duration(done.seconds)));
    await keep(done);
  } catch (error) {
    setRunning(null);
    result.stop();
    if (error.name === "AbortError") announce(text("cancelled"));
    else showFailure(error);
  }
}

function showFailure(error) {
  result.showError(error.message);
  if (!(error instanceof RequestError)) throw error;
  if (error.needsKey) askForKey(error.message);
  else form.mark(error.param);
  if (error.isServerAway) connection.check();
}

async function keep(done) {
  try {
    await addRun(done);
    await gallery.load();
  } catch (error) {
    result.showError(text("historyFull", error.message));
  }
}

function setRunning(controller) {
  running = controller;
  // A disabled button loses the focus, and so does one that is no longer there.
  const hadFocus = [byId("generate"), byId("cancel"), document.body].includes(document.activeElement);
  byId("generate").disabled = controller !== null;
  byId("running").hidden = controller === null;
  if (hadFocus) byId(controller ? "cancel" : "generate").focus({ preventScroll: true });
  if (controller) byId("running").scrollIntoView({ block: "nearest" });
}

function again(shown, image) {
  sources.set(shown.sources);
  form.fill({ ...shown.options, n: 1, seed: image.seed });
  byId("prompt").focus();
  announce(text("againDone"));
}

function edit(image) {
  const name = `image.${image.file.type.replace("image/", "")}`;
  sources.set([new File([image.file], name, { type: image.file.type })]);
  byId("prompt").focus();
}

function showState(state, answer) {
  if (answer?.ready) form.setDefaults(answer.defaults);
  byId("key-button").hidden = !connection.needsKey;
  const shown = state === "ready" && connection.needsKey && !key.get() ? "needsKey" : state;
  byId("state").dataset.state = shown;
  // Only a change is written, so that screen readers read it once.
  if (byId("state-text").textContent !== text(shown)) byId("state-text").textContent = text(shown);
}

function askForKey(message = text("keyHint")) {
  byId("key-hint").textContent = message;
  byId("key").value = key.get();
  byId("key-dialog").returnValue = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function renderExamples() {
  const choose = (name) => () => {
    byId("prompt").value = text(name);
    byId("prompt").focus();
  };
  byId("examples").replaceChildren(...EXAMPLES.map((name) => make("li", {}, button(name, choose(name)))));
}

function startKeys() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("cancel").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    }
    if (event.key === "Escape") running?.abort();
  });
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("theme", theme);
  });
  byId("key-button").addEventListener("click", () => askForKey());
  byId("key-dialog").addEventListener("close", () => {
    if (byId("key-dialog").returnValue !== "save") return;
    key.set(byId("key").value.trim());
    result.showError(null);
    connection.check();
  });
}

startKeys();
startLanguages(byId("language"));
onLanguage(() => {
  showState(connection.state, null);
  form.renderSizes();
  sources.render();
  result.render();
  gallery.render();
  renderExamples();
});
connection.check();
await gallery.load();
