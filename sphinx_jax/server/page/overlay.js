/** Marks drawn over the image. Marks, names and lists that belong together carry one key and are lit together. */

import { element, svgElement } from "./dom.js";
import { isKeyPoint, skeletonEdges, toPixels } from "./regions.js";

const COLOURS = 6;

/** Above this number of marks the numbers of points are only shown when lit. */
const CROWD = 8;

/** Width of a small box, as a fraction of the square. */
const SMALL = 0.06;

/** The class of a mark's colour: key points by the side of the body, others in turn. */
export function colourClass({ name }, index) {
  if (isKeyPoint(name)) return { left: "mark-2", right: "mark-5" }[name.trim().slice(0, 5).trim().toLowerCase()] ?? "mark-4";
  return `mark-${(index % COLOURS) + 1}`;
}

/** The regions of marks: {mark, group, key, label, colour}; labels are "2", or "2.1" if a mark has several. */
export function regionsOf(turnId, marks) {
  return marks.flatMap((mark, index) =>
    mark.groups.map((group, i) => ({
      mark,
      group,
      key: `${markKey(turnId, index)}.${i + 1}`,
      label: mark.groups.length > 1 ? `${index + 1}.${i + 1}` : `${index + 1}`,
      colour: colourClass(mark, index),
    })),
  );
}

export function markKey(turnId, index) {
  return `${turnId}-${index + 1}`;
}

/** Draw a turn {id, marks, asked} over an image of `size` {width, height} pixels; `asked` are the question's marks. */
export function drawMarks(svg, badges, { id, marks, asked }, size) {
  const regions = regionsOf(id, marks);
  const boxes = regions.filter(({ group }) => isBox(group)).sort((a, b) => area(b.group) - area(a.group));
  const points = regions.filter(({ group }) => !isBox(group));
  svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  svg.setAttribute("aria-label", describe(regions));
  svg.toggleAttribute("hidden", !regions.length && !asked.length);
  svg.replaceChildren(
    ...asked.flatMap(({ groups }) => groups).filter(isBox).map((group) => drawAsked(group, size)),
    ...boxes.map((region) => drawBox(region, size)),
    ...skeletonEdges(marks).map((edge) => drawEdge(edge, size)),
    ...points.map((region) => drawPoint(region, size)),
  );
  badges.replaceChildren(
    ...boxes.map((region) => badge(region, isTooSmall(region) ? "badge crowded" : "badge", size)),
    ...points.map((region) => badge(region, regions.length > CROWD ? "badge point crowded" : "badge point", size)),
  );
}

function isBox(group) {
  return group.length === 4;
}

/** Numbers of several regions of one mark hide them where they are small. */
function isTooSmall({ mark, group }) {
  return mark.groups.length > 1 && group[2] - group[0] < SMALL;
}

function area([x1, y1, x2, y2]) {
  return (x2 - x1) * (y2 - y1);
}

function describe(regions) {
  const names = regions.map(({ label, mark }) => `${label} ${mark.name}`.trim());
  return `${regions.length} marked: ${names.join(", ")}`;
}

/** Each shape twice: a halo in the page's colour below the line, so that it shows on any image. */
function drawBox({ group, key, colour }, size) {
  return svgElementGroup("rect", `box ${colour}`, rectangle(group, size), { "data-mark": key });
}

/** A region of the question. */
function drawAsked(group, size) {
  return svgElementGroup("rect", "asked", rectangle(group, size));
}

function rectangle(group, size) {
  const [x1, y1, x2, y2] = toPixels(group, size);
  return { x: Math.min(x1, x2), y: Math.min(y1, y2), width: Math.abs(x2 - x1), height: Math.abs(y2 - y1) };
}

function drawPoint({ group, key, colour }, size) {
  const [x, y] = toPixels(group, size);
  // A line of no length with round ends: a dot of the same size on the screen at any scale.
  return svgElementGroup("path", `dot ${colour}`, { d: `M ${x} ${y} h 0` }, { "data-mark": key });
}

function svgElementGroup(tag, className, shape, attributes = {}) {
  const group = svgElement("g", { class: className, ...attributes });
  group.append(svgElement(tag, { ...shape, class: "halo" }), svgElement(tag, { ...shape, class: "line" }));
  return group;
}

function drawEdge([from, to], size) {
  const [x1, y1, x2, y2] = toPixels([...from, ...to], size);
  return svgElementGroup("line", "bone", { x1, y1, x2, y2 });
}

/** The number of a region at its left upper corner, inside where there is no room above. */
function badge({ group, key, label, colour }, className, size) {
  const [x, y] = toPixels(group, size);
  const made = element("span", { className: `${className} ${colour}`, "data-mark": key }, label);
  made.classList.toggle("inside", y < size.height * 0.08);
  made.style.left = `${clamp((x / size.width) * 100)}%`;
  made.style.top = `${clamp((y / size.height) * 100)}%`;
  return made;
}

function clamp(percent) {
  return Math.min(100, Math.max(0, percent));
}

/** Light everything that belongs to `key`: the region, its name and its line in the list; null lights nothing. */
function light(key) {
  for (const marked of document.querySelectorAll("[data-mark]")) {
    marked.classList.toggle("lit", key !== null && belongTogether(marked.dataset.mark, key));
  }
  document.body.classList.toggle("some-lit", key !== null);
}

/** Bring the focus to the line of a list that belongs to `key`. */
function focusLine(key) {
  const lines = [...document.querySelectorAll(".legend-row")];
  lines.find((line) => belongTogether(line.dataset.mark, key))?.focus();
}

/** A name's key begins the keys of its regions. */
function belongTogether(one, other) {
  return one === other || one.startsWith(`${other}.`) || other.startsWith(`${one}.`);
}

/** Light what the pointer or the focus is on, within `root`; a click on a name or region goes to its line. */
export function lightOnHover(root) {
  const follow = (event) => light(event.target.closest("[data-mark]")?.dataset.mark ?? null);
  root.addEventListener("pointerover", follow);
  root.addEventListener("pointerleave", () => light(null));
  root.addEventListener("focusin", follow);
  root.addEventListener("focusout", () => light(null));
  root.addEventListener("click", (event) => {
    const marked = event.target.closest("[data-mark]");
    if (marked && !event.target.closest("button")) focusLine(marked.dataset.mark);
  });
}
