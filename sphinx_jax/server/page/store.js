/** What survives a reload: the tab's session storage. The image is kept apart from what changes with each answer. */

const STATE = "sphinx-jax.state";
const IMAGE = "sphinx-jax.image";

/** Keep the state; the image gives way if both are too large. */
export function keepState(state) {
  const text = JSON.stringify(state);
  try {
    sessionStorage.setItem(STATE, text);
  } catch {
    sessionStorage.removeItem(IMAGE);
    sessionStorage.setItem(STATE, text);
  }
}

/** The stored state, or {} in a new tab. */
export function restoreState() {
  return JSON.parse(sessionStorage.getItem(STATE) ?? "{}");
}

/** Keep the image, or none. False if it is too large for the storage; then only its name is kept. */
export function keepImage(image) {
  sessionStorage.removeItem(IMAGE);
  if (image === null) return true;
  try {
    sessionStorage.setItem(IMAGE, JSON.stringify(image));
    return true;
  } catch {
    return false;
  }
}

export function restoreImage() {
  return JSON.parse(sessionStorage.getItem(IMAGE) ?? "null");
}
