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

/** Draw the marks of a turn over an image of `size` {width, height} pixels. */
export function drawMarks(svg, badges, marks, turnId, size) {
  const regions = regionsOf(turnId, marks);
  const boxes = regions.filter(({ group }) => group.length === 4).sort((a, b) => area(b.group) - area(a.group));
  const points = regions.filter(({ group }) => group.length === 2);
  svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  svg.setAttribute("aria-label", describe(regions));
  svg.replaceChildren(
    ...boxes.map((region) => drawBox(region, size)),
    ...skeletonEdges(marks).map((edge) => drawEdge(edge, size)),
    ...points.map((region) => drawPoint(region, size)),
  );
  badges.replaceChildren(
    ...boxes.map((region) => badge(region, isTooSmall(region) ? "badge crowded" : "badge", size)),
    ...points.map((region) => badge(region, regions.length > CROWD ? "badge point crowded" : "badge point", size)),
  );
}

/** Numbers of several regions of one mark hide them where they are small. */
function isTooSmall({ mark, group }) {
  return mark.groups.length > 1 && group[2] - group[0] < SMALL;
}

function area([x1, y1, x2, y2]) {
  return (x2 - x1) * (y2 - y1);
}

function describe(regions) {
  if (!regions.length) return "No regions are marked";
  const names = regions.map(({ label, mark }) => `${label} ${mark.name}`.trim());
  return `${regions.length} marked: ${names.join(", ")}`;
}

/** Each shape twice: a halo in the page's colour below the line, so that it shows on any image. */
function drawBox({ group, key, colour }, size) {
  const [x1, y1, x2, y2] = toPixels(group, size);
  const shape = { x: Math.min(x1, x2), y: Math.min(y1, y2), width: Math.abs(x2 - x1), height: Math.abs(y2 - y1) };
  return svgElementGroup("rect", "box", shape, key, colour);
}

function drawPoint({ group, key, colour }, size) {
  const [x, y] = toPixels(group, size);
  // A line of no length with round ends: a dot of the same size on the screen at any scale.
  return svgElementGroup("path", "dot", { d: `M ${x} ${y} h 0` }, key, colour);
}

function svgElementGroup(tag, kind, shape, key, colour) {
  const group = svgElement("g", { class: `${kind} ${colour}`, "data-mark": key });
  group.append(svgElement(tag, { ...shape, class: "halo" }), svgElement(tag, { ...shape, class: "line" }));
  return group;
}

function drawEdge([from, to], size) {
  const [x1, y1, x2, y2] = toPixels([...from, ...to], size);
  const group = svgElement("g", { class: "bone" });
  group.append(...["halo", "line"].map((name) => svgElement("line", { x1, y1, x2, y2, class: name })));
  return group;
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
export function light(key) {
  for (const marked of document.querySelectorAll("[data-mark]")) {
    marked.classList.toggle("lit", key !== null && belongTogether(marked.dataset.mark, key));
  }
  document.body.classList.toggle("some-lit", key !== null);
}

/** A name's key begins the keys of its regions. */
function belongTogether(one, other) {
  return one === other || one.startsWith(`${other}.`) || other.startsWith(`${one}.`);
}

/** Light what the pointer or the focus is on, within `root`. */
export function lightOnHover(root) {
  const follow = (event) => light(event.target.closest("[data-mark]")?.dataset.mark ?? null);
  root.addEventListener("pointerover", follow);
  root.addEventListener("pointerleave", () => light(null));
  root.addEventListener("focusin", follow);
  root.addEventListener("focusout", () => light(null));
}
