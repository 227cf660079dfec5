/** An image from the user: dropped, pasted, picked or photographed. Its bytes are sent as they are. */

/** What both browsers show and the server decodes. */
const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"];

/**
 * {name, bytes, dataUrl, width, height} of a file; width and height in pixels, upright. Raises Error with one
 * sentence if it is no image that can be shown.
 */
export async function readImage(file) {
  if (!TYPES.includes(file.type)) {
    throw new Error(`${file.name} is no image that can be used here; take a PNG, JPEG, WebP, GIF, BMP or AVIF file.`);
  }
  const dataUrl = await readDataUrl(file);
  const { width, height } = await decode(dataUrl, file.name);
  return { name: file.name, bytes: file.size, dataUrl, width, height };
}

function readDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function decode(dataUrl, name) {
  const image = new Image();
  image.src = dataUrl;
  try {
    await image.decode();
  } catch {
    throw new Error(`${name} is damaged: it cannot be shown.`);
  }
  return { width: image.naturalWidth, height: image.naturalHeight };
}

/** "640 × 480, 32 kB" */
export function describeSize({ width, height, bytes }) {
  const size = bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  return `${width} × ${height}, ${size}`;
}

/** Call `onFiles(files)` for files dropped anywhere on the page; `zone` shows while they hover. */
export function watchDrops(zone, onFiles) {
  let depth = 0;
  const show = (change) => {
    depth = change === 0 ? 0 : depth + change;
    zone.classList.toggle("receiving", depth > 0);
  };
  document.addEventListener("dragenter", () => show(1));
  document.addEventListener("dragleave", () => show(-1));
  document.addEventListener("dragover", (event) => isForImage(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    show(0);
    if (!isForImage(event)) return;
    event.preventDefault();
    onFiles([...event.dataTransfer.files]);
  });
}

/** Whether a drop is not text for a text field. */
function isForImage({ dataTransfer, target }) {
  return dataTransfer.types.includes("Files") || !isTextField(target);
}

function isTextField(target) {
  return target.matches?.("textarea, input") ?? false;
}

/** Call `onFiles(files)` for pasted files. Text beside them, as office programs add, goes to the text field. */
export function watchPastes(onFiles) {
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length || (isTextField(event.target) && event.clipboardData.types.includes("text/plain"))) return;
    event.preventDefault();
    onFiles(files);
  });
}

/** Let `buttons` open the file dialog of `input`, and call `onFiles(files)` with what is chosen there. */
export function watchPicker(buttons, input, onFiles) {
  for (const button of buttons) button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    const files = [...input.files];
    // The same file can be chosen again.
    input.value = "";
    onFiles(files);
  });
}
