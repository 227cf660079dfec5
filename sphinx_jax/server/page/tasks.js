/** The tasks that SPHINX was trained for. The prompts are its interface: their wording is exact. */

import { element } from "./dom.js";
import { PLACEHOLDER } from "./regions.js";

/** `variable` is the part of the prompt that the user replaces. */
const TASKS = [
  { label: "Open question", prompt: "What's in the image?" },
  { label: "Long description", prompt: "Generate a detailed description about the image." },
  { label: "Caption", prompt: "Provide a one-sentence caption for the provided image." },
  {
    label: "Find an object",
    prompt: "Please provide the bounding box coordinate of the region this sentence describes: blue backpack.",
    variable: "blue backpack",
  },
  {
    label: "Find a relation",
    prompt: "Please provide the bounding box coordinate of the region this sentence describes: people on car.",
    variable: "people on car",
  },
  {
    label: "Caption with boxes",
    prompt: "Describe the image concisely. Include the bounding box for each mentioned object.",
  },
  { label: "Find all of a kind", prompt: "Detect all people shown in the image.", variable: "people" },
  {
    label: "Pose of a person",
    prompt: `Detect the key points of the person in the region ${PLACEHOLDER}.`,
    variable: PLACEHOLDER,
  },
  { label: "Text in the image", prompt: "Please detect all texts and provide their bounding box coordinate." },
  { label: "Chart to table", prompt: "Convert this chart to a table." },
];

/** Fill `container` with a button for each task; `onPick(task)` is called with the chosen one. */
export function showTasks(container, onPick) {
  container.replaceChildren(...TASKS.map((task) => taskButton(task, onPick)));
}

function taskButton(task, onPick) {
  const made = element(
    "button",
    { type: "button", className: "task" },
    element("span", { className: "task-label" }, task.label),
    " ",
    element("span", { className: "task-prompt" }, ...promptParts(task)),
  );
  made.addEventListener("click", () => onPick(task));
  return made;
}

function promptParts({ prompt, variable }) {
  if (!variable) return [prompt];
  const [before, after] = prompt.split(variable);
  return [before, element("span", { className: "task-variable" }, variable), after];
}

/** Put a task's prompt into the question, its variable part selected. */
export function fillIn(textarea, { prompt, variable }) {
  textarea.value = prompt;
  const begin = variable ? prompt.indexOf(variable) : prompt.length;
  textarea.focus();
  textarea.setSelectionRange(begin, begin + (variable ?? "").length);
}
