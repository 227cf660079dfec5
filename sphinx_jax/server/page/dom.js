/** Elements by id and by construction. Text always becomes text nodes, never markup. */

export function byId(id) {
  return document.getElementById(id);
}

/** A new element: `properties` are set on it, those with a hyphen or of the form aria-* and data-* as attributes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function button(text, className, onClick) {
  const made = element("button", { type: "button", className }, text);
  made.addEventListener("click", onClick);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Let a polite live region say `text`, also if it said the same before. */
export function announce(region, text) {
  region.textContent = "";
  requestAnimationFrame(() => {
    region.textContent = text;
  });
}
