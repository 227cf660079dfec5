/** The question's field and what stands around it: tasks, notices, the key. */

import { byId } from "./dom.js";
import { PLACEHOLDER } from "./regions.js";
import { setKey } from "./server.js";
import { fillIn, showTasks } from "./tasks.js";

/** Buttons and what they open. */
const PANELS = { "tasks-button": "tasks-panel", "parameters-button": "parameters" };

export class Composer {
  /** `onSend()` is called for Enter and Send, `onStop()` for Stop and Escape, `onChange()` after each edit, `onTask()` for a task. */
  constructor({ onSend, onStop, onChange, onTask }) {
    Object.assign(this, { onSend, onStop, onChange, onTask });
    this.field = byId("question");
    this.region = null;
    this.wasBusy = false;
    this.listen();
    for (const id of ["empty-tasks", "panel-tasks"]) showTasks(byId(id), (task) => this.pickTask(task));
  }

  listen() {
    this.field.addEventListener("input", () => this.changed());
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.onSend();
    });
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.onSend();
    });
    byId("stop").addEventListener("click", () => this.onStop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.onEscape();
    });
    byId("notice-close").addEventListener("click", () => this.notify(""));
    for (const opener of Object.keys(PANELS)) byId(opener).addEventListener("click", () => this.togglePanel(opener));
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    this.field.value = text;
    this.changed();
  }

  changed() {
    this.field.style.height = "auto";
    // Borders are no part of scrollHeight.
    this.field.style.height = `${this.field.scrollHeight + 2}px`;
    this.onChange();
  }

  togglePanel(opener) {
    if (byId(PANELS[opener]).hidden) this.openPanel(opener);
    else this.closePanels();
  }

  /** Open the panel of a button, and close the other. */
  openPanel(opener) {
    this.closePanels();
    byId(PANELS[opener]).hidden = false;
    byId(opener).setAttribute("aria-expanded", "true");
  }

  closePanels() {
    for (const [opener, panel] of Object.entries(PANELS)) {
      byId(panel).hidden = true;
      byId(opener).setAttribute("aria-expanded", "false");
    }
  }

  /** Stop an answer; without one, close the panel that is open. */
  onEscape() {
    if (!byId("stop").hidden) this.onStop();
    const opener = Object.keys(PANELS).find((id) => !byId(PANELS[id]).hidden);
    if (!opener) return;
    this.closePanels();
    byId(opener).focus();
  }

  pickTask(task) {
    this.closePanels();
    fillIn(this.field, task);
    this.changed();
    this.onTask();
  }

  /** Put a region into the question: for the placeholder, for the region put there before, or at the cursor. */
  insertRegion(region) {
    const { field } = this;
    const old = [PLACEHOLDER, this.region].find((text) => text !== null && field.value.includes(text));
    if (old) {
      const begin = field.value.indexOf(old);
      field.setRangeText(region, begin, begin + old.length, "end");
    } else {
      const before = field.value.slice(0, field.selectionStart);
      field.setRangeText(/\S$/.test(before) ? ` ${region}` : region, field.selectionStart, field.selectionEnd, "end");
    }
    this.region = region;
    field.focus();
    this.changed();
  }

  /** Whether the question still holds the region that was put there. */
  get holdsRegion() {
    return this.region !== null && this.field.value.includes(this.region);
  }

  /** Show a sentence, and a button if `action` {label, run} is given; an empty text takes it away. */
  notify(text, action = null) {
    byId("notice").hidden = text === "";
    byId("notice-text").textContent = text;
    byId("notice-action").hidden = action === null;
    if (action === null) return;
    byId("notice-action").textContent = action.label;
    byId("notice-action").onclick = () => {
      this.notify("");
      action.run();
    };
  }

  /** While an answer arrives, Stop has the place of Send. */
  setBusy(isBusy) {
    // The body has the focus if the button that was pressed is gone, as Regenerate.
    const isLost = [byId("stop"), byId("send"), document.body].includes(document.activeElement);
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    if (isLost && isBusy) byId("stop").focus();
    else if (document.activeElement === document.body && this.wasBusy) this.field.focus();
    this.wasBusy = isBusy;
  }
}

/** Ask for the API key; `onKey()` follows when one was entered. `hint` says what happened to the last one. */
export function askForKey(hint, onKey) {
  const form = byId("key-form");
  form.hidden = false;
  if (hint) byId("key-hint").textContent = hint;
  byId("key").focus();
  form.onsubmit = (event) => {
    event.preventDefault();
    setKey(byId("key").value.trim());
    byId("key").value = "";
    form.hidden = true;
    onKey();
  };
}
