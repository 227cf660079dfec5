/** The page: waits for the server, and connects image, conversation and question. */

import { Composer, askForKey } from "./composer.js";
import { baseName, fromRecords, toRecords, answered } from "./conversation.js";
import { byId } from "./dom.js";
import { watchPicker } from "./image.js";
import { lightOnHover } from "./overlay.js";
import { Parameters } from "./parameters.js";
import { Plate } from "./plate.js";
import { hasKey, health, modelCard } from "./server.js";
import { keepState, restoreImage, restoreState } from "./store.js";
import { Talk } from "./talk.js";

/** Milliseconds between two questions to /health. */
const POLL_LOADING = 1000;
const POLL_READY = 15000;

const STATES = {
  ready: "Ready",
  loading: "Loading the model",
  draining: "Shutting down",
  failed: "The model has failed",
  unreachable: "The server does not answer",
};

const WAITING = "Write your question; it can be sent when the model is ready.";
const TEACHING =
  "Add an image and type a question, or begin with a task. " +
  "Where an answer names places, they are drawn on the image. To ask about one part, drag over it.";

let card = null;
let isEditing = false;

/** Path of the image of a restored or loaded conversation whose bytes are missing; null if none are. */
let missingImage = null;

/** Whether `card` is that of the server as it runs now. */
let isCardCurrent = false;

/** Path of the present image where it differs from the file's name: a saved conversation keeps it. */
let imagePath = null;

const saved = restoreState();
const parameters = new Parameters(byId("parameters"), byId("parameters-summary"), keep);
const composer = new Composer({ onSend: send, onStop: () => talk.stop(), onChange: draftChanged, onTask: taskPicked });
const plate = new Plate({
  mayChange,
  onChange: imageChanged,
  onRegion: (region) => composer.insertRegion(region),
  notify: (text) => composer.notify(text),
});
const talk = new Talk({
  onChange: talkChanged,
  onMarks: (turn) => plate.showMarks(turn),
  onFailure: (error) => error.status === 401 && askForKey("This key was refused.", () => talk.regenerate()),
  edit: editLast,
  undo: undoLast,
});

function keep() {
  keepState({
    turns: talk.turns.filter(({ status }) => status !== "streaming"),
    draft: composer.text,
    parameters: card ? parameters.changes() : saved.parameters,
    image: plate.image ? (imagePath ?? plate.image.name) : missingImage,
  });
}

function restore() {
  const image = restoreImage();
  if (image) {
    plate.set(image);
    if (saved.image !== image.name) imagePath = saved.image ?? null;
  } else {
    expectImage(saved.image ?? null);
  }
  talk.set(saved.turns ?? []);
  composer.text = saved.draft ?? "";
}

/** Ask for the image of a conversation that came without its bytes. */
function expectImage(path) {
  missingImage = path;
  plate.expect(path && baseName(path));
}

/** Follow the server's state for as long as the page is open. */
async function watchServer() {
  const { status, progress } = await health();
  byId("state").dataset.state = status;
  const text = [STATES[status] ?? status, progress].filter(Boolean).join(": ");
  // Screen readers say what is set, also if it was the same.
  if (byId("state-text").textContent !== text) byId("state-text").textContent = text;
  if (status !== "ready") isCardCurrent = false;
  if (!card && status !== "ready") showWaiting(status, progress);
  if (status === "ready" && !isCardCurrent && byId("key-form").hidden) await loadCard();
  allowSending();
  setTimeout(watchServer, status === "ready" ? POLL_READY : POLL_LOADING);
}

async function loadCard() {
  try {
    showCard(await modelCard());
  } catch (error) {
    if (error.status !== 401) return composer.notify(error.message);
    byId("empty-title").textContent = "This server asks for its key";
    byId("empty-lead").textContent = "";
    askForKey(hasKey() && "This key was refused.", loadCard);
  }
  allowSending();
}

/** Say what is awaited in the place of the tasks. */
function showWaiting(status, progress) {
  byId("empty-title").textContent = STATES[status] ?? status;
  const step = progress ? `${progress[0].toUpperCase()}${progress.slice(1)}. ` : "";
  byId("empty-lead").textContent = step + WAITING;
}

function showCard(model) {
  const changes = card ? parameters.changes() : saved.parameters;
  card = model;
  isCardCurrent = true;
  byId("model").textContent = model.id;
  document.title = `${model.id} · sphinx-jax`;
  parameters.setDefaults(model.defaults ?? {}, changes);
  byId("max-tokens").max = model.max_model_len;
  const hasImages = model.image_size !== null;
  plate.enable(hasImages);
  byId("empty-tasks").hidden = !hasImages;
  offerTasks();
  byId("empty-title").textContent = hasImages ? "Ask about an image" : "Ask a question";
  byId("empty-lead").textContent = hasImages ? TEACHING : "This model reads text only.";
}

function allowSending() {
  const isReady = card !== null && byId("state").dataset.state === "ready";
  byId("send").disabled = !isReady || !composer.text.trim();
}

async function send() {
  if (byId("send").disabled || talk.isBusy) return;
  const invalid = parameters.invalidField();
  if (invalid) {
    composer.openPanel("parameters-button");
    composer.notify(`${invalid.labels[0].textContent}: ${invalid.validationMessage}`);
    return invalid.focus();
  }
  if (missingImage) return composer.notify(`Choose ${baseName(missingImage)} first: this conversation is about it.`);
  composer.notify("");
  const question = composer.text.trim();
  if (isEditing) talk.turns.pop();
  setEditing(false);
  composer.text = "";
  await talk.ask(question, () => ({ dataUrl: plate.image?.dataUrl, parameters: parameters.values() }));
}

function talkChanged() {
  composer.setBusy(talk.isBusy);
  byId("save").disabled = !answered(talk.turns).length;
  byId("clear").disabled = !talk.turns.length || talk.isBusy;
  byId("open").disabled = talk.isBusy;
  offerTasks();
  keep();
}

function imageChanged() {
  talk.showLastMarks();
  keep();
}

function draftChanged() {
  if (!composer.holdsRegion && !plate.frame.isActive) plate.frame.hide();
  allowSending();
  keep();
}

function setEditing(on) {
  isEditing = on;
  byId("editing").hidden = !on;
}

function editLast() {
  setEditing(true);
  composer.text = talk.last.question;
  composer.field.focus();
}

function cancelEdit() {
  setEditing(false);
  composer.text = "";
  composer.field.focus();
}

/** Before the first question the tasks are on the page itself. */
function offerTasks() {
  byId("tasks-button").hidden = !plate.isEnabled || !talk.turns.length;
  if (byId("tasks-button").hidden) composer.closePanels();
}

function taskPicked() {
  if (plate.isEnabled && !plate.image) composer.notify("The tasks are about an image: add one.");
}

/** Set the turns and what they are about, and offer to bring back what was before. */
function replaceConversation(turns, { image, path, missing }, notice) {
  const before = { turns: talk.turns, about: { image: plate.image, path: imagePath, missing: missingImage } };
  setConversation(turns, { image, path, missing });
  composer.notify(notice, { label: "Restore", run: () => setConversation(before.turns, before.about) });
  composer.field.focus();
}

function setConversation(turns, { image, path, missing }) {
  setEditing(false);
  imagePath = path;
  expectImage(missing);
  if (image !== plate.image) plate.set(image);
  talk.set(turns);
}

function undoLast() {
  const about = { image: plate.image, path: imagePath, missing: missingImage };
  replaceConversation(talk.turns.slice(0, -1), about, "The last question and its answer are removed.");
}

function clear() {
  const notice = plate.image ? "The conversation is cleared; the image stays." : "The conversation is cleared.";
  replaceConversation([], { image: plate.image, path: null, missing: null }, notice);
}

/** Another image begins a new conversation: say so and let the user decide. Resolves to whether it may come. */
async function mayChange(name) {
  if (talk.isBusy) {
    composer.notify("An answer about the present image is arriving; stop it first.");
    return false;
  }
  const isMissing = missingImage && baseName(missingImage) === name;
  if (!isMissing && talk.turns.length && !(await confirmNew(name))) return false;
  imagePath = isMissing ? missingImage : null;
  if (!isMissing && talk.turns.length) talk.set([]);
  setEditing(false);
  expectImage(null);
  return true;
}

/** Resolves to true for "Start new", to false for the other button and Escape. */
function confirmNew(name) {
  const dialog = byId("new-image");
  byId("new-image-text").textContent = name
    ? `The turns so far are not about ${name}. With it, a new conversation starts and they are removed.`
    : "The turns so far are about this image. Without it, a new conversation starts and they are removed.";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "start");
  });
}

function save() {
  const path = plate.image ? (imagePath ?? plate.image.name) : missingImage;
  const text = JSON.stringify(toRecords(talk.turns, path), null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `conversation-${new Date().toISOString().slice(0, 16).replace(":", "")}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function open([file]) {
  if (!file) return;
  try {
    const { image, pairs, more } = fromRecords(await file.text());
    if (image && !plate.isEnabled) throw new Error("its conversation is about an image, and this model reads text only.");
    const turns = pairs.map(([question, answer]) => ({ question, answer, status: "complete" }));
    replaceConversation(turns, { image: null, path: null, missing: image }, openedNotice(image, more));
  } catch (error) {
    composer.notify(`${file.name} cannot be opened: ${error.message}`);
  }
}

function openedNotice(image, more) {
  return [
    "The conversation is opened.",
    more ? `It is the first of ${more + 1} in the file.` : "",
    image ? `Choose its image, ${baseName(image)}, to continue.` : "",
  ].filter(Boolean).join(" ");
}

function listen() {
  const dialog = byId("new-image");
  byId("new-image-start").addEventListener("click", () => dialog.close("start"));
  byId("new-image-keep").addEventListener("click", () => dialog.close("keep"));
  byId("defaults").addEventListener("click", () => {
    parameters.restoreDefaults();
    keep();
  });
  byId("cancel-edit").addEventListener("click", cancelEdit);
  byId("clear").addEventListener("click", clear);
  byId("save").addEventListener("click", save);
  watchPicker([byId("open")], byId("open-file"), open);
  lightOnHover(byId("turn-list"));
}

listen();
restore();
watchServer();
